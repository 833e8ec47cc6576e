"""A nanotrain model for transformers 5: `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`.

Computes the same as nanotrain's gpt.py. A token also uses the token before it (key offset, bigram table), so the cache
stores slightly more than keys and values. A token at position 0 has no previous token, so left padding has no effect.

    B sequences   T tokens of each   S tokens including those in the cache
    C width   H heads   K key and value heads   D head dimension
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from .configuration_nanotrain import NanotrainConfig

# Until transformers 5.23 the cache was called past_key_values.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class RecentLayer(DynamicLayer):
    """One layer's keys and values, and named tensors (B, ...) of the most recent token."""

    is_croppable = False  # only the latest `recent` is kept

    def __init__(self):
        super().__init__()
        self.recent = {}

    def exchange(self, name, new):
        """Store `new` under `name`; return the previous tensor or None."""
        before = self.recent.get(name)
        self.recent[name] = new
        return before

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        self.recent = {name: value[beam_idx.to(value.device)] for name, value in self.recent.items()}


def norm(x, eps):
    """RMSNorm over the last dimension, without parameters; the result has x's dtype."""
    return F.rms_norm(x, (x.size(-1),), eps=eps).to(x.dtype)


def rotate(x, cos, sin):
    """Rotary embedding of (B, T, H, D): rotates the two halves of D by -theta; cos, sin (B, T, 1, D / 2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


def shift(x, before, begins):
    """x (B, T, ...) shifted by one, with `before` (B, 1, ...) or zeros first; zeros where `begins` (B, T) is true."""
    first = torch.zeros_like(x[:, :1]) if before is None else before
    shifted = torch.cat((first, x[:, :-1]), dim=1)
    return shifted.masked_fill(begins.view(*begins.shape, *[1] * (x.ndim - 2)), 0)


class NanotrainAttention(nn.Module):
    """Causal attention with key offset; some layers add a gated value embedding to the values."""

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        kv_dim = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_dim, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        if layer in config.value_embedding_layers:
            channels = min(config.gate_channels, config.hidden_size)
            self.value_gate = nn.Linear(channels, config.num_key_value_heads, bias=False)

    def forward(self, x, value_embedding, cos, sin, begins, mask, cache):
        """x (B, T, C), value_embedding (B, T, K * D), begins (B, T) bool, mask (B, 1, T, S) bool -> (B, T, C)."""
        B, T, _ = x.shape
        D, eps = self.config.head_dim, self.config.rms_norm_eps
        q, k, v = self.q_proj(x).view(B, T, -1, D), self.k_proj(x).view(B, T, -1, D), self.v_proj(x).view(B, T, -1, D)
        if value_embedding is not None:
            gate = 2 * torch.sigmoid(self.value_gate(x[..., : self.config.gate_channels]))  # (B, T, K)
            v = v + gate.unsqueeze(-1) * value_embedding.view(B, T, -1, D)
        # The low-frequency half of a key's channels comes from the previous token.
        before = None if cache is None else cache.layers[self.layer].exchange("key", k[:, -1:])
        halves, shifted = (keys.view(B, T, -1, 2, D // 2) for keys in (k, shift(k, before, begins)))
        k = torch.cat((halves[..., : D // 4], shifted[..., D // 4 :]), dim=-1).view(B, T, -1, D)
        q, k = norm(rotate(q, cos, sin), eps), norm(rotate(k, cos, sin), eps)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2).to(q.dtype)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        options = {"scale": self.config.attention_gain / math.sqrt(D), "enable_gqa": k.size(1) != q.size(1)}
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and T > 1, **options)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class NanotrainBlock(GradientCheckpointingLayer):
    """Pre-norm transformer block with a ReLU^2 MLP that also mixes in the embedding x0."""

    def __init__(self, config, layer):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.attention = NanotrainAttention(config, layer)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.residual_scale = nn.Parameter(torch.ones(()))
        self.x0_scale = nn.Parameter(torch.zeros(()))

    def forward(self, x, x0, *attention_args):
        """x, x0 (B, T, C) -> (B, T, C). attention_args: the attention's arguments after x."""
        x = self.residual_scale * x + self.x0_scale * x0
        x = x + self.attention(norm(x, self.eps), *attention_args)
        return x + self.down_proj(F.relu(self.up_proj(norm(x, self.eps))).square())


class NanotrainPreTrainedModel(PreTrainedModel):
    """Base class: loading, saving, resizing embeddings."""

    config_class = NanotrainConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NanotrainBlock"]  # noqa: RUF012 - transformers wants a list
    _supports_sdpa = True
    _input_embed_layer = "embedding"

    def _resize_token_embeddings(self, new_num_tokens, pad_to_multiple_of=None, mean_resizing=True):
        tables = getattr(self, "model", self).value_embeddings
        for layer, table in tables.items():
            new = self._get_resized_embeddings(table, new_num_tokens, pad_to_multiple_of, mean_resizing)
            tables[layer] = new.requires_grad_(table.weight.requires_grad)
        return super()._resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)


