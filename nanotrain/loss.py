"""Softcapped cross-entropy from hidden states to loss, without holding all logits at once.

Rows are processed in chunks. The forward pass also computes the gradient, while the logits of a chunk are in the cache;
the backward pass only scales it (Cut Your Losses, arXiv:2411.09009). The softcap (Gemma 2, arXiv:2408.00118) bounds
logits by `cap`; since it is below 70, exp cannot overflow and no maximum is subtracted.

    N rows, one per token   C width   V vocabulary
"""

from collections.abc import Callable

import torch
from torch import Tensor

Kernel = Callable[[Tensor, float], tuple[Tensor, Tensor]]  # `softmax_gradient`, compiled or not
CHUNK_ROWS = {"cpu": 512}  # rows per chunk by device type: on a CPU their logits must fit into the cache


def softcap(logits: Tensor, cap: float) -> Tensor:
    """Bound logits of any shape smoothly to (-cap, cap)."""
    return cap * torch.tanh(logits / cap)


def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, cap: float) -> Tensor:
    """hidden (N, C), weight (V, C), targets (N,) int64 -> loss in nats of each target, (N,) float32. No gradient."""
    weight, size, losses = weight.to(hidden.dtype), chunk_rows(hidden.device), []
    with torch.autocast(hidden.device.type, enabled=False):
        for rows, row_targets in zip(hidden.split(size), targets.split(size), strict=True):
            capped = _tanh((rows @ weight.t()).float(), cap).mul_(cap)
            of_targets = capped.gather(1, row_targets[:, None]).squeeze(1)
            losses.append(capped.exp_().sum(-1).log() - of_targets)  # in place, as in `softmax_gradient`
    return torch.cat(losses)


def greedy_tokens(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden (N, C), weight (V, C) -> most likely token of each row, (N,) int64; the softcap does not change it."""
    weight = weight.to(hidden.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        return torch.cat([(rows @ weight.t()).argmax(-1) for rows in hidden.split(chunk_rows(hidden.device))])


def mean_loss(hidden: Tensor, weight: Tensor, targets: Tensor, cap: float, kernel: Kernel) -> Tensor:
    """hidden (N, C), weight (V, C), targets (N,) int64 -> mean loss in nats () float32, differentiable. Products run in
    the dtype of `hidden`, sums in float32.
    """
    return _MeanLoss.apply(hidden, weight, targets, cap, kernel)


def softmax_gradient(logits: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """logits (N, V) before the softcap -> (logsumexp of capped rows (N,) float32, gradient of their sum with respect to
    the logits (N, V), in their dtype).
    """
    capped, slope = _softcap_and_slope(logits.float(), cap)
    exps = capped.exp_()  # in place, because eager code spends most of its time on memory
    totals = exps.sum(-1, keepdim=True)
    return totals.squeeze(1).log(), exps.mul_(1 / totals).mul_(slope).to(logits.dtype)  # one division per row


def _loss_and_gradient(logits, targets, cap, kernel):
    """(sum of losses () float32, its gradient with respect to the logits (N, V), in their dtype)"""
    log_totals, gradient = kernel(logits, cap)
    # Target columns separately: comparing every column with the target would double the time of the kernel.
    targets = targets[:, None]
    capped, slope = _softcap_and_slope(logits.gather(1, targets).float(), cap)
    nats = log_totals[:, None] - capped
    gradient.scatter_(1, targets, (((-nats).exp() - 1) * slope).to(gradient.dtype))
    return nats.sum(), gradient


def _softcap_and_slope(logits, cap):
    """`softcap` and its derivative."""
    tanh = _tanh(logits, cap)
    return cap * tanh, tanh.square_().neg_().add_(1)


def _tanh(logits, cap):
    """tanh(logits / cap) as 1 - 2 / (exp + 1), which takes half of tanh's time in eager code, a third in compiled."""
    return (logits * (2 / cap)).exp_().add_(1).reciprocal_().mul_(-2).add_(1)


def chunk_rows(device: torch.device) -> int:
    """Number of rows with logits in memory at once on this device."""
    return CHUNK_ROWS.get(device.type, 4096)  # elsewhere only memory limits them


class _MeanLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, cap, kernel):
        with torch.autocast(hidden.device.type, enabled=False):
            weight_low = weight.to(hidden.dtype)
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            grad_hidden = torch.empty_like(hidden)
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
            size = chunk_rows(hidden.device)
            chunks = zip(hidden.split(size), targets.split(size), grad_hidden.split(size), strict=True)
            for rows, row_targets, row_gradients in chunks:
                loss, grad_logits = _loss_and_gradient(rows @ weight_low.t(), row_targets, cap, kernel)
                total += loss
                torch.mm(grad_logits, weight_low, out=row_gradients)
                grad_weight += grad_logits.t() @ rows
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.count = len(hidden)
        return total / len(hidden)

    @staticmethod
    def backward(ctx, grad_output):
        grad_hidden, grad_weight = ctx.saved_tensors
        # Scale sums, not summands: in float16 with a loss scale, gradients multiplied by 1/N alone would underflow.
        scale = grad_output / ctx.count
        return grad_hidden * scale.to(grad_hidden.dtype), grad_weight * scale, None, None, None
