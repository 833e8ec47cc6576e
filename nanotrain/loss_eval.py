"""Bits per byte: the loss in a unit that does not depend on the tokenizer.

There are two of it. That of rows measures what training minimizes: text packed into rows, documents cut where a row
ends. That of documents shows the model each document from its beginning, in windows that overlap, which makes it
comparable across packings and batches as well.

`Details` keeps where the loss of rows is: in which text, and in how many tokens how much of it.
"""

import codecs
import itertools
import math

import numpy as np
import torch

from nanotrain.errors import DataError


def bits_per_byte(model, rows, token_bytes, runtime, batch_size, progress=None, details=None):
    """Sum of nats / (ln 2 x UTF-8 bytes of the targets) over `rows` (N, T + 1) int32, the same on every rank.

    The rows are dealt to the ranks by index; targets without bytes (special tokens) count in neither sum. `progress`
    is called with the number of rows done, `details` (see `Details.add`) with the loss of every token. Sums are
    float64, so batch size and rank count change nothing that matters. Raises DataError if no target has any bytes.
    """
    mine = rows[runtime.rank :: runtime.world_size]
    batches = (mine[start : start + batch_size] for start in range(0, len(mine), batch_size))
    batches = ((batch[:, :-1], batch[:, 1:]) for batch in batches)
    return _bits_per_byte(model, batches, token_bytes, runtime, progress, details)


def document_bits_per_byte(model, windows, token_bytes, runtime, batch_size, progress=None):
    """The same over `windows` (see `document_windows`), where every token of a document is counted exactly once."""
    bos = windows[0][0, 0]
    mine = windows[runtime.rank :: runtime.world_size]

    def batches():
        for start in range(0, len(mine), batch_size):
            some = mine[start : start + batch_size]
            batch = np.full((2, len(some), max(window.shape[1] for window in some)), bos, dtype=np.int32)
            for row, window in enumerate(some):
                batch[:, row, : window.shape[1]] = window
            yield batch

    return _bits_per_byte(model, batches(), token_bytes, runtime, progress)


def document_windows(documents, bos, seq_len):
    """Token ids of documents, each a (n,) int32 array without BOS, -> a list of (2, 1 to seq_len) int32 arrays of
    inputs and targets, shortest first.

    A window is BOS and up to seq_len tokens of one document. Windows overlap by half: after the first one, every target
    that counts has at least half a context of its document before it. The targets that an earlier window has counted
    are BOS, which has no bytes.
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
def _bits_per_byte(model, batches, token_bytes, runtime, progress, details=None):
    """batches: of this rank, each (inputs, targets), both (B, T) int32."""
    nats, num_bytes = 0.0, 0
    for batch in batches:
        inputs, targets = (torch.tensor(part, dtype=torch.int64, device=runtime.device) for part in batch)
        with runtime.autocast():
            losses = model.token_losses(inputs, targets)
        losses, sizes = losses.cpu().double(), token_bytes[targets.cpu()]
        nats += losses[sizes > 0].sum().item()
        num_bytes += sizes.sum().item()
        if details:
            details(targets.cpu(), losses)
        if progress:
            progress(len(inputs))
    total_nats, total_bytes = runtime.sum([nats, num_bytes])
    if not total_bytes:
        raise DataError(
            "the text to evaluate on has no bytes: give --data-dir a data set whose validation shard has text"
        )
    return total_nats / (math.log(2) * total_bytes)


class Details:
    """Where the loss of rows is: the texts that cost most and least for their bytes, and how many tokens cost how many
    bits.

    A text is what a row holds of one document. The shortest do not count, in which a single token decides.
    """

    NUM_TEXTS, MAX_TOKENS = 5, 300  # kept of each kind, and of each of them
    EDGES = tuple(number / 4 for number in range(81))  # bits, of the histogram; what is beyond counts at its end

    def __init__(self, tokenizer):
        self._strings = tokenizer.byte_strings()
        self._sizes = np.array([len(string) for string in self._strings])
        self._counts = np.zeros(len(self.EDGES) - 1)
        self._texts = []  # (bits per byte, ids, bits of each), the best first

    def add(self, targets, nats):
        """targets (B, T) int64 and the loss of each, (B, T) float64, both on the CPU."""
        bits, ids = nats.numpy() / math.log(2), targets.numpy()
        special = self._sizes[ids] == 0
        finite = bits[~special & np.isfinite(bits)]
        self._counts += np.histogram(finite.clip(self.EDGES[0], self.EDGES[-1]), self.EDGES)[0]
        for row, costs, ends in zip(ids, bits, special, strict=True):
            borders = [-1, *np.flatnonzero(ends).tolist(), len(row)]
            for before, end in itertools.pairwise(borders):
                self._keep(row[before + 1 : end], costs[before + 1 : end], max(len(row) // 4, 1))

    def _keep(self, ids, bits, least):
        if len(ids) < least or not np.isfinite(bits).all():
            return
        bpb = bits.sum().item() / self._sizes[ids].sum().item()
        self._texts.append((bpb, ids[: self.MAX_TOKENS].tolist(), bits[: self.MAX_TOKENS].tolist()))
        if len(self._texts) > 100 * self.NUM_TEXTS:
            self._texts = self._ends(self._texts)

    def _ends(self, texts):
        ordered = sorted(texts)
        return ordered if len(ordered) <= 2 * self.NUM_TEXTS else ordered[: self.NUM_TEXTS] + ordered[-self.NUM_TEXTS :]

    def result(self, runtime):
        """What all ranks have found, as a JSON-like dict, on every rank.

        documents: {"worst", "best"}, each a list of {"text", "bpb", "tokens": [[text, bits], ...]}, the extreme one
        first; of a long text the first MAX_TOKENS tokens. token_bits: {"edges": (n + 1) in bits, "counts": (n)}.
        """
        counts = runtime.sum(self._counts.tolist())
        texts = sorted(itertools.chain.from_iterable(runtime.gather(self._ends(self._texts))))
        half = min(self.NUM_TEXTS, -(-len(texts) // 2))
        worst = [self._described(*text) for text in texts[::-1][:half]]
        best = [self._described(*text) for text in texts[: min(self.NUM_TEXTS, len(texts) - half)]]
        return {
            "documents": {"worst": worst, "best": best},
            "token_bits": {"edges": list(self.EDGES), "counts": [int(count) for count in counts]},
        }

    def _described(self, bpb, ids, bits):
        """Tokens that are only parts of a character are joined until it is whole."""
        decoder, tokens, pending = codecs.getincrementaldecoder("utf-8")("replace"), [], 0.0
        for place, (token, cost) in enumerate(zip(ids, bits, strict=True)):
            pending += cost
            text = decoder.decode(self._strings[token], final=place == len(ids) - 1)
            if text:
                tokens.append([text, round(pending, 3)])
                pending = 0.0
        return {"text": "".join(text for text, _ in tokens), "bpb": bpb, "tokens": tokens}
