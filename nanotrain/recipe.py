"""Every number that follows from a model's depth, the token budget and the kind of device, an estimate of memory, and
the schedules of learning rate, momentum, weight decay and batch.

Pure arithmetic: no torch, no environment, no files, so a plan can be tested and printed before anything is allocated.

Two recipes are known to work: SMALL, measured here, and LARGE, published. Learning rates pass through both and go from
one to the other as a power of the training tokens; between them and beyond they are an assumption.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from nanotrain.errors import UserError

if TYPE_CHECKING:
    from nanotrain.gpt import GPTConfig


@dataclass(frozen=True)
class Anchor:
    """A recipe that works at one batch and one number of training tokens."""

    tokens: float
    batch: int  # tokens of an optimizer step
    matrix_lr: float
    embedding_lr: float  # at REFERENCE_WIDTH, as the next one
    unembedding_lr: float
    scalar_lr: float
    momentum_peak: float
    final_lr_frac: float
    decay_exponent: float  # rate x decay x steps: weights without gradients would shrink by exp of it


SMALL = Anchor(3e6, 4096, 0.04, 0.35, 0.005, 0.05, 0.95, 0.03, 0.0)  # depth 2 to 4, minutes on a CPU (dev/rates.md)
LARGE = Anchor(1.4e9, 2**19, 0.02, 0.3, 0.008, 0.5, 0.97, 0.05, 15.0)  # nanochat's, published for depth 12 to 26
RATES = ("matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr")
REFERENCE_WIDTH = 768
MOST_OF_RATE = 2.0  # times the larger anchor: no batch asks for more
BATCH_EXPONENT = 0.383  # of the batch in the training tokens (arXiv:2505.13738)
MAX_BATCH = 2**20
WARMUP_STEPS, WARMUP_SHARE = 40, 0.04  # the fewer of both, as a fraction of the run
MOMENTUM_WARMUP_STEPS, MOMENTUM_WARMUP_SHARE = 400, 0.30  # likewise
MOMENTUM_START, MOMENTUM_END = 0.85, 0.90
WARMDOWN_SHARE = 0.65

# Compute-optimal number of weights in matrices and head as a power law of the training FLOPs, through our best CPU runs
# (dev/ladder.md) and nanochat's published optimum.
OPTIMUM_FLOPS, OPTIMUM_WEIGHTS = 7.2e13, 3.0e6
OPTIMUM_EXPONENT = math.log(129e6 / OPTIMUM_WEIGHTS) / math.log(1e18 / OPTIMUM_FLOPS)
WIDTH_PER_LAYER, LEAST_WIDTH, MOST_LAYERS, DEFAULT_DEPTH = 64, 256, 32, 4
EFFICIENCY = 0.9  # training FLOP/s, with all overhead, as a fraction of the measured `training_flops_per_second`
START_SECONDS = 20.0  # of a timed run not spent training: imports, compilation, evaluations, the last save

# A CPU process needs more than its tensors (dev/LOG.md): what torch loads, and fragmentation of the heap.
LOADED_BYTES, HEAP = 150e6, 2.0

BATCH_RAMP = ((0.10, 0.25), (0.22, 0.5))  # (until this progress, this fraction of the batch)
BATCH_PARTS = 4  # the fractions are whole multiples of 1 / BATCH_PARTS


# ---- model shape ----


class Sizes(NamedTuple):
    """What follows from the width of a model."""

    vocab_size: int
    seq_len: int  # tokens of a sequence
    rope_base: float  # of the rotary frequencies
    bigram_rows: int  # of the hashed bigram table; 0: no table
    spectral_tokens: int  # to count for bigram init; 0: random init


# Up to this width. The first line was measured here (dev/ladder.md), the last is nanochat's. The tables, which take no
# matrix product, pay most in small models; beyond width 512 nobody has shown here that they do.
SIZES = {
    256: Sizes(4096, 256, 10_000.0, 65536, 2_000_000),
    384: Sizes(8192, 256, 10_000.0, 65536, 2_000_000),
    512: Sizes(8192, 512, 10_000.0, 65536, 2_000_000),
    640: Sizes(16384, 1024, 10_000.0, 0, 0),
    math.inf: Sizes(32768, 2048, 100_000.0, 0, 0),
}


def sizes(width: int) -> Sizes:
    """The Sizes of a model of this width."""
    return next(found for most, found in SIZES.items() if width <= most)


def training_flops(minutes: float, flops_per_second: float) -> float:
    """FLOPs available for training in a run of `minutes` from process start to the last save."""
    seconds = 60 * minutes
    return max(seconds - START_SECONDS, seconds / 2) * flops_per_second


def choose_depth(flops: float, head_dim: int, aspect_ratio: int = 0) -> int:
    """The depth whose weight count is closest to the compute optimum for `flops`."""
    goal = OPTIMUM_WEIGHTS * (flops / OPTIMUM_FLOPS) ** OPTIMUM_EXPONENT

    def distance(depth: int) -> float:
        width, _ = model_width(depth, aspect_ratio, head_dim)
        return abs(math.log(num_weights(depth, width) / goal))

    return min(range(2, MOST_LAYERS + 1), key=distance)


def num_weights(depth: int, width: int) -> int:
    """Weights in the matrices and the head of a model with the vocabulary of its width."""
    return 12 * depth * width**2 + sizes(width).vocab_size * width


def model_width(depth: int, aspect_ratio: int, head_dim: int) -> tuple[int, int]:
    """(width, heads): width = depth * aspect_ratio, or the default rule if that is 0, rounded up to whole heads."""
    if depth < 1 or aspect_ratio < 0 or head_dim < 2 or head_dim % 2:
        given = f"--depth={depth} --aspect-ratio={aspect_ratio} --head-dim={head_dim}"
        raise UserError(f"{given}: all must be positive, and the head dimension even")
    width = depth * aspect_ratio or max(depth * WIDTH_PER_LAYER, LEAST_WIDTH)
    heads = math.ceil(width / head_dim)
    return heads * head_dim, heads


def training_flops_per_token(weights: int, depth: int, width: int, seq_len: int) -> int:
    """FLOPs per token, forward and backward: 6 per matrix and head weight, and attention (PaLM, arXiv:2204.02311)."""
    return 6 * weights + 12 * depth * width * seq_len


# ---- batch ----


def batch_tokens(training_tokens: float, seq_len: int, world_size: int, on_gpu: bool, parts: int = 1) -> int:
    """Tokens per optimizer step, in `parts` of whole sequences on every rank, near a power of two.

    On GPUs it grows from LARGE, which keeps many of them busy; on a CPU, where a smaller batch takes less time, from
    SMALL.
    """
    anchor = LARGE if on_gpu else SMALL
    ideal = anchor.batch * (training_tokens / anchor.tokens) ** BATCH_EXPONENT
    ideal = 2 ** round(math.log2(min(max(ideal, SMALL.batch), MAX_BATCH)))
    unit = seq_len * world_size * parts
    return max(round(ideal / unit), 1) * unit


def split_batch(
    total_batch_size: int, seq_len: int, max_device_batch_size: int, world_size: int, parts: int = 1
) -> tuple[int, int]:
    """(device_batch_size, grad_accum_steps) of a step of `total_batch_size` tokens.

    device_batch_size is in sequences: the largest up to the maximum that cuts a rank's share into `parts` equal parts
    of whole forward passes. Raises UserError, naming a size that works, if the total does not divide.
    """
    unit = seq_len * world_size * parts
    if total_batch_size % unit or total_batch_size < 1:
        factors = f"{world_size} ranks x {seq_len} tokens" + (f" x {parts} parts of a ramp" if parts > 1 else "")
        works = f"{max(round(total_batch_size / unit), 1) * unit} is one"
        raise UserError(f"--total-batch-size={total_batch_size} is no multiple of {unit} ({factors}): {works}")
    share = total_batch_size // unit
    fitting = next(size for size in range(min(max_device_batch_size, share), 0, -1) if share % size == 0)
    return fitting, parts * share // fitting


# ---- memory ----


@dataclass(frozen=True)
class ActivationPolicy:
    """How the forward pass runs, as far as it decides which activations stay in memory."""

    element_bytes: int  # 2 or 4, of an activation
    compiled: bool
    grad_checkpoint: bool  # keep only the input of each block
    loss_chunk_rows: int  # tokens whose logits the loss holds at once


@dataclass(frozen=True)
class Memory:
    """Estimated bytes of tensors on one rank.

    peak = weights + gradients + optimizer + max(activations + logits, update)
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int  # of one chunk of the loss, with their gradients
    update: int  # temporaries of Muon, which exist after the activations are freed
    peak: int


