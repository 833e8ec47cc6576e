"""Causal attention for CPUs, compiled: torch's own backward pass is slow there.

Queries are visited in segments, so that most of the masked half of the scores is never computed. Queries and keys have
unit RMS, which bounds every score: exp needs no subtraction of a maximum, and the sums are divided out at the end.

    B sequences   T tokens of a sequence   H heads   D head dimension   S queries of a segment
"""

import torch
from torch import Tensor

SEGMENT = 128  # queries
LONGEST = 512  # tokens: the probabilities are kept for the backward pass, and their memory grows with T
LARGEST_SCORE = 70.0  # whose exponential a float32 holds


def is_faster(q: Tensor, k: Tensor, scale: float) -> bool:
    """Whether `attend` can take q, k (B, H, T, D), whose rows have unit RMS, and beats torch's own kernel."""
    compiled = q.device.type == "cpu" and q.dtype != torch.float16 and torch.compiler.is_compiling()
    return compiled and q.shape == k.shape and 1 < q.size(2) <= LONGEST and scale * q.size(3) < LARGEST_SCORE


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q, k, v (B, H, T, D) of one dtype -> (B, H, T, D): softmax(scale q k^T) v, causal. Rows of q, k have unit RMS."""
    return _Attend.apply(q, k, v, scale)


def _segments(length):
    return [(start, min(start + SEGMENT, length)) for start in range(0, length, SEGMENT)]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale):
        outputs, exponentials, totals = [], [], []
        for start, end in _segments(q.size(2)):
            scores = (q[:, :, start:end] @ k[:, :, :end].mT).float()
            visible = torch.ones(end - start, end, dtype=torch.bool, device=q.device).tril(start)
            exps = torch.where(visible, (scale * scores).exp(), 0.0)  # (B, H, S, end)
            totals.append(exps.sum(-1, keepdim=True))
            exponentials.append(exps.to(q.dtype))
            outputs.append(((exponentials[-1] @ v[:, :, :end]).float() / totals[-1]).to(q.dtype))
        output = torch.cat(outputs, 2)
        ctx.save_for_backward(q, k, v, output, torch.cat(totals, 2), *exponentials)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx, grad_output):
        q, k, v, output, totals, *exponentials = ctx.saved_tensors
        grad_sums = grad_output.float() / totals  # with respect to exponentials @ v
        means = (grad_sums * output.float()).sum(-1, keepdim=True)
        grad_sums = grad_sums.to(q.dtype)
        grad_q, grad_k, grad_v = [], torch.zeros_like(k), torch.zeros_like(v)
        for (start, end), exps in zip(_segments(q.size(2)), exponentials, strict=True):
            grad_exps = (grad_sums[:, :, start:end] @ v[:, :, :end].mT).float() - means[:, :, start:end]
            grad_scores = (exps.float() * grad_exps * ctx.scale).to(q.dtype)
            grad_q.append(grad_scores @ k[:, :, :end])
            grad_k[:, :, :end] += grad_scores.mT @ q[:, :, start:end]
            grad_v[:, :, :end] += exps.mT @ grad_sums[:, :, start:end]
        return torch.cat(grad_q, 2), grad_k, grad_v, None
