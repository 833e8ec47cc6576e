"""The memory that a run needs, before it begins: of tensors, by what a step keeps and when, and of the process. Pure
arithmetic; tests compare it with what torch takes.
"""

from dataclasses import dataclass

# A process without a GPU takes more memory than its tensors (dev/LOG.md): what torch loads and prepares in its first
# step, and the holes of a heap in which an aligned block does not fit where its like has been.
LOADED_BYTES, HEAP = 150e6, 2.0
MESSAGE_BYTES = 2**26  # up to which ranks send tensors together, in copies: that of dist.py


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


def process_growth(memory):
    """The bytes by which a process on the CPU will grow at most, from before it makes the model."""
    lasting = memory.weights + memory.optimizer
    return round(LOADED_BYTES + lasting + HEAP * (memory.peak - lasting))


def memory_plan(parameters, model_config, device_rows, accumulation, world_size, kept):
    """The Memory that one rank needs, of tensors alone.

    parameters: {role: count}. model_config: the GPTConfig, with as many heads for keys and values as for queries. kept:
    the Kept that says how the model runs. What is smaller than a hundredth of a layer (the norms' factors, softmax
    sums, positions) is left out.
    """
    width = model_config.model_dim
    hidden = device_rows * model_config.max_seq_len * width
    matrices, pairs = parameters["matrix"], parameters.get("bigram_embedding", 0)
    dense = sum(parameters.values()) - pairs
    rows = 4 * min(hidden * accumulation * world_size, pairs)  # of the table of pairs that have a gradient
    weights, gradients = 4 * (dense + pairs), 4 * dense + rows
    optimizer = (4 * matrices + 8 * (dense - matrices)) // world_size + 8 * pairs // width
    lasting = accumulation > 1 or world_size > 1  # gradients that are there during every pass
    held = 4 * dense + 4 * min(hidden, pairs) * (accumulation - 1) if lasting else 0
    activations, logits, moments = _pass_bytes(parameters, model_config, device_rows, kept, 0 if lasting else gradients)
    moments = {name: held + size for name, size in moments.items()}
    moments["update"] = gradients + _update_bytes(parameters, model_config, rows, world_size, kept)
    moment = max(moments, key=moments.get)
    peak = weights + optimizer + moments[moment]
    return Memory(weights, gradients, optimizer, activations, logits, peak, moment)


def _pass_bytes(parameters, model_config, device_rows, kept, gradients):
    """(activations, logits, {moment: most bytes}) of a forward and backward pass that makes so many bytes of gradients.

    N tokens, C width, V vocabulary, e bytes of an element.
    """
    depth, width = model_config.num_layers, model_config.model_dim
    vocab_size, seq_len = model_config.vocab_size, model_config.max_seq_len
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


def _update_bytes(parameters, model_config, rows, world_size, kept):
    """The most bytes that the optimizers take for a while; rows: bytes of a sparse gradient."""
    depth, width, vocab_size = model_config.num_layers, model_config.model_dim, model_config.vocab_size
    stack = -(-2 * depth // world_size) * 4 * width**2  # of the MLP's matrices that a rank orthogonalises at once
    gram, low = stack // 4, kept.element_bytes < 4
    muon = 14 * stack + 2 * gram if low else 16 * stack + 8 * gram  # update, stack, iterate, next or float32 result
    sent = parameters["matrix"]
    if 4 * vocab_size * width <= MESSAGE_BYTES // 2:
        sent = sum(count for role, count in parameters.items() if role != "bigram_embedding")
    return (4 * sent if world_size > 1 else 0) + max(muon, 2 * world_size * rows)
