"""The shape of a nanotrain model, as transformers' configuration class."""

from transformers import PretrainedConfig


class NanotrainConfig(PretrainedConfig):
    """Fields have transformers' names where it has one; the others are those of nanotrain's GPTConfig."""

    model_type = "nanotrain"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012 - transformers wants a list

    def __init__(
        self,
        vocab_size=4096,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=256,
        value_embedding_layers=(),
        bigram_rows=0,
        gate_channels=16,
        attention_gain=1.0,
        rope_theta=10000.0,
        rms_norm_eps=1e-6,
        final_logit_softcapping=15.0,
        initializer_range=0.02,
        use_cache=True,
        tie_word_embeddings=False,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = 4 * hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.max_position_embeddings = max_position_embeddings
        self.value_embedding_layers = list(value_embedding_layers)
        self.bigram_rows = bigram_rows
        self.gate_channels = gate_channels
        self.attention_gain = attention_gain
        self.rope_theta = rope_theta
        self.rms_norm_eps = rms_norm_eps
        self.final_logit_softcapping = final_logit_softcapping
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        kwargs.pop("intermediate_size", None)  # follows from the width
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
