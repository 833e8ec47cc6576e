"""The model: a decoder with rotary positions, QK-norm, parameter-free RMSNorm, ReLU^2, value embeddings, a hashed
bigram table and an untied, softcapped head.

It knows nothing of optimizers, files or environment variables. `checkpoint.build_model` builds one.

    B sequences   T tokens of a sequence   V vocabulary   C width
    H query heads   K key and value heads   D head dimension
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanotrain import attention, loss

CachedTokens = Any  # new tokens (B, T) that follow those in a cache: engine.NewTokens, which builds on this module
CONSTANTS = ("softcap", "rope_base", "attention_gain", "norm_eps", "gate_channels")  # the rest of a GPTConfig is shape
ROLES = {  # {part of a parameter's name: its role}; the first match counts, and what has none is a "matrix"
    "value_embeddings": "value_embedding",
    "bigram_embedding": "bigram_embedding",
    "embedding": "embedding",
    "lm_head": "unembedding",
    "value_gate": "gate",
    "residual_scale": "residual",
    "_scale": "x0",
}


@dataclass(frozen=True)
class GPTConfig:
    """The shape and the constants of a model: with its weights, all that its output depends on."""

    vocab_size: int
    max_seq_len: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    bigram_rows: int = 0  # of the hashed bigram table; 0: no table
    plain: bool = False  # without what transformers' NanoChatForCausalLM lacks: see `GPT`
    softcap: float = 15.0  # the bound of the logits, below 70 (see `loss`)
    rope_base: float = 10_000.0  # of the rotary frequencies
    attention_gain: float = 1.44  # of the scores, which QK-norm bounds; sharper attention trains better. Plain: 1.0
    norm_eps: float = 1e-6  # added to the mean square in RMSNorm
    gate_channels: int = 16  # of a layer's input, at most: those that the gate of its value embedding sees

    def __post_init__(self) -> None:
        sizes = (self.vocab_size, self.max_seq_len, self.num_layers, self.num_heads, self.num_kv_heads)
        constants = (self.softcap, self.rope_base, self.norm_eps, self.gate_channels)
        if min(sizes) < 1 or min(constants) <= 0 or self.softcap >= 70:
            raise ValueError(f"{self}: a number is out of range")
        if self.plain and self.bigram_rows:
            raise ValueError(f"{self}: a plain model has no bigram table")
        if self.plain:
            object.__setattr__(self, "attention_gain", 1.0)  # frozen

    @property
    def model_dim(self) -> int:
        """C, the width of the residual stream."""
        return self.num_heads * self.head_dim

    def has_value_embedding(self, layer: int) -> bool:
        """Every layer of a shallow model; of a deeper one every other layer, the last included; none of a plain one."""
        return not self.plain and (self.num_layers <= 4 or (self.num_layers - 1 - layer) % 2 == 0)


def norm(x: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, without parameters (arXiv:1910.07467); the result has x's dtype."""
    return F.rms_norm(x, (x.size(-1),), eps=eps).to(x.dtype)  # CUDA's autocast would give float32


