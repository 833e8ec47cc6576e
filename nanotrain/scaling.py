"""The one dial: from depth to width, heads, batch, horizon and learning rates. Pure arithmetic, so that a plan can be
tested and printed.
"""

import math
from dataclasses import asdict, dataclass

from nanotrain.errors import UserError
from nanotrain.memory import Memory, memory_plan

# Batch in tokens against the training tokens D, a power law through two recipes that are known to work: 4,096 at 3
# million tokens (minutes on a CPU) and 2^19 at 1.4 billion (nanochat's depth 12). Between and beyond them it is an
# assumption.
BATCH_ANCHOR_TOKENS, BATCH_ANCHOR = 3e6, 4096
BATCH_EXPONENT = math.log(2**19 / BATCH_ANCHOR) / math.log(1.4e9 / BATCH_ANCHOR_TOKENS)
MAX_BATCH = 2**20
REFERENCE_WIDTH = 768

# The weights in matrices and head that reach the lowest loss for a number of operations: a power law through the best
# of our own runs of minutes on a CPU (dev/ladder.md) and nanochat's published optimum. Between them it is an
# assumption.
OPTIMUM_FLOPS, OPTIMUM_WEIGHTS = 7.2e13, 3.0e6
OPTIMUM_EXPONENT = math.log(129e6 / OPTIMUM_WEIGHTS) / math.log(1e18 / OPTIMUM_FLOPS)
WIDTH_PER_LAYER, LEAST_WIDTH = 64, 256
MOST_LAYERS = 26
# (up to this width, tokens of a vocabulary or of a row); only the first of each was measured by us
VOCABULARIES = ((256, 4096), (512, 8192), (640, 16384), (math.inf, 32768))
ROW_LENGTHS = ((384, 256), (512, 512), (640, 1024), (math.inf, 2048))
EFFICIENCY = 0.9  # of training with everything that belongs to it, against `hardware.training_flops_per_second`
START_SECONDS = 20.0  # of a run by time that do not train: imports, compilation, evaluations, the last save


@dataclass(frozen=True)
class Horizon:
    """What sets the length of a run; the first that is not zero counts, `param_data_ratio` last."""

    num_iterations: int = 0
    target_flops: float = 0.0
    target_minutes: float = 0.0
    param_data_ratio: float = 10.0


@dataclass(frozen=True)
class Plan:
    """What a run will do. rows of a step = device_rows * accumulation * world_size."""

    parameters: dict  # role -> count
    flops_per_token: int
    total_batch_size: int  # tokens
    device_rows: int
    accumulation: int
    num_steps: int
    tokens: int
    flops: float
    seconds: float  # an estimate, from the measured rate of matrix products
    memory: Memory  # of one rank

    def to_dict(self):
        """The fields as a JSON-like dict."""
        return asdict(self)


def make_plan(
    parameters,
    model_config,
    horizon,
    *,
    total_batch_size,
    device_batch_size,
    world_size,
    flops_per_second,
    kept,
    mean_batch_share=1.0,
    batch_parts=1,
):
    """The Plan of a run.

    parameters: {role: count}. model_config: the GPTConfig. total_batch_size: tokens of a step, 0 to let the horizon
    decide. device_batch_size: most rows of a forward pass. flops_per_second: what all ranks together are expected to
    reach. kept: the memory.Kept that says how the model runs. mean_batch_share: of total_batch_size over the run, where
    the batch grows, and batch_parts: into how many equal parts of whole forward passes a step is cut for that. Raises
    UserError for a batch that cannot be met.
    """
    seq_len = model_config.max_seq_len
    weights = parameters["matrix"] + parameters["unembedding"]
    flops_per_token = training_flops_per_token(weights, model_config.num_layers, model_config.model_dim, seq_len)
    if horizon.num_iterations:
        tokens = None
    elif horizon.target_flops:
        tokens = horizon.target_flops / flops_per_token
    elif horizon.target_minutes:  # an estimate, until steps have been timed
        tokens = horizon.target_minutes * 60 * flops_per_second / flops_per_token
    else:
        tokens = horizon.param_data_ratio * weights
    if not total_batch_size:
        total_batch_size = batch_tokens(tokens or horizon.param_data_ratio * weights, seq_len, world_size, batch_parts)
    device_rows, accumulation = split_batch(total_batch_size, seq_len, device_batch_size, world_size, batch_parts)
    mean_tokens = total_batch_size * mean_batch_share
    num_steps = horizon.num_iterations or max(round(tokens / mean_tokens), 1)
    tokens = round(num_steps * mean_tokens)
    flops = float(tokens * flops_per_token)
    return Plan(
        parameters,
        flops_per_token,
        total_batch_size,
        device_rows,
        accumulation,
        num_steps,
        tokens,
        flops,
        flops / flops_per_second,
        memory_plan(parameters, model_config, device_rows, accumulation, world_size, kept),
    )


