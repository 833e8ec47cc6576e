"""Every number that follows from a model's depth, the token budget and the kind of device; an estimate of memory; and
the schedules of learning rate, momentum, weight decay and batch size.

Pure arithmetic without torch, environment or files: a plan can be tested and printed before anything is allocated.
Two recipes are known to work: SMALL, measured here, and LARGE, published. Learning rates pass through both, following a
power law in the training tokens; between and beyond these two anchors they are an assumption.
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
    """A recipe that works for one batch size and one number of training tokens."""

    tokens: float  # training tokens
    batch: int  # tokens per optimizer step
    matrix_lr: float
    embedding_lr: float  # at REFERENCE_WIDTH
    unembedding_lr: float  # at REFERENCE_WIDTH
    scalar_lr: float
    momentum_peak: float
    final_lr_frac: float
    decay_exponent: float  # rate x weight decay x steps: without gradients, weights would shrink by exp(this)


SMALL = Anchor(3e6, 4096, 0.04, 0.35, 0.005, 0.05, 0.95, 0.03, 0.0)  # depth 2 to 4, minutes on a CPU (dev/rates.md)
LARGE = Anchor(1.4e9, 2**19, 0.02, 0.3, 0.008, 0.5, 0.97, 0.05, 15.0)  # nanochat's, published for depth 12 to 26
RATES = ("matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr")
REFERENCE_WIDTH = 768
MAX_RATE = 2.0  # upper bound of a learning rate, as a multiple of the larger anchor's
BATCH_EXPONENT = 0.383  # the batch grows as training tokens ** BATCH_EXPONENT (arXiv:2505.13738)
MAX_BATCH = 2**20
WARMUP_STEPS, WARMUP_SHARE = 40, 0.04  # learning rate warmup: these steps, at most this fraction of the run
MOMENTUM_WARMUP_STEPS, MOMENTUM_WARMUP_SHARE = 400, 0.30  # the same for Muon's momentum
MOMENTUM_START, MOMENTUM_END = 0.85, 0.90
WARMDOWN_SHARE = 0.65  # fraction of the run

# Compute-optimal number of weights in matrices and head as a power law of the training FLOPs, through our best CPU runs
# (dev/ladder.md) and nanochat's published optimum.
OPTIMUM_FLOPS, OPTIMUM_WEIGHTS = 7.2e13, 3.0e6
OPTIMUM_EXPONENT = math.log(129e6 / OPTIMUM_WEIGHTS) / math.log(1e18 / OPTIMUM_FLOPS)
WIDTH_PER_LAYER, LEAST_WIDTH, MOST_LAYERS, DEFAULT_DEPTH = 64, 256, 32, 4
EFFICIENCY = 0.9  # training FLOP/s, all overhead included, as a fraction of the measured `training_flops_per_second`
START_SECONDS = 20.0  # part of a timed run not spent training: imports, compilation, evaluations, the last save
# Memory of a CPU process beyond its tensors (dev/LOG.md): torch's libraries, and a factor for heap fragmentation.
LOADED_BYTES, HEAP = 150e6, 2.0
BATCH_RAMP = ((0.10, 0.25), (0.22, 0.5))  # (until this progress, this fraction of the batch)
BATCH_PARTS = 4  # the fractions are multiples of 1 / BATCH_PARTS


class Sizes(NamedTuple):
    """Defaults that follow from the width of a model."""

    vocab_size: int
    seq_len: int  # tokens per sequence
    rope_base: float  # base of the rotary frequencies
    bigram_rows: int  # rows of the hashed bigram table; 0: no table
    spectral_tokens: int  # tokens counted for bigram init; 0: random init


# {largest width: Sizes}. The first row was measured here (dev/ladder.md), the last is nanochat's. Bigram tables need no
# matrix product and help small models most; nothing here shows that they help beyond width 512.
SIZES = {
    256: Sizes(4096, 256, 10_000.0, 65536, 2_000_000),
    384: Sizes(8192, 256, 10_000.0, 65536, 2_000_000),
    512: Sizes(8192, 512, 10_000.0, 65536, 2_000_000),
    640: Sizes(16384, 1024, 10_000.0, 0, 0),
    math.inf: Sizes(32768, 2048, 100_000.0, 0, 0),
}


def sizes(width: int) -> Sizes:
    """Sizes of a model of this width."""
    return next(found for most, found in SIZES.items() if width <= most)


def training_flops(minutes: float, flops_per_second: float) -> float:
    """FLOPs left for training in a run that takes `minutes` from process start to the last save: at least half."""
    return max(60 * minutes - START_SECONDS, 30 * minutes) * flops_per_second


def choose_depth(flops: float, head_dim: int, aspect_ratio: int = 0) -> int:
    """The depth with the weight count closest to the compute optimum for `flops`."""
    goal = OPTIMUM_WEIGHTS * (flops / OPTIMUM_FLOPS) ** OPTIMUM_EXPONENT
    widths = {depth: model_width(depth, aspect_ratio, head_dim)[0] for depth in range(2, MOST_LAYERS + 1)}
    return min(widths, key=lambda depth: abs(math.log(num_weights(depth, widths[depth]) / goal)))


def num_weights(depth: int, width: int) -> int:
    """Number of weights in matrices and head, with the default vocabulary of this width."""
    return 12 * depth * width**2 + sizes(width).vocab_size * width


def model_width(depth: int, aspect_ratio: int, head_dim: int) -> tuple[int, int]:
    """(width, heads): depth * aspect_ratio, or the default width if that is 0, in whole heads. Raises UserError."""
    if depth < 1 or aspect_ratio < 0 or head_dim < 2 or head_dim % 2:
        given = f"--depth={depth} --aspect-ratio={aspect_ratio} --head-dim={head_dim}"
        raise UserError(f"{given}: --depth must be positive, --head-dim positive and even, --aspect-ratio not negative")
    width = depth * aspect_ratio or max(depth * WIDTH_PER_LAYER, LEAST_WIDTH)
    heads = math.ceil(width / head_dim)
    return heads * head_dim, heads


def training_flops_per_token(weights: int, depth: int, width: int, seq_len: int) -> int:
    """FLOPs per token, forward and backward: 6 per matrix and head weight, and attention (PaLM, arXiv:2204.02311)."""
    return 6 * weights + 12 * depth * width * seq_len


def batch_tokens(training_tokens: float, seq_len: int, world_size: int, on_gpu: bool, parts: int = 1) -> int:
    """Tokens per optimizer step: near a power of two, and on every rank `parts` equal parts of whole sequences. The
    rule starts from LARGE on GPUs, to keep many of them busy, and from SMALL on a CPU, where a small batch is faster.
    """
    anchor = LARGE if on_gpu else SMALL
    ideal = anchor.batch * (training_tokens / anchor.tokens) ** BATCH_EXPONENT
    ideal = 2 ** round(math.log2(min(max(ideal, SMALL.batch), MAX_BATCH)))
    unit = seq_len * world_size * parts
    return max(round(ideal / unit), 1) * unit


def split_batch(total_batch_size: int, seq_len: int, most: int, world_size: int, parts: int = 1) -> tuple[int, int]:
    """(device_batch_size, grad_accum_steps) of a step of `total_batch_size` tokens. device_batch_size, in sequences, is
    the largest up to `most` that divides a rank's batch into `parts` equal parts of whole forward passes. Raises
    UserError with a valid total if this one cannot be divided.
    """
    unit = seq_len * world_size * parts
    if total_batch_size % unit or total_batch_size < 1:
        factors = f"{world_size} ranks x {seq_len} tokens" + (f" x {parts} parts of the ramp" if parts > 1 else "")
        works = max(round(total_batch_size / unit), 1) * unit
        raise UserError(f"--total-batch-size={total_batch_size} is not a multiple of {unit} ({factors}): try {works}")
    share = total_batch_size // unit
    fitting = next(size for size in range(min(most, share), 0, -1) if share % size == 0)
    return fitting, parts * share // fitting


@dataclass(frozen=True)
class ActivationPolicy:
    """Properties of the forward pass that decide which activations stay in memory."""

    element_bytes: int  # bytes per activation, 2 or 4
    compiled: bool
    grad_checkpoint: bool  # keep only the input of each block
    loss_chunk_rows: int  # tokens per chunk of logits in the loss
    keeps_scores: bool = False  # attention keeps its scores for the backward pass


@dataclass(frozen=True)
class Memory:
    """Estimated bytes of tensors on one rank."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int  # one chunk of logits with their gradients
    update: int  # temporaries of Muon, allocated after the activations are freed
    peak: int  # weights + gradients + optimizer + max(activations + logits, update)


