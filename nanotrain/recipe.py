"""The training recipe as pure arithmetic: model shape and batch from depth or time, the plan of a run with an estimate
of its memory, and the schedules of learning rate, momentum, weight decay and batch.

No torch, no environment, no files, so a plan can be tested and printed before anything is allocated.
"""

import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, replace
from typing import TYPE_CHECKING

from nanotrain.errors import UserError

if TYPE_CHECKING:
    from nanotrain.gpt import GPTConfig

# Batch size in tokens as a power law of the training tokens, through two recipes known to work: 4,096 at 3M tokens
# (minutes on a CPU) and 2^19 at 1.4B (nanochat, depth 12). Between and beyond them it is an assumption.
BATCH_ANCHOR_TOKENS, BATCH_ANCHOR = 3e6, 4096
BATCH_EXPONENT = math.log(2**19 / BATCH_ANCHOR) / math.log(1.4e9 / BATCH_ANCHOR_TOKENS)
MAX_BATCH = 2**20
REFERENCE_WIDTH = 768  # at which the embedding and head learning rates are given

# Compute-optimal number of weights in matrices and head as a power law of the training FLOPs, through our best CPU runs
# (dev/ladder.md) and nanochat's published optimum. Between them it is an assumption.
OPTIMUM_FLOPS, OPTIMUM_WEIGHTS = 7.2e13, 3.0e6
OPTIMUM_EXPONENT = math.log(129e6 / OPTIMUM_WEIGHTS) / math.log(1e18 / OPTIMUM_FLOPS)
WIDTH_PER_LAYER, LEAST_WIDTH, MOST_LAYERS, DEFAULT_DEPTH = 64, 256, 26, 4
# (up to this width, tokens); only the first entry of each was measured by us
VOCABULARIES = ((256, 4096), (512, 8192), (640, 16384), (math.inf, 32768))
SEQUENCE_LENGTHS = ((384, 256), (512, 512), (640, 1024), (math.inf, 2048))
EFFICIENCY = 0.9  # training FLOP/s, with all overhead, as a fraction of the measured `training_flops_per_second`
START_SECONDS = 20.0  # of a timed run not spent training: imports, compilation, evaluations, the last save

# A CPU process needs more than its tensors (dev/LOG.md): what torch loads, and fragmentation of the heap.
LOADED_BYTES, HEAP = 150e6, 2.0

MOMENTUM_START, MOMENTUM_PEAK, MOMENTUM_END = 0.85, 0.95, 0.90
MOMENTUM_WARMUP = 0.30  # fraction of the run
BATCH_RAMP = ((0.10, 0.25), (0.22, 0.5))  # (until this progress, this fraction of the batch)
BATCH_PARTS = 4  # the fractions are whole multiples of 1 / BATCH_PARTS


# ---- model shape ----


def training_flops(minutes: float, flops_per_second: float) -> float:
    """FLOPs available for training in a run of `minutes` from process start to the last save."""
    seconds = 60 * minutes
    return max(seconds - START_SECONDS, seconds / 2) * flops_per_second


def choose_depth(flops: float, head_dim: int, aspect_ratio: int = 0) -> int:
    """The depth whose weight count is closest to the compute optimum for `flops`."""
    goal = OPTIMUM_WEIGHTS * (flops / OPTIMUM_FLOPS) ** OPTIMUM_EXPONENT

    def distance(depth: int) -> float:
        width, _ = model_width(depth, aspect_ratio, head_dim)
        return abs(math.log((12 * depth * width**2 + vocabulary(width) * width) / goal))

    return min(range(2, MOST_LAYERS + 1), key=distance)


def vocabulary(width: int) -> int:
    """Vocabulary size for a model of this width."""
    return next(size for most, size in VOCABULARIES if width <= most)


def sequence_length(width: int) -> int:
    """Sequence length in tokens for a model of this width."""
    return next(length for most, length in SEQUENCE_LENGTHS if width <= most)


def model_width(depth: int, aspect_ratio: int, head_dim: int) -> tuple[int, int]:
    """(width, heads): width = depth * aspect_ratio, or the default rule if that is 0, rounded up to whole heads."""
    if depth < 1 or aspect_ratio < 0 or head_dim < 2 or head_dim % 2:
        raise UserError(
            f"--depth={depth} --aspect-ratio={aspect_ratio} --head-dim={head_dim}: "
            "all must be positive, and the head dimension even"
        )
    width = depth * aspect_ratio or max(depth * WIDTH_PER_LAYER, LEAST_WIDTH)
    heads = math.ceil(width / head_dim)
    return heads * head_dim, heads


def resolve_depth(
    depth: int, horizon: "Horizon", head_dim: int, aspect_ratio: int, flops_per_second: float
) -> tuple[int, str]:
    """(depth, why) of a new run: as given, or if that is 0 the best one for the horizon."""
    if depth:
        return depth, "as asked"
    if not (horizon.target_minutes or horizon.target_flops):
        return DEFAULT_DEPTH, "the default"
    flops = horizon.target_flops or training_flops(horizon.target_minutes, flops_per_second)
    reason = f"{flops:.1e} FLOPs"
    if horizon.target_minutes:
        reason += f": {horizon.target_minutes:.3g} minutes at {flops_per_second / 1e9:,.0f} GFLOP/s"
    return choose_depth(flops, head_dim, aspect_ratio), reason