def estimate_memory(
    parameters: dict[str, int],
    model_config: "GPTConfig",
    device_batch_size: int,
    grad_accum_steps: int,
    world_size: int,
    policy: ActivationPolicy,
) -> Memory:
    """Memory of one rank; tests compare it with torch's allocations (within 25 %). parameters: {role: count}."""
    depth, width, vocab_size = model_config.num_layers, model_config.model_dim, model_config.vocab_size
    e, tokens = policy.element_bytes, device_batch_size * model_config.max_seq_len
    matrices, pairs = parameters["matrix"], parameters.get("bigram_embedding", 0)
    dense = sum(parameters.values()) - pairs

    weights = 4 * (dense + pairs)
    gradients = 4 * (dense + min(tokens * grad_accum_steps * world_size * width, pairs))  # the bigram table's is sparse
    # Muon keeps a momentum, AdamW two moments; ranks share both. The bigram table has one moment per row.
    optimizer = (4 * matrices + 8 * (dense - matrices)) // world_size + 8 * pairs // width

    # Of a layer, per token and channel: input, normed inputs, q, k, v, attention output, and 4 hidden units twice make
    # 15 elements. Compiled norms keep 3 more; eager ones keep their 4 inputs in float32.
    layer = tokens * width * (18 * e if policy.compiled else 15 * e + 16)
    activations = layer + depth * tokens * width * e if policy.grad_checkpoint else depth * layer
    if e < 4:
        activations += e * matrices  # autocast's copies of the weights
    chunk = min(policy.loss_chunk_rows, tokens) * vocab_size
    logits = chunk * (12 + e if policy.compiled else 20 + 2 * e) + 4 * vocab_size * width  # and the head's gradient
    update = (8 + e) * matrices // world_size
    peak = weights + gradients + optimizer + max(activations + logits, update)
    return Memory(weights, gradients, optimizer, activations, logits, update, peak)