def estimate_memory(
    parameters: dict[str, int],
    model_config: "GPTConfig",
    device_batch_size: int,
    grad_accum_steps: int,
    world_size: int,
    policy: ActivationPolicy,
) -> Memory:
    """Memory of one rank, tested against torch's allocations (within 25 %). parameters: {role: number of weights}."""
    depth, width, vocab_size = model_config.num_layers, model_config.model_dim, model_config.vocab_size
    e, tokens = policy.element_bytes, device_batch_size * model_config.max_seq_len
    matrices, pairs = parameters["matrix"], parameters.get("bigram_embedding", 0)
    dense = sum(parameters.values()) - pairs

    weights = 4 * (dense + pairs)
    gradients = 4 * (dense + min(tokens * grad_accum_steps * world_size * width, pairs))  # the bigram table's is sparse
    # Muon keeps a momentum and AdamW two moments, sharded over ranks; the bigram table a moment and a count per row.
    optimizer = (4 * matrices + 8 * (dense - matrices)) // world_size + 8 * pairs // width

    # A layer keeps 15 elements per token and channel: input, normed inputs, q, k, v, attention output, and two times 4
    # hidden units. Compiled norms keep 3 more; eager norms keep their 4 inputs in float32.
    layer = tokens * width * (18 * e if policy.compiled else 15 * e + 16)
    if policy.keeps_scores:  # two matrices of them, without a quarter
        layer += 2 * e * tokens * model_config.num_heads * model_config.max_seq_len * 3 // 4
    activations = layer + depth * tokens * width * e if policy.grad_checkpoint else depth * layer
    activations += e * matrices if e < 4 else 0  # autocast's copies of the weights
    chunk = min(policy.loss_chunk_rows, tokens) * vocab_size
    logits = chunk * (12 + e) + 4 * vocab_size * width  # last: the head's gradient
    update = (8 + e) * matrices // world_size
    peak = weights + gradients + optimizer + max(activations + logits, update)
    return Memory(weights, gradients, optimizer, activations, logits, update, peak)