def width_factor(width: int) -> float:
    """Scale of the embedding and head learning rates relative to REFERENCE_WIDTH: 1 / sqrt(width), as in nanochat."""
    return (width / REFERENCE_WIDTH) ** -0.5


def training_flops_per_token(weights: int, depth: int, width: int, seq_len: int) -> int:
    """FLOPs per token, forward and backward: 6 per matrix and head weight, and attention (PaLM, arXiv:2204.02311)."""
    return 6 * weights + 12 * depth * width * seq_len


# ---- batch ----


def batch_tokens(training_tokens: float, seq_len: int, world_size: int, parts: int = 1) -> int:
    """Tokens per optimizer step: the power law's nearest power of two, in `parts` of whole sequences on every rank."""
    ideal = BATCH_ANCHOR * (training_tokens / BATCH_ANCHOR_TOKENS) ** BATCH_EXPONENT
    ideal = 2 ** round(math.log2(min(max(ideal, BATCH_ANCHOR), MAX_BATCH)))
    unit = seq_len * world_size * parts
    return max(round(ideal / unit), 1) * unit


def split_batch(
    total_batch_size: int, seq_len: int, max_device_batch_size: int, world_size: int, parts: int = 1
) -> tuple[int, int]:
    """(device_batch_size, grad_accum_steps) of a step of `total_batch_size` tokens.

    device_batch_size is in sequences: the largest up to the maximum that cuts a rank's share into `parts` equal parts
    of whole forward passes. Raises UserError, naming three sizes that work, if the total does not divide.
    """
    unit = seq_len * world_size * parts
    if total_batch_size % unit or total_batch_size < 1:
        first = max(total_batch_size // unit, 1)
        works = ", ".join(str((first + extra) * unit) for extra in range(3))
        growing = f" x {parts} parts of a growing batch" if parts > 1 else ""
        raise UserError(
            f"--total-batch-size={total_batch_size} is no multiple of {unit} tokens "
            f"({world_size} ranks x sequences of {seq_len}{growing}): three that work are {works}"
        )
    if max_device_batch_size < 1:
        raise UserError(f"--device-batch-size={max_device_batch_size}: at least 1 sequence")
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
    """The numbers by which settings and width decide the optimization, and Muon's momentum, all of them resolved. A
    checkpoint holds them, and a resumed run takes them from there, whatever newer code would choose.
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
    momentum_start: float = MOMENTUM_START
    momentum_peak: float = MOMENTUM_PEAK
    momentum_end: float = MOMENTUM_END
    momentum_warmup: float = MOMENTUM_WARMUP

    def __post_init__(self) -> None:
        numbers = [value for value in vars(self).values() if type(value) is float]
        fractions = (self.warmup_ratio, self.warmdown_ratio, self.final_lr_frac, self.momentum_warmup)
        if self.schedule not in SCHEDULES or min(numbers) < 0 or max(fractions) > 1:
            raise ValueError(f"{self}: a number is out of range")

    @classmethod
    def from_settings(cls, settings: dict, width: int) -> "Recipe":
        """The recipe of a new run: `settings` {NAME: value} of scripts.base_train, at the model's `width`."""
        chosen = {field.name: settings[field.name.upper()] for field in fields(cls) if field.default is MISSING}
        factor = width_factor(width)
        chosen["embedding_lr"] *= factor
        chosen["unembedding_lr"] *= factor
        return cls(**chosen)

    def resumed(self, saved: dict, changed: set[str]) -> "Recipe":
        """The recipe `saved` in a checkpoint, with this one's numbers for the settings that were `changed`."""
        return replace(self, **{name: value for name, value in saved.items() if name.upper() not in changed})

    @property
    def learning_rates(self) -> dict[str, float]:
        """{"matrix", "embedding", "unembedding", "scalar": peak}."""
        return {name: getattr(self, f"{name}_lr") for name in ("matrix", "embedding", "unembedding", "scalar")}

    @property
    def batch_parts(self) -> int:
        """The number of equal parts that a step's sequences must divide into."""
        return BATCH_PARTS if self.batch_ramp else 1

    @property
    def mean_batch_share(self) -> float:
        """Mean fraction of the full batch over a whole run."""
        return mean_batch_share() if self.batch_ramp else 1.0

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
    flops: float
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
    flops_per_second: float,
    policy: ActivationPolicy,
    batch_parts: int = 1,
    mean_batch_share: float = 1.0,
) -> Plan:
    """The Plan of a run. Raises UserError for a batch size that does not divide.

    total_batch_size: tokens, 0 to derive it from the horizon. flops_per_second: of all ranks together. batch_parts,
    mean_batch_share: those of the Recipe.
    """
    seq_len = model_config.max_seq_len
    weights = parameters["matrix"] + parameters["unembedding"]
    flops_per_token = training_flops_per_token(weights, model_config.num_layers, model_config.model_dim, seq_len)
    if horizon.num_iterations:
        tokens = None
    elif horizon.target_flops:
        tokens = horizon.target_flops / flops_per_token
    elif horizon.target_minutes:  # an estimate until steps have been timed
        tokens = horizon.target_minutes * 60 * flops_per_second / flops_per_token
    else:
        tokens = horizon.param_data_ratio * weights
    if not total_batch_size:
        total_batch_size = batch_tokens(tokens or horizon.param_data_ratio * weights, seq_len, world_size, batch_parts)
    split = split_batch(total_batch_size, seq_len, max_device_batch_size, world_size, batch_parts)
    mean_tokens = total_batch_size * mean_batch_share
    num_steps = horizon.num_iterations or max(round(tokens / mean_tokens), 1)
    tokens = round(num_steps * mean_tokens)
    flops = float(tokens * flops_per_token)
    memory = estimate_memory(parameters, model_config, *split, world_size, policy)
    seconds = flops / flops_per_second
    return Plan(parameters, flops_per_token, total_batch_size, *split, num_steps, tokens, flops, seconds, memory)


