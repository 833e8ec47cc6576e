"""Bits per byte: a loss that does not depend on the tokenizer.

`packed_windows` measure what training minimizes: text packed into sequences, with documents split at sequence ends.
`document_windows` are overlapping windows over whole documents, so the result does not depend on packing either.
`TokenLossStats` finds the texts with the highest and lowest loss.
"""

import codecs
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from nanotrain.dist import DistContext
from nanotrain.errors import DataError
from nanotrain.tokenizer import BPETokenizer


def packed_windows(sequences: np.ndarray) -> np.ndarray:
    """Sequences (N, T + 1) -> windows (N, 2, T) of inputs and targets."""
    return np.stack((sequences[:, :-1], sequences[:, 1:]), axis=1)


def document_windows(documents: Sequence[np.ndarray], bos: int, seq_len: int) -> list[np.ndarray]:
    """Split documents, (n,) int32 token ids without BOS, into (2, 1 to seq_len) int32 arrays of inputs and targets,
    shortest first.

    A window's inputs are BOS and tokens of one document. Windows overlap by half: after the first, every counted target
    has at least half a context of its document before it. Targets counted in an earlier window are replaced by BOS,
    which has no bytes.
    """
    windows, stride = [], max(seq_len // 2, 1)
    for ids in documents:
        done = 0
        while done < len(ids):
            end = min(done + (stride if done else seq_len), len(ids))
            begin = max(end - seq_len, 0)
            targets = np.concatenate((np.full(done - begin, bos), ids[done:end]))
            windows.append(np.stack((np.append(bos, ids[begin : end - 1]), targets)).astype(np.int32))
            done = end
    return sorted(windows, key=lambda window: window.shape[1])


@torch.no_grad()
def bits_per_byte(
    model: nn.Module,
    windows: Sequence[np.ndarray],
    token_bytes: Tensor,
    dist: DistContext,
    batch_size: int,
    progress: Callable[[int], object] = lambda count: None,
    stats: Callable[[Tensor, Tensor], object] = lambda targets, nats: None,
) -> float:
    """Total nats / (ln 2 * total UTF-8 bytes) of the targets of windows, (2, T) int32 each; the same on every rank.

    Special tokens have no bytes and are not counted. `progress` is called with the number of windows in each batch,
    `stats` (see `TokenLossStats.add`) with every token's loss. Sums are float64, so batch size and number of ranks do
    not matter. Raises DataError if the targets have no bytes.
    """
    nats, num_bytes, mine = 0.0, 0, windows[dist.rank :: dist.world_size]
    padding = int(token_bytes.argmin())  # a special token
    for start in range(0, len(mine), batch_size):
        some = mine[start : start + batch_size]
        batch = torch.full((2, len(some), max(window.shape[1] for window in some)), padding)
        for index, window in enumerate(some):
            batch[:, index, : window.shape[1]] = torch.from_numpy(window)
        sizes = token_bytes[batch[1]]
        with dist.autocast():
            losses = model.token_losses(*batch.to(dist.device), counted=(sizes > 0).to(dist.device))
        losses = losses.cpu().double()
        nats += losses.sum().item()
        num_bytes += sizes.sum().item()
        stats(batch[1], losses)
        progress(len(some))
    total_nats, total_bytes = dist.all_reduce_sum([nats, num_bytes])
    if not total_bytes:
        raise DataError("the evaluation text is empty: --data-dir needs a validation shard with text")
    return total_nats / (math.log(2) * total_bytes)


class TokenLossStats:
    """Finds the texts with the most and the fewest bits per byte. A text is the part of one document in one sequence;
    short ones are skipped, because a single token would dominate.
    """

    NUM_TEXTS, MAX_TOKENS = 5, 300  # texts of each kind; tokens per text

    def __init__(self, tokenizer: BPETokenizer):
        self._strings = tokenizer.byte_strings()
        self._sizes = np.array([len(string) for string in self._strings])
        self._texts = []  # (bits per byte, ids, bits per token): the lowest and the highest

    def add(self, targets: Tensor, nats: Tensor) -> None:
        """Add targets (B, T) int64 and their losses (B, T) float64, both on the CPU."""
        bits, ids = nats.numpy() / math.log(2), targets.numpy()
        for sequence, costs in zip(ids, bits, strict=True):
            borders = [-1, *np.flatnonzero(self._sizes[sequence] == 0).tolist(), len(sequence)]
            for before, end in itertools.pairwise(borders):
                tokens, cost = sequence[before + 1 : end], costs[before + 1 : end]
                if len(tokens) >= max(len(sequence) // 4, 1) and np.isfinite(cost).all():
                    bpb = cost.sum().item() / self._sizes[tokens].sum().item()
                    self._texts.append((bpb, tokens[: self.MAX_TOKENS].tolist(), cost[: self.MAX_TOKENS].tolist()))
        self._texts = self._extremes(self._texts)

    def _extremes(self, texts):
        texts, most = sorted(texts), self.NUM_TEXTS
        return texts[:most] + texts[most:][-most:]

    def result(self, dist: DistContext) -> dict:
        """{"documents": {"worst": [...], "best": [...]}} over all ranks, the most extreme text first, each as {"text",
        "bpb", "tokens": [[text, bits], ...]}. A collective operation.
        """
        texts = self._extremes(itertools.chain.from_iterable(dist.all_gather_objects(self._texts)))
        half = len(texts) // 2
        documents = {"worst": texts[half:][::-1], "best": texts[:half]}
        return {"documents": {kind: [self._as_dict(*text) for text in found] for kind, found in documents.items()}}

    def _as_dict(self, bpb, ids, bits):
        """One text as a dict; tokens that share a UTF-8 character are joined."""
        decoder, tokens, pending = codecs.getincrementaldecoder("utf-8")("replace"), [], 0.0
        for place, (token, cost) in enumerate(zip(ids, bits, strict=True)):
            pending += cost
            text = decoder.decode(self._strings[token], final=place == len(ids) - 1)
            if text:
                tokens.append([text, round(pending, 3)])
                pending = 0.0
        return {"text": "".join(text for text, _ in tokens), "bpb": bpb, "tokens": tokens}
