"""The one dial: from depth to width, heads, batch, horizon, learning rates and memory. Pure arithmetic, so that a plan
can be tested and printed.
"""

import math
from dataclasses import asdict, dataclass

from nanotrain.errors import UserError

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
# A process without a GPU takes more memory than its tensors (dev/LOG.md): what torch loads and prepares in its first
# step, and the holes of a heap in which an aligned block does not fit where its like has been.
LOADED_BYTES, HEAP = 150e6, 2.0
MESSAGE_BYTES = 2**26  # of runtime: up to which ranks send tensors together, in copies
# width up to which a vocabulary and a row of so many tokens serve; only the first was measured by us
VOCABULARIES = ((256, 4096), (512, 8192), (640, 16384), (math.inf, 32768))
ROW_LENGTHS = ((384, 256), (512, 512), (640, 1024), (math.inf, 2048))
EFFICIENCY = 0.9  # of training with everything that belongs to it, against the rate of `runtime.training_flops`
START_SECONDS = 20.0  # of a run by time that do not train: imports, compilation, evaluations, the last save


@dataclass(frozen=True)
class Horizon:
    """What sets the length of a run; the first that is not zero counts, `param_data_ratio` last."""

    num_iterations: int = 0
    target_flops: float = 0.0
    target_minutes: float = 0.0
    param_data_ratio: float = 10.0


@dataclass(frozen=True)
class Kept:
    """How a model runs, as far as it matters to what is kept for the backward pass."""

    element_bytes: int  # 2 or 4, of an activation
    compiled: bool
    grad_checkpoint: bool  # only the inputs of blocks
    loss_rows: int  # of which the loss has the logits at once


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. They are not all needed at once: `peak` is the most at any time of a step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int  # with what the backward pass of a layer needs for a while
    logits: int  # of a chunk of the loss, with its gradients
    peak: int
    moment: str  # when: in the loss, in the backward pass or in the update


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
    depth,
    width,
    vocab_size,
    seq_len,
    horizon,
    total_batch_size,
    device_batch_size,
    world_size,
    flops_per_second,
    kept,
    mean_batch_share=1.0,
    batch_parts=1,
):
    """The Plan of a run.

    parameters: {role: count}. total_batch_size: tokens of a step, 0 to let the horizon decide. device_batch_size: most
    rows of a forward pass. flops_per_second: what all ranks together are expected to reach. kept: how the model
    runs. mean_batch_share: of total_batch_size over the run, where the batch grows, and batch_parts: into how many
    equal parts of whole forward passes a step is cut for that. Raises UserError for a batch that cannot be met.
    """
    weights = parameters["matrix"] + parameters["unembedding"]
    flops_per_token = training_flops_per_token(weights, depth, width, seq_len)
    if horizon.num_iterations:
        tokens = None
    elif horizon.target_flops:
        tokens = horizon.target_flops / flops_per_token
    elif horizon.target_minutes:
        tokens = horizon.target_minutes * 60 * flops_per_second / flops_per_token
    else:
        tokens = horizon.param_data_ratio * weights
    if not total_batch_size:
        total_batch_size = batch_tokens(tokens or horizon.param_data_ratio * weights, seq_len, world_size, batch_parts)
    device_rows, accumulation = split_batch(total_batch_size, seq_len, device_batch_size, world_size, batch_parts)
    mean_tokens = total_batch_size * mean_batch_share
    num_steps = horizon.num_iterations or max(round(tokens / mean_tokens), 1)
    tokens = round(num_steps * mean_tokens)
    shape = (depth, width, vocab_size, seq_len)
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
        memory_plan(parameters, shape, device_rows, accumulation, world_size, kept),
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


def process_growth(memory):
    """The bytes by which a process on the CPU will grow at most, from before it makes the model."""
    lasting = memory.weights + memory.optimizer
    return round(LOADED_BYTES + lasting + HEAP * (memory.peak - lasting))


