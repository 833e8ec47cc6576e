"""Causal attention for compiled code on CPUs, where the backward pass of torch's own kernel is slow.

Queries and keys of unit RMS bound every score, so exp needs no subtraction of a maximum. The first half of the queries
sees only the first half of the keys, which leaves out most of the masked scores.

    B sequences   T tokens of a sequence   H heads   D head dimension
"""

import torch
from torch import Tensor

LONGEST = 512  # tokens: the backward pass needs the scores, whose memory grows with the square of T
LARGEST_SCORE = 70.0  # a float32 holds its exponential


def is_faster(q: Tensor, k: Tensor, scale: float) -> bool:
    """Whether `attend` can take q, k (B, H, T, D) and is expected to beat torch's kernel."""
    compiled = q.device.type == "cpu" and q.dtype != torch.float16 and torch.compiler.is_compiling()
    return compiled and q.shape == k.shape and 1 < q.size(2) <= LONGEST and scale * q.size(3) < LARGEST_SCORE


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal softmax(scale q k^T) v: q, k, v (B, H, T, D) of one dtype, q and k of unit RMS -> (B, H, T, D)."""
    length, outputs = q.size(2), []
    for start, end in ((0, length // 2), (length // 2, length)):
        scores = q[:, :, start:end] @ k[:, :, :end].mT
        visible = torch.ones(end - start, end, dtype=torch.bool, device=q.device).tril(start)
        exps = torch.where(visible, (scale * scores.float()).exp(), 0.0)
        sums = exps.to(v.dtype) @ v[:, :, :end]
        outputs.append((sums.float() / exps.sum(-1, keepdim=True)).to(v.dtype))
    return torch.cat(outputs, 2)