def embedding_table(rows: int, width: int, sparse: bool = False) -> nn.Embedding:
    """An nn.Embedding without weights: on the meta device its constructor's draw would import much Python code."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False, sparse=sparse)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (arXiv:2104.09864): the halves of x's D (B, T, H, D) turn by cos, sin ([B,] T, 1, D / 2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


def partial_key_offset(k: Tensor, before: Tensor | None = None) -> Tensor:
    """Partial Key Offset (modded-nanogpt): (B, T, K, D) keys with the low-frequency half of the channels taken from the
    previous position; `before` (B, 1, K, D) supplies those of the first position, None means zeros.

    A key then also encodes the token before its own, so a single layer can find an earlier occurrence of the current
    token and copy its successor (an induction head), which otherwise takes two layers and long training.
    """
    B, T, K, D = k.shape
    halves = k.view(B, T, K, 2, D // 2)  # pairs of channels that rotate together
    slow = halves[..., D // 4 :]
    first = torch.zeros_like(slow[:, :1]) if before is None else before.view(B, 1, K, 2, D // 2)[..., D // 4 :]
    shifted = first if T == 1 else torch.cat((first, slow[:, :-1]), dim=1)
    return torch.cat((halves[..., : D // 4], shifted), dim=-1).view(B, T, K, D)


def bigram_hash(tokens: Tensor, previous: Tensor, rows: int) -> Tensor:
    """tokens, previous (B, T) int64 -> (B, T) int64: the row of the bigram table for each token and the one before
    it; tokens with none before them (previous -1) share the last row.
    """
    return torch.where(previous < 0, rows - 1, ((36313 * tokens) ^ (27191 * previous)) % (rows - 1))


class Attention(nn.Module):
    """Causal attention. The layer's value embedding, gated per head, is added to the values (arXiv:2410.17897)."""

    def __init__(self, config: GPTConfig, has_value_embedding: bool):
        super().__init__()
        self.config = config
        kv_dim = config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.model_dim, config.model_dim, bias=False)
        self.k_proj = nn.Linear(config.model_dim, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.model_dim, kv_dim, bias=False)
        self.o_proj = nn.Linear(config.model_dim, config.model_dim, bias=False)
        if has_value_embedding:
            self.value_gate = nn.Linear(min(config.gate_channels, config.model_dim), config.num_kv_heads, bias=False)

    def forward(
        self, x: Tensor, value_embedding: Tensor | None, cos: Tensor, sin: Tensor, cached: CachedTokens | None
    ) -> Tensor:
        """x (B, T, C), value_embedding (B, T, K * D) or None -> (B, T, C). cached: None if x begins its sequences."""
        (B, T, C), config = x.shape, self.config
        H, K, D = config.num_heads, config.num_kv_heads, config.head_dim
        q = self.q_proj(x).view(B, T, H, D)
        k = self.k_proj(x).view(B, T, K, D)
        v = self.v_proj(x).view(B, T, K, D)
        if value_embedding is not None:
            gate = 2 * torch.sigmoid(self.value_gate(x[..., : config.gate_channels]))  # (B, T, K)
            v = v + gate.unsqueeze(-1) * value_embedding.view(B, T, K, D)
        if not config.plain:
            k = partial_key_offset(k, None if cached is None else cached.keys_before(k))
        q, k = norm(rotate(q, cos, sin), config.norm_eps), norm(rotate(k, cos, sin), config.norm_eps)
        k, v, mask = (k, v, None) if cached is None else cached.extend(k, v)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2).to(q.dtype)
        scale = config.attention_gain / math.sqrt(D)
        if cached is None and attention.is_faster(q, k, scale):
            y = attention.attend(q, k, v, scale)
        else:
            is_causal = T > 1  # one token alone sees all others
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=K != H)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    """One layer: mix in the embedding x0, attend, then the ReLU^2 MLP (arXiv:2109.08668), each on a normed input."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.config = config
        self.attention = Attention(config, config.has_value_embedding(layer))
        self.up_proj = nn.Linear(config.model_dim, 4 * config.model_dim, bias=False)
        self.down_proj = nn.Linear(4 * config.model_dim, config.model_dim, bias=False)
        if not config.plain:
            self.residual_scale = nn.Parameter(torch.empty(()))
            self.x0_scale = nn.Parameter(torch.empty(()))

    def forward(self, x: Tensor, x0: Tensor, *of_attention: Any) -> Tensor:
        """x, x0 (B, T, C) -> (B, T, C). of_attention: what `Attention.forward` takes after x."""
        eps = self.config.norm_eps
        if not self.config.plain:
            x = self.residual_scale.to(x.dtype) * x + self.x0_scale.to(x.dtype) * x0
        x = x + self.attention(norm(x, eps), *of_attention)
        return x + self.down_proj(F.relu(self.up_proj(norm(x, eps))).square())


class GPT(nn.Module):
    """Tokens in, mean loss out; `logits` for everything else.

    A plain one is what transformers' NanoChatForCausalLM computes: without value embeddings, offset keys, sharper
    attention, the bigram table, and the scalars that mix earlier states of the stream into later ones.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        C, kv_dim = config.model_dim, config.num_kv_heads * config.head_dim
        self.embedding = embedding_table(config.vocab_size, C)
        if config.bigram_rows:
            # a step touches few rows of it, so the gradient is sparse (see RowwiseAdam)
            self.bigram_embedding = embedding_table(config.bigram_rows, C, sparse=True)
        self.value_embeddings = nn.ModuleDict()
        for layer in filter(config.has_value_embedding, range(config.num_layers)):
            self.value_embeddings[str(layer)] = embedding_table(config.vocab_size, kv_dim)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        if not config.plain:
            self.backout_scale = nn.Parameter(torch.empty(()))
        self.lm_head = nn.Linear(C, config.vocab_size, bias=False)
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(config.max_seq_len, 1, config.head_dim // 2), persistent=False)
        self.loss_kernel = loss.softmax_gradient
        self.recompute_blocks = False  # in the backward pass: less memory, more work, the same bits (arXiv:1604.06174)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Set every parameter and buffer. The same seed gives the same CPU weights whatever the device."""
        self.init_buffers()
        generator = torch.Generator().manual_seed(seed)

        def uniform(parameter, low, high):
            parameter.copy_(torch.empty(parameter.shape).uniform_(low, high, generator=generator))

        def normal(parameter, std):
            parameter.copy_(torch.empty(parameter.shape).normal_(0, std, generator=generator))

        std = self.config.model_dim**-0.5
        bound, small_bound = math.sqrt(3) * std, math.sqrt(3) * (0.4 * std)
        normal(self.embedding.weight, 0.8)
        if self.config.bigram_rows:
            self.bigram_embedding.weight.zero_()
        normal(self.lm_head.weight, 0.001)
        for table in self.value_embeddings.values():
            uniform(table.weight, -bound, bound)
        for layer, block in enumerate(self.blocks):
            attention = block.attention
            for matrix in (attention.q_proj, attention.k_proj, attention.v_proj):
                uniform(matrix.weight, -bound, bound)
            uniform(block.up_proj.weight, -small_bound, small_bound)
            attention.o_proj.weight.zero_()  # each layer begins as the identity
            block.down_proj.weight.zero_()
            if hasattr(attention, "value_gate"):
                uniform(attention.value_gate.weight, 0, 0.02)
            if not self.config.plain:
                place = layer / max(self.config.num_layers - 1, 1)
                block.residual_scale.fill_(1.15 - 0.10 * place)
                block.x0_scale.fill_(0.20 - 0.15 * place)
        if not self.config.plain:
            self.backout_scale.fill_(0.2)

    @torch.no_grad()
    def init_buffers(self) -> None:
        """Set the cosines and sines of the rotation, which no checkpoint holds."""
        half = self.config.head_dim // 2
        frequencies = self.config.rope_base ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.arange(self.config.max_seq_len, dtype=torch.float64)[:, None] * frequencies
        self.cos.copy_(angles.cos()[:, None])
        self.sin.copy_(angles.sin()[:, None])

    def compile_parts(self) -> None:
        """Compile every block and the loss by itself: one graph serves all layers, so compiling takes seconds."""
        for block in self.blocks:
            block.compile(dynamic=False)
        self.loss_kernel = torch.compile(loss.softmax_gradient, dynamic=False)

    def eagerly(self) -> AbstractContextManager:
        """Context in which the model runs without compiled code."""
        is_compiled = self.loss_kernel is not loss.softmax_gradient
        return torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()  # the former imports a lot

    def hidden(self, tokens: Tensor, cached: CachedTokens | None = None) -> Tensor:
        """(B, T) int64 -> (B, T, C), the normed input of the head. cached: None if the tokens begin their sequences."""
        T = tokens.size(1)
        if T > self.config.max_seq_len:
            raise ValueError(f"{T} tokens, but this model's max_seq_len is {self.config.max_seq_len}")
        device = tokens.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.embedding.weight.dtype
        positions = slice(T) if cached is None else cached.positions
        cos, sin = self.cos[positions].to(dtype), self.sin[positions].to(dtype)
        embedded = self.embedding(tokens)
        if self.config.bigram_rows:  # hashed n-grams, as in Over-Tokenized Transformers (arXiv:2501.16975)
            previous = F.pad(tokens[:, :-1], (1, 0), value=-1) if cached is None else cached.previous
            embedded = embedded + self.bigram_embedding(bigram_hash(tokens, previous, self.config.bigram_rows))
        x0 = norm(embedded, self.config.norm_eps).to(dtype)
        x = x0.clone()  # torch.compile makes a second graph for a block that gets one tensor twice
        for layer, block in enumerate(self.blocks):
            if layer == len(self.blocks) // 2:
                middle = x
            table = self.value_embeddings[str(layer)] if str(layer) in self.value_embeddings else None
            of_layer = None if cached is None else replace(cached, layer=layer)
            arguments = (x, x0, None if table is None else table(tokens).to(dtype), cos, sin, of_layer)
            if self.recompute_blocks:  # from outside, so that a compiled block runs the same code twice
                block = partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)
            x = block(*arguments)
        if not self.config.plain:
            x = x - self.backout_scale.to(dtype) * middle
        return norm(x, self.config.norm_eps)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """inputs, targets (B, T) int64 -> () float32, the mean loss in nats per token."""
        hidden = self.hidden(inputs).flatten(0, 1)
        return loss.mean_loss(hidden, self.lm_head.weight, targets.flatten(), self.config.softcap, self.loss_kernel)

    @torch.no_grad()
    def token_losses(self, inputs: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
        """inputs, targets (B, T) int64, counted (B, T) bool -> (B, T) float32: the loss of each counted target in nats,
        0 for the others.
        """
        losses, hidden = torch.zeros(targets.shape, device=targets.device), self.hidden(inputs)[counted]
        losses[counted] = loss.token_losses(hidden, self.lm_head.weight, targets[counted], self.config.softcap)
        return losses

    @torch.no_grad()
    def logits(self, tokens: Tensor, cached: CachedTokens | None = None) -> Tensor:
        """(B, T) int64 -> (B, T, V) float32, computed in float32 without autocast. cached: as for `hidden`."""
        with torch.autocast(tokens.device.type, enabled=False):
            return loss.softcap(F.linear(self.hidden(tokens, cached), self.lm_head.weight), self.config.softcap)

    def parameters_by_role(self) -> dict[str, dict[str, nn.Parameter]]:
        """{role: {name: parameter}}, each parameter in one role: matrix or one of ROLES."""
        roles = {}
        for name, parameter in self.named_parameters():
            role = next((role for part, role in ROLES.items() if part in name), "matrix")
            roles.setdefault(role, {})[name] = parameter
        return roles

    def parameter_counts(self) -> dict[str, int]:
        """{role: number of weights} of `parameters_by_role`."""
        return {role: sum(p.numel() for p in named.values()) for role, named in self.parameters_by_role().items()}
