"""Bits per byte: the loss in a unit that does not depend on the tokenizer.

There are two of it. That of rows measures what training minimizes: text packed into rows, documents cut where a row
ends. That of documents begins each at BOS, which makes it comparable across packings and batches as well.
"""

import math

import numpy as np
import torch

from nanotrain.errors import DataError


def bits_per_byte(model, rows, token_bytes, runtime, batch_rows, progress=None):
    """Sum of nats / (ln 2 x UTF-8 bytes of the targets) over `rows` (N, T + 1) int32, the same on every rank.

    The rows are dealt to the ranks by index; targets without bytes (special tokens) count in neither sum. `progress`
    is called with the number of rows done. Sums are float64, so batch size and rank count change nothing that matters.
    Raises DataError if no target has any bytes.
    """
    mine = rows[runtime.rank :: runtime.world_size]
    batches = (mine[start : start + batch_rows] for start in range(0, len(mine), batch_rows))
    return _bits_per_byte(model, batches, token_bytes, runtime, progress)


def document_bits_per_byte(model, windows, token_bytes, runtime, batch_rows, progress=None):
    """The same over `windows` (see `document_windows`), where every token of a document is a target exactly once."""
    bos = windows[0][0]
    mine = windows[runtime.rank :: runtime.world_size]

    def batches():
        for start in range(0, len(mine), batch_rows):
            some = mine[start : start + batch_rows]
            batch = np.full((len(some), max(map(len, some))), bos, dtype=np.int32)  # BOS has no bytes: not counted
            for row, window in zip(batch, some, strict=True):
                row[: len(window)] = window
            yield batch

    return _bits_per_byte(model, batches(), token_bytes, runtime, progress)


def document_windows(documents, bos, seq_len):
    """Token ids of documents, each a (n,) int32 array without BOS, -> a list of (1 to seq_len + 1,) int32 arrays,
    shortest first: consecutive windows of at most seq_len tokens of one document, each after a BOS.
    """
    windows = [
        np.concatenate(([bos], ids[start : start + seq_len]), dtype=np.int32)
        for ids in documents
        for start in range(0, len(ids), seq_len)
    ]
    return sorted(windows, key=len)


@torch.no_grad()
def _bits_per_byte(model, batches, token_bytes, runtime, progress):
    """batches: of this rank, each (B, T + 1) int32."""
    nats, num_bytes = 0.0, 0
    for batch in batches:
        batch = torch.from_numpy(batch).to(runtime.device, torch.int64)
        targets = batch[:, 1:].contiguous()
        with runtime.autocast():
            losses = model.token_losses(batch[:, :-1].contiguous(), targets)
        losses, sizes = losses.cpu().double(), token_bytes[targets.cpu()]
        nats += losses[sizes > 0].sum().item()
        num_bytes += sizes.sum().item()
        if progress:
            progress(len(batch))
    total_nats, total_bytes = runtime.sum([nats, num_bytes])
    if not total_bytes:
        raise DataError(
            "the text to evaluate on has no bytes: give --data-dir a data set whose validation shard has text"
        )
    return total_nats / (math.log(2) * total_bytes)