def memory_plan(parameters, shape, device_rows, accumulation, world_size, kept):
    """The Memory that one rank needs, of tensors alone.

    parameters: {role: count}. shape: (depth, width, vocabulary, tokens of a row), with as many heads for keys and
    values as for queries. kept: the Kept that says how the model runs. What is smaller than a hundredth of a layer (the
    norms' factors, softmax sums, positions) is left out.
    """
    width, hidden = shape[1], device_rows * shape[3] * shape[1]
    matrices, pairs = parameters["matrix"], parameters.get("bigram_embedding", 0)
    dense = sum(parameters.values()) - pairs
    rows = 4 * min(hidden * accumulation * world_size, pairs)  # of the table of pairs that have a gradient
    weights, gradients = 4 * (dense + pairs), 4 * dense + rows
    optimizer = (4 * matrices + 8 * (dense - matrices)) // world_size + 8 * pairs // width
    lasting = accumulation > 1 or world_size > 1  # gradients that are there during every pass
    held = 4 * dense + 4 * min(hidden, pairs) * (accumulation - 1) if lasting else 0
    activations, logits, moments = _pass_bytes(parameters, shape, device_rows, kept, 0 if lasting else gradients)
    moments = {name: held + size for name, size in moments.items()}
    moments["update"] = gradients + _update_bytes(parameters, shape, rows, world_size, kept)
    moment = max(moments, key=moments.get)
    peak = weights + optimizer + moments[moment]
    return Memory(weights, gradients, optimizer, activations, logits, peak, moment)


def _pass_bytes(parameters, shape, device_rows, kept, gradients):
    """(activations, logits, {moment: most bytes}) of a forward and backward pass that makes so many bytes of gradients.

    N tokens, C width, V vocabulary, e bytes of an element.
    """
    depth, width, vocab_size, seq_len = shape
    e, hidden, table = kept.element_bytes, device_rows * seq_len * width, vocab_size * width  # N C and V C
    low = e if e < 4 else 0  # of the second copy of a weight that the products take

    # Of a layer, in C: its input; the normed inputs of attention and MLP; q, k, v and what attention gives; the hidden
    # units (4) before and after they are squared: 15. Eager norms also keep their four inputs in float32; compiled ones
    # three as they are, and make the first again from the layer's own.
    layer = hidden * (18 * e if kept.compiled else 15 * e + 16)
    copies = low * parameters["matrix"]
    inputs = (8 + e) * hidden  # of the first and the last norm, in float32, and what the first gives to all layers
    inputs += e * hidden * (parameters.get("value_embedding", 0) // table)
    blocks = depth * e * hidden if kept.grad_checkpoint else depth * layer + copies
    one = layer + copies // depth
    again = one if kept.grad_checkpoint else 0  # of the layer that is run again
    passing = hidden * (20 if kept.compiled else 13 * e)  # gradients on their way through a layer

    # The loss has the gradients of hidden states and head ready, and the logits of a chunk: those of this and the last
    # in e, and of the kernel's steps so many in float32 as are there at once.
    ready = e * hidden + 4 * table
    chunk = min(kept.loss_rows, device_rows * seq_len) * vocab_size
    logits = chunk * (3 * e + (8 if low else 4) if kept.compiled else 2 * e + 20)
    cached = copies if kept.grad_checkpoint and not kept.compiled else 0  # by autocast, until the forward pass ends
    loss = inputs + blocks + cached + ready + e * hidden + low * table + logits
    first = inputs + blocks + max(2 * ready, 4 * table + again + passing)  # the last layer, where nothing is free yet
    last = inputs + one + passing + gradients
    return inputs + blocks + again + passing, ready + logits, {"loss": loss, "backward": max(first, last)}


def _update_bytes(parameters, shape, rows, world_size, kept):
    """The most bytes that the optimizers take for a while; rows: bytes of a sparse gradient."""
    depth, width, vocab_size, _ = shape
    stack = -(-2 * depth // world_size) * 4 * width**2  # of the MLP's matrices that a rank orthogonalises at once
    gram, low = stack // 4, kept.element_bytes < 4
    muon = 14 * stack + 2 * gram if low else 16 * stack + 8 * gram  # update, stack, iterate, next or float32 result
    sent = parameters["matrix"]
    if 4 * vocab_size * width <= MESSAGE_BYTES // 2:
        sent = sum(count for role, count in parameters.items() if role != "bigram_embedding")
    return (4 * sent if world_size > 1 else 0) + max(muon, 2 * world_size * rows)