def training_flops(minutes, flops_per_second):
    """The operations that a run of so many minutes, from process start to its last save, has for training."""
    seconds = 60 * minutes
    return max(seconds - START_SECONDS, seconds / 2) * flops_per_second


def choose_depth(flops, head_dim, aspect_ratio=0):
    """The depth whose weights are nearest to those that suit a run of so many operations."""
    goal = OPTIMUM_WEIGHTS * (flops / OPTIMUM_FLOPS) ** OPTIMUM_EXPONENT

    def distance(depth):
        width, _ = model_width(depth, aspect_ratio, head_dim)
        return abs(math.log((12 * depth * width**2 + vocabulary(width) * width) / goal))

    return min(range(2, MOST_LAYERS + 1), key=distance)


def vocabulary(width):
    """The tokens of a vocabulary that suits a model's width."""
    return next(size for most, size in VOCABULARIES if width <= most)


def row_length(width):
    """The tokens of a row that suit a model's width."""
    return next(length for most, length in ROW_LENGTHS if width <= most)


def model_width(depth, aspect_ratio, head_dim):
    """(width, heads) of a model of `depth` layers: aspect_ratio times depth, or by the rule if that is 0, rounded up to
    whole heads.
    """
    if depth < 1 or aspect_ratio < 0 or head_dim < 2 or head_dim % 2:
        raise UserError(
            f"--depth={depth} --aspect-ratio={aspect_ratio} --head-dim={head_dim}: "
            "all must be positive, and the head dimension even"
        )
    width = depth * aspect_ratio or max(depth * WIDTH_PER_LAYER, LEAST_WIDTH)
    heads = math.ceil(width / head_dim)
    return heads * head_dim, heads


def training_flops_per_token(weights, depth, width, seq_len):
    """Operations of one token's forward and backward pass: six per weight of a matrix or the head, and attention over
    the whole row.
    """
    return 6 * weights + 12 * depth * width * seq_len


def batch_tokens(training_tokens, seq_len, world_size, parts=1):
    """The tokens of a step that suit a horizon: the rule's power of two, as near to it as `parts` times whole rows on
    every rank allow.
    """
    ideal = BATCH_ANCHOR * (training_tokens / BATCH_ANCHOR_TOKENS) ** BATCH_EXPONENT
    ideal = 2 ** round(math.log2(min(max(ideal, BATCH_ANCHOR), MAX_BATCH)))
    unit = seq_len * world_size * parts
    return max(round(ideal / unit), 1) * unit


def split_batch(total_batch_size, seq_len, device_batch_size, world_size, parts=1):
    """(device_rows, accumulation) of a step: `device_batch_size` is the most rows of one forward pass, lowered to a
    divisor of those of a rank, so that they make up `parts` equal parts of whole passes.

    Raises UserError with three sizes that work if rows of `seq_len` tokens on `world_size` ranks cannot make up the
    total.
    """
    unit = seq_len * world_size * parts
    if total_batch_size % unit or total_batch_size < 1:
        first = max(total_batch_size // unit, 1)
        works = ", ".join(str((first + extra) * unit) for extra in range(3))
        growing = f" x {parts} parts of a growing batch" if parts > 1 else ""
        raise UserError(
            f"--total-batch-size={total_batch_size} is no multiple of {unit} tokens "
            f"({world_size} ranks x rows of {seq_len}{growing}): three that work are {works}"
        )
    if device_batch_size < 1:
        raise UserError(f"--device-batch-size={device_batch_size}: at least 1 row")
    part_rows = total_batch_size // unit
    device_rows = next(rows for rows in range(min(device_batch_size, part_rows), 0, -1) if part_rows % rows == 0)
    return device_rows, parts * part_rows // device_rows


def width_factor(width):
    """Factor of the embeddings' and the head's learning rates against those at the reference width."""
    return (width / REFERENCE_WIDTH) ** -0.5
