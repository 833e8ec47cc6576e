"""Softcapped cross-entropy from hidden states to loss, without ever holding all logits.

Rows are visited in chunks small enough for a cache; the gradient of a chunk is formed in the same visit, while its
logits are warm (the idea of Cut Your Losses, arXiv:2411.09009). The softcap (Gemma 2, arXiv:2408.00118) bounds every
logit by SOFTCAP, so that exp needs no subtraction of a maximum.

    N rows (tokens)   C width   V vocabulary
"""

import torch

SOFTCAP = 15.0
CHUNK_ROWS = {"cpu": 512}  # by device type: so many rows' logits fit a CPU's cache
LARGE_CHUNK_ROWS = 4096  # elsewhere only memory counts


def softcap(logits):
    """Any shape -> the same: logits bounded smoothly to (-SOFTCAP, SOFTCAP)."""
    return SOFTCAP * torch.tanh(logits / SOFTCAP)


def token_losses(hidden, weight, targets):
    """hidden (N, C), weight (V, C), targets (N,) int64 -> (N,) float32 nats of each target. No gradient."""
    losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    weight = weight.to(hidden.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in _chunks(hidden):
            capped = softcap((hidden[rows] @ weight.t()).float())
            losses[rows] = capped.exp().sum(-1).log() - capped.gather(1, targets[rows, None]).squeeze(1)
    return losses


def greedy_tokens(hidden, weight):
    """hidden (N, C), weight (V, C) -> (N,) int64, the likeliest token of each, capped or not. No gradient."""
    tokens = torch.empty(len(hidden), dtype=torch.int64, device=hidden.device)
    weight = weight.to(hidden.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in _chunks(hidden):
            tokens[rows] = (hidden[rows] @ weight.t()).argmax(-1)
    return tokens


def mean_loss(hidden, weight, targets, chunk_kernel):
    """hidden (N, C), weight (V, C), targets (N,) int64 -> () float32, the mean nats per target, differentiable.

    chunk_kernel: `loss_and_gradient`, compiled or not. Products run in hidden's dtype, sums in float32.
    """
    return _MeanLoss.apply(hidden, weight, targets, chunk_kernel)


def loss_and_gradient(logits, targets):
    """logits (N, V) before the cap, targets (N,) -> (sum of nats () float32, gradient of that sum by the logits (N, V)
    in their dtype).
    """
    capped = softcap(logits.float())
    exps = capped.exp()
    totals = exps.sum(-1, keepdim=True)
    hit = torch.arange(logits.size(1), device=logits.device) == targets[:, None]
    loss = (totals.squeeze(1).log() - torch.where(hit, capped, 0.0).sum(-1)).sum()
    slope = 1.0 - (capped / SOFTCAP).square()  # of the cap
    gradient = (exps / totals - hit.float()) * slope
    return loss, gradient.to(logits.dtype)


def _chunks(hidden):
    size = CHUNK_ROWS.get(hidden.device.type, LARGE_CHUNK_ROWS)
    return [slice(start, start + size) for start in range(0, len(hidden), size)]


class _MeanLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk_kernel):
        with torch.autocast(hidden.device.type, enabled=False):
            weight_low = weight.to(hidden.dtype)
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            wanted = any(ctx.needs_input_grad)
            grad_hidden = torch.empty_like(hidden) if wanted else None
            grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted else None
            for rows in _chunks(hidden):
                loss, grad_logits = chunk_kernel(hidden[rows] @ weight_low.t(), targets[rows])
                total += loss
                if wanted:
                    torch.mm(grad_logits, weight_low, out=grad_hidden[rows])
                    grad_weight += grad_logits.t() @ hidden[rows]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.count = len(hidden)
        return total / len(hidden)

    @staticmethod
    def backward(ctx, grad_output):
        grad_hidden, grad_weight = ctx.saved_tensors
        # The sums are scaled only here: with float16 and a loss scale, 1/N alone would underflow.
        scale = grad_output / ctx.count
        return grad_hidden * scale.to(grad_hidden.dtype), grad_weight * scale, None, None