def process_growth(memory: Memory) -> int:
    """Upper estimate of the bytes by which a CPU process grows from before the model is built."""
    state = memory.weights + memory.optimizer
    return round(LOADED_BYTES + state + HEAP * (memory.peak - state))


# ---- optimization ----


def learning_rate(name: str, tokens: float, batch: int) -> float:
    """The peak of `name`, one of RATES, for a run of so many training tokens in steps of `batch` tokens.

    It goes with the root of the batch, as in nanochat (arXiv:2405.14578 for Adam), and as a power of the tokens that
    takes it through both anchors. For the matrices this power is -0.5: the rate falls as 1 / sqrt(steps).
    """
    small, large = getattr(SMALL, name), getattr(LARGE, name)
    exponent = math.log(small / large * math.sqrt(LARGE.batch / SMALL.batch)) / math.log(LARGE.tokens / SMALL.tokens)
    tokens = min(max(tokens, SMALL.tokens), LARGE.tokens)
    rate = large * math.sqrt(batch / LARGE.batch) * (LARGE.tokens / tokens) ** exponent
    return min(rate, MOST_OF_RATE * max(small, large))


def between_anchors(name: str, tokens: float) -> float:
    """A number of the anchors at so many training tokens: linear in their logarithm, and constant beyond."""
    place = math.log(tokens / SMALL.tokens) / math.log(LARGE.tokens / SMALL.tokens)
    place = min(max(place, 0.0), 1.0)
    return getattr(SMALL, name) + place * (getattr(LARGE, name) - getattr(SMALL, name))


@dataclass(frozen=True)
class StepSchedule:
    """The schedules at one optimizer step."""

    micro_steps: int
    lr_factor: float  # of every learning rate's peak
    matrix_lr: float  # that of the matrices
    momentum: float
    weight_decay: float


