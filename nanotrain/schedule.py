"""Learning rate, momentum and weight decay as pure functions of progress, so that short runs warm up and cool down too.

Progress is in (0, 1): the middle of step s of N, so that no step has a learning rate of zero.
"""

import math

MOMENTUM_START, MOMENTUM_PEAK, MOMENTUM_END = 0.85, 0.95, 0.90
MOMENTUM_WARMUP = 0.30
BATCH_RAMP = ((0.10, 0.25), (0.22, 0.5))  # (until this progress, this share of the batch)
BATCH_PARTS = 4  # the shares are whole multiples of 1 / BATCH_PARTS


def progress(step, num_steps, from_step=0, from_progress=0.0):
    """Where step 1 <= step <= num_steps stands in the run.

    After `from_step`, where progress was `from_progress`, num_steps was corrected; the rest is spread evenly.
    """
    return from_progress + (1 - from_progress) * (step - from_step - 0.5) / (num_steps - from_step)


def trapezoid(progress, warmup, warmdown, final):
    """Factor of the learning rate: linear up over the first `warmup` of the run, flat, linear down to `final` over the
    last `warmdown`.
    """
    if progress < warmup:
        return progress / warmup
    if progress > 1 - warmdown:
        return final + (1 - final) * (1 - progress) / warmdown
    return 1.0


def cosine(progress, warmup, warmdown, final):
    """Factor of the learning rate: linear up over `warmup`, then half a cosine down to `final`; `warmdown` plays no
    part.
    """
    if progress < warmup:
        return progress / warmup
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def linear(progress, warmup, warmdown, final):
    """Factor of the learning rate: linear up over `warmup`, then linear down to `final`; `warmdown` plays no part."""
    return trapezoid(progress, warmup, 1 - warmup, final)


SHAPES = {"trapezoid": trapezoid, "cosine": cosine, "linear": linear}


def momentum(progress, warmdown):
    """Muon's momentum: up while the gradient's direction still changes fast, a little down as the learning rate
    falls.
    """
    if progress < MOMENTUM_WARMUP:
        return MOMENTUM_START + (MOMENTUM_PEAK - MOMENTUM_START) * progress / MOMENTUM_WARMUP
    begin = max(1 - warmdown, MOMENTUM_WARMUP)
    if progress > begin:
        return MOMENTUM_PEAK + (MOMENTUM_END - MOMENTUM_PEAK) * (progress - begin) / (1 - begin)
    return MOMENTUM_PEAK


def batch_share(progress):
    """Share of the batch early in a run with a ramp, when gradients differ little and small batches lose nothing."""
    return next((share for until, share in BATCH_RAMP if progress < until), 1.0)


def mean_batch_share(begin=0.0):
    """The mean of `batch_share` from the progress `begin` < 1 on: the tokens of that part of a run against those
    without a ramp.
    """
    total, at = 0.0, begin
    for until, share in (*BATCH_RAMP, (1.0, 1.0)):
        if until > at:
            total, at = total + share * (until - at), until
    return total / (1 - begin)


def progress_at(share_of_tokens):
    """The progress at which a run with a ramp has had so large a share of its tokens."""
    left, begin = share_of_tokens * mean_batch_share(), 0.0
    for until, share in BATCH_RAMP:
        if left < share * (until - begin):
            return begin + left / share
        left, begin = left - share * (until - begin), until
    return min(begin + left, 1.0)


def weight_decay(progress, peak):
    """Muon's weight decay: a cosine from `peak` to zero."""
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
