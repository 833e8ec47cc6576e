"""Text generation with a KV cache.

Prefill: all but the last token of each prompt in one forward pass. Decode: one forward pass per new token for all
sequences together. The context is at most max_seq_len tokens. A full sequence restarts with its last half
(`context_length`), because sliding the window by one token would change the rotary position of every key.

    B sequences   T tokens of a sequence   K key and value heads   D head dimension   V vocabulary
"""

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanotrain.gpt import GPT, GPTConfig
from nanotrain.tokenizer import BPETokenizer

PROMPTS = ("", "The", "If the", "import os\n", "def __init__(self")  # of `samples`, the first: a new document


def context_length(length: int, max_seq_len: int) -> int:
    """Number of tokens in the context of a text of `length` tokens; does not depend on the prompt's length."""
    if length <= max_seq_len:
        return length
    shortest = max(max_seq_len // 2, 1)
    return shortest + (length - max_seq_len - 1) % (max_seq_len - shortest + 1)


class KVCache:
    """Keys and values (float32) of every layer for `num_sequences` sequences of up to `capacity` tokens.
    Row r holds `lengths[r]` tokens, ending with `last_tokens[r]`. Memory after them is never attended to.
    """

    def __init__(self, config: GPTConfig, num_sequences: int, capacity: int, device: torch.device | str):
        shape = (config.num_layers, 2, num_sequences, capacity, config.num_kv_heads, config.head_dim)
        self.memory = torch.zeros(shape, device=device)  # zeros: a mask does not hide NaN
        self.last_keys = list(self.memory[:, 0, :, :1].clone())  # one (num_sequences, 1, K, D) per layer
        self.capacity = capacity
        self.lengths, self.last_tokens = [0] * num_sequences, [-1] * num_sequences

    def begin(self, rows: Sequence[int], texts: Sequence[Sequence[int]]) -> tuple[Tensor, "NewTokens"]:
        """Set the contents of `rows` to `texts`, lists of ids of any length. Returns (tokens (B, T), NewTokens), padded
        on the right, where only padding attends to it.
        """
        longest = max(1, *map(len, texts))
        for row, text in zip(rows, texts, strict=True):
            self.lengths[row], self.last_tokens[row] = len(text), text[-1] if text else -1
        tokens = self._tensor([text + [0] * (longest - len(text)) for text in texts])
        positions, rows = torch.arange(longest, device=tokens.device)[None], self._tensor(rows)
        slots = rows[:, None] * self.capacity + positions
        previous = F.pad(tokens[:, :-1], (1, 0), value=-1)
        ends = self._tensor([len(text) - 1 for text in texts])
        return tokens, NewTokens(self, positions, previous, slots.flatten(), rows, ends)

    def append(self, tokens: Sequence[int]) -> tuple[Tensor, "NewTokens"]:
        """Append one token to each row. Returns (tokens (B, 1), NewTokens)."""
        seen, mask = max(self.lengths) + 1, None
        slots = self._tensor([row * self.capacity + length for row, length in enumerate(self.lengths)])
        new, positions, previous = self._tensor([tokens, self.lengths, self.last_tokens])[:, :, None]
        if min(self.lengths) + 1 < seen:
            behind = torch.arange(seen, device=positions.device) > positions
            mask = torch.zeros_like(behind, dtype=self.memory.dtype).masked_fill(behind, -torch.inf)[:, None, None]
        self.lengths, self.last_tokens = [length + 1 for length in self.lengths], list(tokens)
        return new, NewTokens(self, positions, previous, slots, seen=seen, mask=mask)

    def _tensor(self, values):
        return torch.tensor(values, device=self.memory.device)


@dataclass(frozen=True)
class NewTokens:
    """New tokens of a cache, as the model's layers see them."""

    cache: KVCache
    positions: Tensor  # (B or 1, T) int64, positions in the sequences
    previous: Tensor  # (B, T) int64, the token before each; -1 at the start of a sequence
    slots: Tensor  # (B * T,) int64, indices into a layer's memory
    # Prefill only, where tokens start their sequences and attend to each other:
    rows: Tensor | None = None  # (B,) int64, rows of the cache
    ends: Tensor | None = None  # (B,) int64, index of each sequence's last token; -1 if all is padding
    # Decode only:
    seen: int = 0  # length of the longest sequence; 0 in prefill
    mask: Tensor | None = None  # (B, 1, 1, seen) float32, -inf after the end of a shorter sequence
    layer: int = 0  # current layer

    def keys_before(self, k: Tensor) -> Tensor | None:
        """Return the last keys (B, 1, K, D) before `k`, None in prefill, and store the last of `k` in their place."""
        last_keys = self.cache.last_keys
        if self.seen:
            before, last_keys[self.layer] = last_keys[self.layer], k
            return before
        ends = k[torch.arange(len(k), device=k.device), self.ends.clamp(min=0)]
        last_keys[self.layer][self.rows] = (ends * (self.ends >= 0)[:, None, None])[:, None]
        return None

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store keys and values (B, T, K, D); return the keys, values and mask to attend with."""
        keys, values = self.cache.memory[self.layer]  # (N, capacity, K, D) each
        keys.flatten(0, 1).index_copy_(0, self.slots, k.flatten(0, 1))
        values.flatten(0, 1).index_copy_(0, self.slots, v.flatten(0, 1))
        return (keys[:, : self.seen], values[:, : self.seen], self.mask) if self.seen else (k, v, None)


def samples(model: GPT, tokenizer: BPETokenizer, num_tokens: int) -> Iterator[tuple[str, str]]:
    """Yield (prompt, continuation) for PROMPTS, with at most `num_tokens` new tokens, ending at BOS."""
    for prompt in PROMPTS:
        tokens = generate(model, [tokenizer.bos, *tokenizer.encode(prompt)], num_tokens, stop=(tokenizer.bos,))
        yield prompt, tokenizer.decode(list(tokens))


def generate(model: GPT, tokens: Sequence[int], max_new_tokens: int, **settings: Any) -> Iterator[int]:
    """Yield the tokens that continue one prompt; settings: see `generate_batch`."""
    for (token,) in generate_batch(model, [tokens], max_new_tokens, **settings):
        yield token


@torch.inference_mode()
def generate_batch(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Collection[int] = (),
) -> Iterator[list[int | None]]:
    """Yield a list with the next token of each prompt, None after a token of `stop`, which is not yielded itself. Ends
    after `max_new_tokens`, or when all texts have ended.

    prompts: token ids, BOS first. Prompt n has its own generator, seeded by seed + n. Other settings: see `pick`.
    """
    assert all(prompts), "a prompt has at least one token, BOS"
    max_seq_len, device = model.config.max_seq_len, model.lm_head.weight.device
    texts, ended = [list(prompt) for prompt in prompts], [False] * len(prompts)
    draws = [random.Random(seed + n) for n in range(len(texts))]
    longest = max(map(len, texts)) + max_new_tokens
    cache = KVCache(model.config, len(texts), min(longest, max_seq_len), device)
    for _ in range(max_new_tokens):
        lengths = [context_length(len(text), max_seq_len) for text in texts]
        stale = [row for row, length in enumerate(lengths) if cache.lengths[row] != length - 1]
        if stale:  # prompts of more than one token, and later full sequences
            tokens, new = cache.begin(stale, [texts[row][-lengths[row] : -1] for row in stale])
            with torch.autocast(device.type, enabled=False):
                model.hidden(tokens, new)
        tokens, new = cache.append([text[-1] for text in texts])
        picked = pick(model.logits(tokens, new)[:, 0], temperature, top_k, top_p, draws)
        ended = [was or token in stop for was, token in zip(ended, picked, strict=True)]
        if all(ended):
            return
        for text, token in zip(texts, picked, strict=True):
            text.append(token)  # even to ended texts: the cache grows in every row
        yield [None if end else token for end, token in zip(ended, picked, strict=True)]


def pick(logits: Tensor, temperature: float, top_k: int, top_p: float, draws: Sequence[random.Random]) -> list[int]:
    """Sample a token id for each row of logits (B, V) float32, with generator draws[n] for row n.

    temperature: divisor of the logits; 0: greedy. top_k: number of most likely tokens to sample from; 0: all.
    top_p: nucleus sampling from the smallest set of these with this total probability, in (0, 1] (arXiv:1904.09751).
    """
    if temperature == 0:
        return logits.argmax(-1).tolist()
    size = logits.size(-1)
    values, tokens = (found.cpu() for found in logits.topk(min(top_k or size, size)))  # most likely first
    weights = ((values - values[:, :1]).double() / temperature).exp()
    before = weights.cumsum(-1) - weights
    weights[before >= top_p * weights.sum(-1, keepdim=True)] = 0.0
    ends = weights.cumsum(-1)
    # 32 bits: the product stays below the total despite rounding
    places = torch.tensor([draw.getrandbits(32) / 2**32 for draw in draws], dtype=torch.float64)[:, None]
    chosen = torch.searchsorted(ends, places * ends[:, -1:], right=True)
    return tokens.gather(-1, chosen).flatten().tolist()