def describe_batch(
    plan: Plan,
    model_config: "GPTConfig",
    world_size: int,
    max_device_batch_size: int,
    grad_checkpoint: bool,
    free_bytes: int,
    process_bytes: int | None,
) -> list[str]:
    """The printed lines about the batch and its memory, with a warning if that exceeds `free_bytes` of a rank.

    process_bytes: what a CPU process has taken already; None on other devices.
    """
    memory, size, gib = plan.memory, plan.device_batch_size, 2**30
    lowered = f" (lowered from {max_device_batch_size})" if size < max_device_batch_size else ""
    names = ("weights", "gradients", "optimizer", "activations", "logits", "update")
    parts = [f"{name} {getattr(memory, name) / gib:.2f}" for name in names]
    lines = [
        f"batch      {plan.total_batch_size:,} tokens = {size} sequences{lowered} of {model_config.max_seq_len}"
        f" x {plan.grad_accum_steps} micro-steps x {world_size} ranks",
        f"memory     about {memory.peak / gib:.2f} GiB a rank: {', '.join(parts[:3])},",
        f"           and {' with '.join(parts[3:5])} or, later, {parts[5]}",
    ]
    needed = memory.peak
    if process_bytes is not None:
        needed = process_growth(memory)
        total = (process_bytes + needed) / gib
        lines.append(f"process    about {total:.1f} GiB at most, {process_bytes / gib:.1f} of them taken already")
    if needed > free_bytes:
        peak_in_passes = memory.update <= memory.activations + memory.logits
        smaller = f"--device-batch-size={max(size // 2, 1)} (now {size})"
        if not peak_in_passes or size == 1:
            smaller = f"--depth={model_config.num_layers // 2 or 1} (now {model_config.num_layers})"
        lower = "lower" if grad_checkpoint or not peak_in_passes else "give --grad-checkpoint, or lower"
        free = f"{free_bytes / gib:.1f} GiB that are free for a rank"
        lines.append(f"warning    more than the {free}: {lower} {smaller}")
    return lines


def describe_model(plan: Plan, model_config: "GPTConfig", reason: str) -> list[str]:
    """The printed lines about the model; `reason`: why it has this depth."""
    counts = plan.parameters
    tables = sum(count for role, count in counts.items() if "embedding" in role and role != "unembedding")
    return [
        f"model      depth {model_config.num_layers} ({reason}), width {model_config.model_dim}",
        f"weights    {counts['matrix']:,} in matrices, {counts['unembedding']:,} in the head, {tables:,} in tables",
    ]


def describe_horizon(
    plan: Plan, horizon: Horizon, num_steps: int, tokens: float, text_tokens: float, folder: object
) -> list[str]:
    """The printed lines about the length of a run of `num_steps` and `tokens`, on about `text_tokens` in `folder`."""
    minutes = horizon.target_minutes or plan.seconds / 60
    lines = [
        f"horizon    {'about ' if horizon.is_timed else ''}{num_steps:,} steps, {tokens / 1e6:,.1f} M tokens,"
        f" {tokens * plan.flops_per_token:.1e} FLOPs, about {minutes:.1f} minutes",
        f"data       about {text_tokens / 1e6:,.1f} M tokens in {folder}: {tokens / text_tokens:.1f} epochs",
    ]
    if tokens > 2 * text_tokens:  # a small model with tables begins to memorize then (dev/LOG.md)
        lines.append("warning    more than 2 epochs: more text would help more than more steps")
    return lines


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


def schedule_name(name: str) -> str:
    """The current name of a schedule; runs made before the renaming call WSD `trapezoid`."""
    return "wsd" if name == "trapezoid" else name


def momentum(
    progress: float,
    warmdown: float,
    values: tuple[float, float, float] = (MOMENTUM_START, MOMENTUM_PEAK, MOMENTUM_END),
    warmup: float = MOMENTUM_WARMUP,
) -> float:
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
