"""transformers configuration of a nanotrain model."""

from transformers import PretrainedConfig

DEFAULTS = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 256,
    "value_embedding_layers": (),
    "bigram_rows": 0,
    "gate_channels": 16,
    "attention_gain": 1.0,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "final_logit_softcapping": 15.0,
    "initializer_range": 0.02,
    "use_cache": True,
}


class NanotrainConfig(PretrainedConfig):
    """Fields have the names common in transformers, otherwise those of nanotrain's GPTConfig."""

    model_type = "nanotrain"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012 - transformers wants a list

    def __init__(self, **kwargs):
        for name, default in DEFAULTS.items():
            setattr(self, name, kwargs.pop(name, default))
        super().__init__(**{"tie_word_embeddings": False, **kwargs})
        self.intermediate_size = 4 * self.hidden_size