@dataclass(frozen=True)
class Recipe:
    """The numbers of the optimization, all of them resolved. A checkpoint holds them, and a resumed run takes them from
    there, whatever newer code would choose.
    """

    # Settings of scripts.base_train, in lower case:
    matrix_lr: float  # peak learning rates; embedding and head are scaled to the width already
    embedding_lr: float
    unembedding_lr: float
    scalar_lr: float
    weight_decay: float  # of the matrices, at the start
    grad_clip: float  # largest norm; 0: off
    schedule: str
    warmup_ratio: float
    warmdown_ratio: float
    final_lr_frac: float
    batch_ramp: bool
    # Not settings:
    momentum_start: float
    momentum_peak: float
    momentum_end: float
    momentum_warmup: float  # fraction of the run

    def __post_init__(self) -> None:
        numbers = [value for value in vars(self).values() if type(value) is float]
        fractions = (self.warmup_ratio, self.warmdown_ratio, self.final_lr_frac, self.momentum_warmup)
        if self.schedule not in SCHEDULES or min(numbers) < 0 or max(fractions) > 1:
            raise ValueError(f"{self}: a number is out of range")

    @classmethod
    def of(cls, width: int, tokens: float, batch: int, settings: Mapping = MappingProxyType({})) -> "Recipe":
        """The recipe of a model of this `width` that trains on so many tokens, in steps of `batch` tokens.

        settings: {NAME: value} of scripts.base_train, which come first; -1 leaves a number to the recipe. Rates of
        embedding and head are given for REFERENCE_WIDTH.
        """
        steps = max(tokens / batch, 1.0)
        chosen = {name: learning_rate(name, tokens, batch) for name in RATES}
        chosen |= {
            "grad_clip": 0.0,
            "weight_decay": between_anchors("decay_exponent", tokens) / (chosen["matrix_lr"] * steps),
            "schedule": "wsd",
            "warmup_ratio": min(WARMUP_STEPS / steps, WARMUP_SHARE),
            "warmdown_ratio": WARMDOWN_SHARE,
            "final_lr_frac": between_anchors("final_lr_frac", tokens),
            "batch_ramp": False,
            "momentum_start": MOMENTUM_START,
            "momentum_peak": between_anchors("momentum_peak", tokens),
            "momentum_end": MOMENTUM_END,
            "momentum_warmup": min(MOMENTUM_WARMUP_STEPS / steps, MOMENTUM_WARMUP_SHARE),
        }
        chosen |= {name: settings[name.upper()] for name in chosen if settings.get(name.upper(), -1) != -1}
        if settings.get("WARMDOWN_RATIO", -1) == -1:
            chosen["warmdown_ratio"] = min(WARMDOWN_SHARE, 1 - chosen["warmup_ratio"])
        for name in ("embedding_lr", "unembedding_lr"):
            chosen[name] *= (width / REFERENCE_WIDTH) ** -0.5  # as in nanochat
        return cls(**chosen)

    def resumed(self, saved: dict, changed: set[str]) -> "Recipe":
        """The recipe `saved` in a checkpoint, with this one's numbers for the settings that were `changed`."""
        return replace(self, **{name: value for name, value in saved.items() if name.upper() not in changed})

    @property
    def learning_rates(self) -> dict[str, float]:
        """{"matrix", "embedding", "unembedding", "scalar": peak}."""
        return {name.removesuffix("_lr"): getattr(self, name) for name in RATES}

    def at(self, progress: float, grad_accum_steps: int) -> StepSchedule:
        """The settings of the step at `progress`; `grad_accum_steps` micro-steps make up the full batch."""
        share = batch_share(progress) if self.batch_ramp else 1.0
        micro_steps = round(grad_accum_steps * share)
        factor = SCHEDULES[self.schedule](progress, self.warmup_ratio, self.warmdown_ratio, self.final_lr_frac)
        factor *= math.sqrt(micro_steps / grad_accum_steps)  # the gradients of smaller batches are noisier
        peaks = (self.momentum_start, self.momentum_peak, self.momentum_end)
        beta = momentum(progress, self.warmdown_ratio, peaks, self.momentum_warmup)
        decay = weight_decay(progress, self.weight_decay)
        return StepSchedule(micro_steps, factor, self.matrix_lr * factor, beta, decay)