def process_growth(memory: Memory) -> int:
    """Upper estimate of the bytes that a CPU process will allocate, counted from before the model is built."""
    state = memory.weights + memory.optimizer
    return round(LOADED_BYTES + state + HEAP * (memory.peak - state))


def learning_rate(name: str, tokens: float, batch: int) -> float:
    """Peak learning rate `name` (one of RATES) for a run on `tokens` training tokens in steps of `batch` tokens. It
    grows as sqrt(batch), as in nanochat (arXiv:2405.14578 for Adam), and as the power of the tokens that passes through
    both anchors. For the matrices this power is -0.5: the rate falls as 1 / sqrt(steps).
    """
    small, large = getattr(SMALL, name), getattr(LARGE, name)
    exponent = math.log(small / large * math.sqrt(LARGE.batch / SMALL.batch)) / math.log(LARGE.tokens / SMALL.tokens)
    tokens = min(max(tokens, SMALL.tokens), LARGE.tokens)
    rate = large * math.sqrt(batch / LARGE.batch) * (LARGE.tokens / tokens) ** exponent
    return min(rate, MAX_RATE * max(small, large))


def between_anchors(name: str, tokens: float) -> float:
    """The anchors' `name` interpolated linearly in the logarithm of training `tokens`, and constant beyond them."""
    place = min(max(math.log(tokens / SMALL.tokens) / math.log(LARGE.tokens / SMALL.tokens), 0.0), 1.0)
    return getattr(SMALL, name) + place * (getattr(LARGE, name) - getattr(SMALL, name))