class NanotrainModel(NanotrainPreTrainedModel):
    """The model without its head."""

    _keys_to_ignore_on_load_unexpected = ["lm_head.weight"]  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.bigram_rows:
            self.bigram_embedding = nn.Embedding(config.bigram_rows, config.hidden_size)
        self.value_embeddings = nn.ModuleDict()
        for layer in config.value_embedding_layers:
            table = nn.Embedding(config.vocab_size, config.num_key_value_heads * config.head_dim)
            self.value_embeddings[str(layer)] = table
        self.blocks = nn.ModuleList(NanotrainBlock(config, layer) for layer in range(config.num_hidden_layers))
        self.backout_scale = nn.Parameter(torch.zeros(()))
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, cache=None, past_key_values=None, **options
    ):
        """input_ids (B, T) int64, attention_mask (B, S) of ones and zeros or None -> last_hidden_state (B, T, C).
        hidden_states on request: normed embeddings, outputs of all blocks but the last, and last_hidden_state.
        """
        given = {name: value for name, value in options.items() if value is not None}
        if input_ids is None or "inputs_embeds" in given:
            raise ValueError("a nanotrain model needs input_ids, not inputs_embeds: it has several embedding tables")
        if given.get("output_attentions", self.config.output_attentions):
            raise ValueError("output_attentions: a nanotrain model does not compute attention matrices")
        cache = past_key_values if cache is None else cache
        use_cache = given.get("use_cache", self.config.use_cache and not self.training)
        if self.gradient_checkpointing and self.training:
            use_cache, cache = False, None
        if use_cache and cache is None:
            cache = DynamicCache()
        if cache is not None:
            _prepare(cache, self.config.num_hidden_layers)
        seen = 0 if cache is None else cache.get_seq_length()
        T, device = input_ids.size(1), input_ids.device
        if position_ids is None and attention_mask is None:
            position_ids = torch.arange(seen, seen + T, device=device)[None]
        elif position_ids is None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, seen:]
        position_ids = position_ids.expand(len(input_ids), T)
        begins = position_ids == 0
        embedded = self.embedding(input_ids)
        if self.config.bigram_rows:
            before = None if cache is None else cache.layers[0].exchange("token", input_ids[:, -1:])
            previous, last = shift(input_ids, before, begins), self.config.bigram_rows - 1
            rows = torch.where(begins, last, ((36313 * input_ids) ^ (27191 * previous)) % last)
            embedded = embedded + self.bigram_embedding(rows)
        x = x0 = norm(embedded, self.config.rms_norm_eps)
        half = self.config.head_dim // 2
        frequencies = self.config.rope_theta ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
        angles = (position_ids[..., None].float() * frequencies)[:, :, None]  # (B, T, 1, D / 2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        mask, states = self._mask(attention_mask, seen, T, device), []
        for layer, block in enumerate(self.blocks):
            states.append(x)
            if layer == len(self.blocks) // 2:
                middle = x
            table = self.value_embeddings[str(layer)] if str(layer) in self.value_embeddings else None
            x = block(x, x0, None if table is None else table(input_ids), cos, sin, begins, mask, cache)
        x = norm(x - self.backout_scale * middle, self.config.rms_norm_eps)
        states = (*states, x) if given.get("output_hidden_states", self.config.output_hidden_states) else None
        return BaseModelOutputWithPast(last_hidden_state=x, hidden_states=states, **{CACHE: cache})

    def _mask(self, attention_mask, seen, length, device):
        """(B or 1, 1, T, S) bool, or None if attention is plainly causal or to all keys."""
        if attention_mask is not None and attention_mask.all():
            attention_mask = None
        if attention_mask is None and (seen == 0 or length == 1):
            return None
        keys = torch.arange(seen + length, device=device)
        queries = keys[seen:, None]
        if attention_mask is None:
            return (keys <= queries)[None, None]
        # padding attends to itself, because an empty row gives NaN
        return (keys <= queries) & attention_mask[:, None, None].bool() | (keys == queries)


class NanotrainForCausalLM(NanotrainPreTrainedModel, GenerationMixin):
    """The model with its head: next-token logits and loss."""

    _tied_weights_keys = {"lm_head.weight": "model.embedding.weight"}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.model = NanotrainModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, labels=None, logits_to_keep=0, **options):
        """input_ids (B, T) int64 -> logits (B, T, V) float32, or of the last `logits_to_keep` positions.
        labels (B, T) int64: the same tokens, -100 to ignore one; adds the mean next-token loss in nats. options: of
        `NanotrainModel.forward` and the loss.
        """
        found = self.model(input_ids, attention_mask, position_ids, return_dict=True, **options)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        bound = self.config.final_logit_softcapping
        logits = bound * torch.tanh(self.lm_head(found.last_hidden_state[:, kept]).float() / bound)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **options)
        caches = {CACHE: getattr(found, CACHE)}
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=found.hidden_states, **caches)


def _prepare(cache, num_layers):
    """Set up a new transformers cache with RecentLayers."""
    if cache.layers and all(isinstance(layer, RecentLayer) for layer in cache.layers):
        return
    if not isinstance(cache, DynamicCache) or cache.get_seq_length():
        raise ValueError(f"a nanotrain model needs a new DynamicCache, not this {type(cache).__name__}")
    cache.layers, cache.layer_class_to_replicate = [RecentLayer() for _ in range(num_layers)], None