REASONS = {  # of what `sizes`, `batch_tokens` and `Recipe.of` choose
    "model_dim": "64 a layer, at least 256, in whole heads",
    "num_heads": "model_dim / --head-dim",
    "max_seq_len": "256 (measured) at width 256, 2,048 from 768",
    "vocab_size": "that of the tokenizer",
    "rope_base": "10,000; 100,000 (nanochat) from width 768",
    "bigram_rows": "65,536 to width 512, where it pays",
    "spectral_tokens": "2,000,000 to width 512, where it pays",
    "total_batch_size": "4,096 at 3 M tokens on a CPU, 2^19 at 1.4 G on GPUs",
    "matrix_lr": "0.04 at 4,096 of 3 M tokens, 0.02 at 2^19 of 1.4 G",
    "embedding_lr": "0.35 and 0.3 there, by width",
    "unembedding_lr": "0.005 and 0.008 there, by width",
    "scalar_lr": "0.05 and 0.5 there",
    "weight_decay": "none at 3 M tokens (measured), 0.28 at 1.4 G",
    "grad_clip": "off, as in nanochat",
    "schedule": "warmup, stable, decay (arXiv:2404.06395)",
    "warmup_ratio": "40 steps (nanochat), at most 4 % (measured)",
    "warmdown_ratio": "nanochat's; flat around it here",
    "final_lr_frac": "0.03 at 3 M tokens (measured), 0.05 at 1.4 G",
    "batch_ramp": "off: not measured here",
    "momentum_start": "nanochat's",
    "momentum_peak": "0.95 at 3 M tokens (measured), 0.97 at 1.4 G",
    "momentum_end": "nanochat's",
    "momentum_warmup": "400 steps (nanochat), at most 30 % (measured)",
}


# ---- the plan ----


@dataclass(frozen=True)
class Horizon:
    """What sets the length of a run: the first that is not zero, else `param_data_ratio`."""

    num_iterations: int = 0
    target_flops: float = 0.0
    target_minutes: float = 0.0
    param_data_ratio: float = 10.0  # training tokens per weight in matrices and head

    @property
    def is_timed(self) -> bool:
        """Whether the time of steps, measured later, decides how many there are."""
        return self.target_minutes > 0

    def tokens(self, weights: int, flops_per_token: int, flops_per_second: float) -> float:
        """The training tokens of a model with so many `weights` in matrices and head; for a timed run an estimate, and
        for a number of steps those that the default would be, which decide its batch.
        """
        if self.target_flops:
            return self.target_flops / flops_per_token
        if self.target_minutes:
            return 60 * self.target_minutes * flops_per_second / flops_per_token
        return self.param_data_ratio * weights

    def progress_after(self, step: int, seconds: float, tokens: int, plan: "Plan", batch_ramp: bool) -> float:
        """The progress of a run that has this horizon and `plan` after `step` steps, `seconds` and `tokens`."""
        if self.num_iterations:
            return min(step / self.num_iterations, 1.0)
        if self.is_timed:  # at least one step is left
            share = min(seconds / (60 * self.target_minutes), step / (step + 1))
        else:
            share = min(tokens / plan.tokens, 1.0)
        return progress_at_tokens(share) if batch_ramp else share


@dataclass(frozen=True)
class Plan:
    """What a run will do. Sequences per step = device_batch_size * grad_accum_steps * world_size."""

    parameters: dict[str, int]  # role -> count
    flops_per_token: int
    total_batch_size: int  # tokens per step
    device_batch_size: int  # sequences per forward pass
    grad_accum_steps: int
    num_steps: int
    tokens: int
    seconds: float  # estimated from the measured matmul rate
    memory: Memory  # of one rank