@dataclass(frozen=True)
class StepSchedule:
    """Scheduled values of one optimizer step."""

    micro_steps: int
    lr_factor: float  # learning rates as a fraction of their peaks
    matrix_lr: float
    momentum: float
    weight_decay: float


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of a run. Checkpoints hold them, so a resumed run keeps them even under newer defaults."""

    # Settings of scripts.base_train, in lower case:
    matrix_lr: float  # peak learning rates; those of embedding and head are already scaled by the width
    embedding_lr: float
    unembedding_lr: float
    scalar_lr: float
    weight_decay: float  # initial value, for the matrices
    grad_clip: float  # largest gradient norm; 0: off
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
        """The recipe for a model of `width` trained on `tokens` tokens in steps of `batch` tokens. settings: {NAME:
        value} of scripts.base_train, which take precedence unless they are -1, with embedding and head rates for
        REFERENCE_WIDTH.
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
        """The recipe `saved` in a checkpoint, but with this one's values for `changed` settings."""
        return replace(self, **{name: value for name, value in saved.items() if name.upper() not in changed})

    @property
    def learning_rates(self) -> dict[str, float]:
        """Peak learning rates of "matrix", "embedding", "unembedding" and "scalar"."""
        return {name.removesuffix("_lr"): getattr(self, name) for name in RATES}

    def at(self, progress: float, grad_accum_steps: int) -> StepSchedule:
        """Scheduled values of the step at `progress`. grad_accum_steps: micro-steps of a full batch."""
        share = batch_share(progress) if self.batch_ramp else 1.0
        micro_steps = round(grad_accum_steps * share)
        factor = SCHEDULES[self.schedule](progress, self.warmup_ratio, self.warmdown_ratio, self.final_lr_frac)
        factor *= math.sqrt(micro_steps / grad_accum_steps)  # the gradients of smaller batches are noisier
        peaks = (self.momentum_start, self.momentum_peak, self.momentum_end)
        beta = momentum(progress, self.warmdown_ratio, peaks, self.momentum_warmup)
        decay = weight_decay(progress, self.weight_decay)
        return StepSchedule(micro_steps, factor, self.matrix_lr * factor, beta, decay)


REASONS = {  # printed by --dry-run beside the numbers that `sizes`, `batch_tokens` and `Recipe.of` choose
    "model_dim": "64 per layer, at least 256, rounded to whole heads",
    "num_heads": "model_dim / --head-dim",
    "max_seq_len": "256 at width 256 (measured), 2,048 from width 768",
    "vocab_size": "the tokenizer's",
    "rope_base": "10,000; nanochat's 100,000 from width 768",
    "bigram_rows": "65,536 up to width 512, where it helps",
    "spectral_tokens": "2,000,000 up to width 512, where it helps",
    "total_batch_size": "4,096 for 3 M tokens (CPU), 2^19 for 1.4 G (GPUs)",
    "matrix_lr": "0.04 (3 M tokens, by 4,096), 0.02 (1.4 G, by 2^19)",
    "embedding_lr": "0.35 (3 M), 0.3 (1.4 G), times sqrt(768 / width)",
    "unembedding_lr": "0.005 (3 M), 0.008 (1.4 G), times sqrt(768 / width)",
    "scalar_lr": "0.05 (3 M tokens), 0.5 (1.4 G)",
    "weight_decay": "0 for 3 M tokens (measured), 0.28 for 1.4 G",
    "grad_clip": "off, as in nanochat",
    "schedule": "warmup-stable-decay (arXiv:2404.06395)",
    "warmup_ratio": "40 steps (nanochat), at most 4 % (measured)",
    "warmdown_ratio": "nanochat's; nearby values did equally well here",
    "final_lr_frac": "0.03 for 3 M tokens (measured), 0.05 for 1.4 G",
    "batch_ramp": "off: not measured here",
    "momentum_start": "nanochat's",
    "momentum_peak": "0.95 for 3 M tokens (measured), 0.97 for 1.4 G",
    "momentum_end": "nanochat's",
    "momentum_warmup": "400 steps (nanochat), at most 30 % (measured)",
}


