"""Bits per byte: the loss in a unit that does not depend on the tokenizer."""

import math

import torch


@torch.no_grad()
def bits_per_byte(model, rows, token_bytes, runtime, batch_rows, progress=None):
    """Sum of nats / (ln 2 x UTF-8 bytes of the targets) over `rows` (N, T + 1) int32, the same on every rank.

    The rows are dealt to the ranks by index; targets without bytes (special tokens) count in neither sum. `progress`
    is called with the number of rows done. Sums are float64, so batch size and rank count change nothing that matters.
    """
    mine = rows[runtime.rank :: runtime.world_size]
    nats, num_bytes = 0.0, 0
    for start in range(0, len(mine), batch_rows):
        batch = torch.from_numpy(mine[start : start + batch_rows]).to(runtime.device, torch.int64)
        targets = batch[:, 1:].contiguous()
        with runtime.autocast():
            losses = model.token_losses(batch[:, :-1].contiguous(), targets)
        losses, sizes = losses.cpu().double(), token_bytes[targets.cpu()]
        nats += losses[sizes > 0].sum().item()
        num_bytes += sizes.sum().item()
        if progress:
            progress(len(batch))
    total_nats, total_bytes = runtime.sum([nats, num_bytes])
    return total_nats / (math.log(2) * total_bytes)