def make_plan(
    parameters: dict[str, int],
    model_config: "GPTConfig",
    horizon: Horizon,
    *,
    total_batch_size: int,
    max_device_batch_size: int,
    world_size: int,
    on_gpu: bool,
    flops_per_second: float,
    policy: ActivationPolicy,
    batch_ramp: bool = False,
) -> Plan:
    """The Plan of a run. Raises UserError for a batch size that does not divide.

    total_batch_size: tokens, 0 to derive it from the horizon. flops_per_second: of all ranks together.
    """
    seq_len, parts = model_config.max_seq_len, BATCH_PARTS if batch_ramp else 1
    weights = parameters["matrix"] + parameters["unembedding"]
    flops_per_token = training_flops_per_token(weights, model_config.num_layers, model_config.model_dim, seq_len)
    tokens = horizon.tokens(weights, flops_per_token, flops_per_second)
    total_batch_size = total_batch_size or batch_tokens(tokens, seq_len, world_size, on_gpu, parts)
    split = split_batch(total_batch_size, seq_len, max_device_batch_size, world_size, parts)
    mean_tokens = total_batch_size * (mean_batch_share() if batch_ramp else 1.0)
    num_steps = horizon.num_iterations or max(round(tokens / mean_tokens), 1)
    tokens = round(num_steps * mean_tokens)
    seconds = tokens * flops_per_token / flops_per_second
    memory = estimate_memory(parameters, model_config, *split, world_size, policy)
    return Plan(parameters, flops_per_token, total_batch_size, *split, num_steps, tokens, seconds, memory)


# ---- schedules, as functions of progress in (0, 1) ----


def progress_at_step(step: int, num_steps: int, from_step: int = 0, from_progress: float = 0.0) -> float:
    """Progress at the middle of step 1 <= step <= num_steps, so that no step has a learning rate of zero.

    If num_steps was corrected after `from_step`, at `from_progress`, the remaining progress is spread evenly.
    """
    return from_progress + (1 - from_progress) * (step - from_step - 0.5) / (num_steps - from_step)


def wsd(progress: float, warmup: float, warmdown: float, final: float) -> float:
    """Learning rate factor, warmup-stable-decay (arXiv:2404.06395): linear warmup, constant, linear decay to `final`.

    warmup, warmdown: fractions of the run.
    """
    if progress < warmup:
        return progress / warmup
    if progress > 1 - warmdown:
        return final + (1 - final) * (1 - progress) / warmdown
    return 1.0


def cosine(progress: float, warmup: float, warmdown: float, final: float) -> float:
    """Learning rate factor: linear warmup, then cosine decay to `final` (arXiv:1608.03983). `warmdown` is unused."""
    if progress < warmup:
        return progress / warmup
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def linear(progress: float, warmup: float, warmdown: float, final: float) -> float:
    """Learning rate factor: linear warmup, then linear decay to `final`. `warmdown` is unused."""
    return wsd(progress, warmup, 1 - warmup, final)


SCHEDULES: dict[str, Callable[[float, float, float, float], float]] = {"wsd": wsd, "cosine": cosine, "linear": linear}


def momentum(progress: float, warmdown: float, values: tuple[float, float, float], warmup: float) -> float:
    """Muon's momentum, `values` at start, peak and end: linear warmup, constant, and a slight linear decrease over the
    learning rate's warmdown.
    """
    start, peak, end = values
    if progress < warmup:
        return start + (peak - start) * progress / warmup
    begin = max(1 - warmdown, warmup)
    if progress > begin:
        return peak + (end - peak) * (progress - begin) / (1 - begin)
    return peak


def weight_decay(progress: float, peak: float) -> float:
    """Muon's weight decay: cosine from `peak` to zero."""
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def batch_share(progress: float) -> float:
    """Fraction of the full batch under a batch ramp: early on small batches lose nothing (arXiv:1812.06162)."""
    return next((share for until, share in BATCH_RAMP if progress < until), 1.0)


def mean_batch_share(begin: float = 0.0) -> float:
    """Mean of `batch_share` over the progress from `begin` < 1 to 1."""
    total, at = 0.0, begin
    for until, share in (*BATCH_RAMP, (1.0, 1.0)):
        if until > at:
            total, at = total + share * (until - at), until
    return total / (1 - begin)


def progress_at_tokens(share_of_tokens: float) -> float:
    """Progress at which a run with a batch ramp has seen this fraction of its tokens."""
    left, begin = share_of_tokens * mean_batch_share(), 0.0
    for until, share in BATCH_RAMP:
        if left < share * (until - begin):
            return begin + left / share
        left, begin = left - share * (until - begin), until
    return min(begin + left, 1.0)