@dataclass(frozen=True)
class Horizon:
    """The length of a run, set by the first field that is not zero."""

    num_iterations: int = 0
    target_flops: float = 0.0
    target_minutes: float = 0.0
    param_data_ratio: float = 10.0  # training tokens per weight in matrices and head

    @property
    def is_timed(self) -> bool:
        """Whether the number of steps follows from measured step times."""
        return self.target_minutes > 0

    def tokens(self, weights: int, flops_per_token: int, flops_per_second: float) -> float:
        """Training tokens of a model with this many `weights` in matrices and head: an estimate for a timed run, and
        param_data_ratio * weights for a given number of steps, where it only decides the batch.
        """
        if self.target_flops:
            return self.target_flops / flops_per_token
        if self.target_minutes:
            return 60 * self.target_minutes * flops_per_second / flops_per_token
        return self.param_data_ratio * weights

    def progress_after(self, step: int, seconds: float, tokens: int, plan: "Plan", batch_ramp: bool) -> float:
        """Progress in [0, 1] of a run with this horizon and `plan` after `step` steps, `seconds` and `tokens`."""
        if self.num_iterations:
            return min(step / self.num_iterations, 1.0)
        if self.is_timed:  # leaves at least one step
            share = min(seconds / (60 * self.target_minutes), step / (step + 1))
        else:
            share = min(tokens / plan.tokens, 1.0)
        return progress_at_tokens(share) if batch_ramp else share


@dataclass(frozen=True)
class Plan:
    """Batch, horizon and memory of a run. Sequences per step = device_batch_size * grad_accum_steps * world_size."""

    parameters: dict[str, int]  # {role: number of weights}
    flops_per_token: int
    total_batch_size: int  # tokens per step
    device_batch_size: int  # sequences per forward pass
    grad_accum_steps: int
    num_steps: int
    tokens: int
    seconds: float  # estimate from the measured training speed
    memory: Memory


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
    """Plan a run. total_batch_size: tokens; 0: derived from the horizon. flops_per_second: of all ranks together.
    Raises UserError for a batch size that cannot be divided.
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


def progress_at_step(step: int, num_steps: int, from_step: int = 0, from_progress: float = 0.0) -> float:
    """Progress in the middle of a step, 1 <= step <= num_steps, so that no step has a learning rate of zero. If
    num_steps was corrected after `from_step`, at `from_progress`, the remaining progress is spread evenly.
    """
    return from_progress + (1 - from_progress) * (step - from_step - 0.5) / (num_steps - from_step)


def wsd(progress: float, warmup: float, warmdown: float, final: float) -> float:
    """Learning rate factor, warmup-stable-decay (arXiv:2404.06395): linear warmup, constant, linear decay to `final`.
    progress in (0, 1); warmup and warmdown are fractions of the run.
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
    """Muon's momentum, with `values` at start, peak and end: linear warmup, constant, linear warmdown with the rate."""
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
    """Fraction of the full batch under a batch ramp; early on, small batches lose nothing (arXiv:1812.06162)."""
    return next((share for until, share in BATCH_RAMP if progress < until), 1.0)


def mean_batch_share(begin: float = 0.0) -> float:
    """Mean of `batch_share` over progress from `begin` < 1 to 1."""
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
