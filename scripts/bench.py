"""Time and memory tables, one a question; run it on a machine that does nothing else.

    python -m scripts.bench                    all tables
    python -m scripts.bench precision depth    these
    python -m scripts.bench step               where the time of one training step goes

Each variant lives in a process of its own, so that no setting, compiled code or memory of another can reach it, and
all are alive at once: repetition r measures every variant once before repetition r + 1 begins. A row has the median
and the spread of its repetitions; "of matmul" is the share of the rate that one large matrix product reached in the
same process, dtype and repetition; memory is the peak of the whole process, Python and torch included. Tables on
random tokens need no data; `loader` and `step` read a data set. Markdown goes to the terminal, the same as JSON to
--out.
"""

import contextlib
import itertools
import math
import multiprocessing
import random
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd import DeviceType
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from nanotrain import (
    checkpoint,
    config,
    dataloader,
    dataset,
    engine,
    errors,
    gpt,
    hardware,
    loss,
    optim,
    paths,
    recipe,
)
from nanotrain.dist import init_distributed
from nanotrain.errors import UserError
from nanotrain.files import write_json
from nanotrain.tokenizer import BPETokenizer

# --- machine
DEVICE = "auto"  # auto, cuda, mps or cpu
DTYPE = "auto"  # of the matrix products: auto, bfloat16, float16 or float32
COMPILE = "auto"  # in the tables that are not about it: auto (where there is a compiler), on or off
# --- model
DEPTH = 4  # layers; the width follows
ASPECT_RATIO = 0  # width per layer; 0: 64, and a width of at least 256
HEAD_DIM = 128  # the width is rounded up to whole heads
VOCAB_SIZE = 4096  # of the tables on random tokens
BIGRAM_ROWS = 65536  # of the hashed bigram table; 0: no table
# --- batch
DEVICE_BATCH_SIZE = 16  # sequences of one forward pass
MAX_SEQ_LEN = 256  # tokens of a sequence
# --- data, for the tables loader and step
DATA_DIR = ""  # folder of shards; empty: the only data set in NANOTRAIN_DIR/data
TOKENIZER_DIR = ""  # folder of tokenizer.json; empty: NANOTRAIN_DIR/tokenizer
LOADER_TOKENS = 4_000_000  # per measurement of the loader; with fewer, the first read of each slice would dominate
# --- measurement
REPETITIONS = 5  # of every measurement
OUT = ""  # file for the JSON; empty: none
# ------------

SHAPES = ((16, 256), (32, 2048))  # of the loader's batches
DEPTHS = (2, 4, 6, 8, 10, 12)
DEEP = 8  # layers of the second model of the table generation
STEPS_A_REPETITION = 3  # of the table step, whose medians must agree to a few percent
NUM_STREAMS = 48
ENDING_SECONDS = 5  # that a process has to end when it is not asked any more
SECONDS = 0.3  # a shorter measurement is made of several calls
RATES = {"matrix": 0.02, "embedding": 0.2, "unembedding": 0.004, "scalar": 0.04}  # any that keep the weights finite
MATMULS = {"mm", "addmm", "bmm", "baddbmm"}
PARTS = ("matmul", "attention", "loss", "norms and residuals", "optimizer", "loader", "rest")


def main(names=()):
    tables = {
        "precision": precision_table,
        "compile": compile_table,
        "attention": attention_table,
        "loss": loss_table,
        **{
            name: partial(training_table, name)
            for name in ("accumulation", "batch", "length", "checkpointing", "depth")
        },
        "generation": generation_table,
        "optimizer": optimizer_table,
        "loader": loader_table,
        "step": step_table,
    }
    check_settings(names, tables)
    dist = init_distributed(DEVICE, DTYPE, deterministic=False)
    environment = hardware.environment(dist.device, dist.dtype, dist.world_size)
    found = {"environment": environment, "settings": config.settings(__name__), "tables": {}}
    print(f"{environment['device_name']}, {environment['threads']} threads, {environment['dtype']}, ", end="")
    print(f"torch {environment['packages']['torch']}, commit {environment['commit']}")
    for name in names or tables:
        found["tables"][name] = rows = tables[name]()
        print(f"\n## {name}\n\n{markdown(rows)}", flush=True)
        if OUT:  # after every table, so that an interruption loses only one
            write_json(OUT, found)


def check_settings(names, tables):
    unknown = [name for name in names if name not in tables]
    if unknown:
        raise UserError(f"no table {unknown[0]!r}: there are {', '.join(tables)}")
    config.choice("COMPILE", COMPILE, ("auto", "on", "off"))
    positive = ("REPETITIONS", "LOADER_TOKENS", "DEVICE_BATCH_SIZE", "MAX_SEQ_LEN", "VOCAB_SIZE")
    config.check_numbers(config.snapshot(__name__), at_least_one=positive)
    recipe.model_width(DEPTH, ASPECT_RATIO, HEAD_DIM)
    if {"loader", "step"} & set(names or tables):  # now, and not after the minutes that the others take
        BPETokenizer.load(paths.tokenizer_dir(TOKENIZER_DIR))
        dataset.open_shards(paths.data_dir(DATA_DIR))


# ---- what is measured: `prepare...(dist, ...)` gives the function to be timed ----


@dataclass(frozen=True)
class Training:
    """Whole training steps of a model."""

    depth: int
    width: int
    head_dim: int
    vocab_size: int
    rows: int
    seq_len: int
    compile_mode: str  # off, block or whole
    bigram_rows: int
    grad_accum_steps: int = 1
    checkpointing: str = "off"  # or on

    def work(self):
        """(function to prepare it on random tokens, tokens of a step, FLOPs of a step by the formula of the plan)."""
        tokens = self.rows * self.seq_len * self.grad_accum_steps
        flops = tokens * recipe.training_flops_per_token(self.weights(), self.depth, self.width, self.seq_len)
        return partial(prepare_training, training=self), tokens, flops

    def weights(self):
        """How many numbers the matrices that every token meets have."""
        return sum(p.numel() for role in ("matrix", "unembedding") for p in self.parameters(role))

    def parameters(self, role):
        """Those of a role, without memory."""
        return checkpoint.build_model(self.config(), "meta").parameters_by_role()[role].values()

    def config(self):
        """The model's shape."""
        heads = self.width // self.head_dim
        return gpt.GPTConfig(self.vocab_size, self.seq_len, self.depth, heads, heads, self.head_dim, self.bigram_rows)

    def build(self, dist):
        """(model, its optimizers) with random weights, compiled as asked."""
        model = checkpoint.build_model(self.config(), dist.device)
        model.init_weights(0)
        if self.checkpointing == "on":
            model.checkpoint_activations()
        if self.compile_mode != "off":
            hardware.trust_cpu_flags(True)
        if self.compile_mode == "whole":
            model.compile(dynamic=False)
        elif self.compile_mode == "block":
            model.compile_parts()
        muon_dtype = torch.bfloat16 if dist.dtype == torch.bfloat16 else torch.float32
        return model, optim.build_optimizers(model.parameters_by_role(), RATES, 0.0, muon_dtype, dist)


def prepare_training(dist, training, next_batch=None):
    """An optimizer step as scripts/base_train.py does it, without its log; the same random tokens again and again if
    `next_batch`, which gives (inputs, targets), is None.
    """
    return training_step(dist, training, *training.build(dist), next_batch)


def training_step(dist, training, model, optimizers, next_batch=None):
    """The same for a model that is built already."""
    parameters = list(model.parameters())
    tokens = torch.randint(training.vocab_size, (2, training.rows, training.seq_len), device=dist.device)

    def step():
        for _ in range(training.grad_accum_steps):
            with record_function("loader"):
                inputs, targets = next_batch() if next_batch else tokens
            with dist.autocast():
                mean = model(inputs, targets) / training.grad_accum_steps
            mean.backward()
        with record_function("optimizer"):
            torch.nn.utils.get_total_norm(optim.collect_gradients(parameters, dist))
            optim.step(optimizers)
        for parameter in parameters:
            parameter.grad = None

    return step


def prepare_optimizers(dist, training):
    """The optimizers' step with the gradients of one sequence, as a function that gives {part: seconds}."""
    model, (muon, adamw, *rowwise_adam) = training.build(dist)
    tokens = torch.randint(training.vocab_size, (2, 1, training.seq_len), device=dist.device)
    with dist.autocast():
        model(*tokens).backward()
    muons = [  # one a stack: of a whole Muon one could not tell the update of a stack from the momentum of the next
        optim.Muon(dict(zip(group["names"], group["params"], strict=True)), group["lr"], dist, dtype=muon.dtype)
        for group in muon.param_groups
    ]
    roles = {name: role for role, named in model.parameters_by_role().items() for name in named}
    others = [(f"AdamW {roles[group['names'][0]]}", optim.AdamW([group], dist)) for group in adamw.param_groups]
    others += [("RowwiseAdam bigram_embedding", optimizer) for optimizer in rowwise_adam]
    orthogonalize, marks = optim.orthogonalize, []

    def mark():
        hardware.synchronize(dist.device)
        marks.append(time.perf_counter())

    def timed(*arguments):
        mark()
        result = orthogonalize(*arguments)
        mark()
        return result

    def run():
        parts = dict.fromkeys(("Muon momentum", "Muon orthogonalisation", "Muon update"), 0.0)
        for parts_of_it, optimizer in [
            *((list(parts), stack) for stack in muons),
            *(([name], other) for name, other in others),
        ]:
            marks.clear()
            mark()
            with replaced(optim, "orthogonalize", timed):
                optimizer.step()
            mark()
            for part, (begin, end) in zip(parts_of_it, itertools.pairwise(marks), strict=True):
                parts[part] = parts.get(part, 0.0) + end - begin
        return parts

    return run


def prepare_generation(dist, training, method, texts):
    """So many texts of `training.seq_len` tokens at once, each from a prompt of one token."""
    model = checkpoint.build_model(training.config(), dist.device)
    model.init_weights(0)
    model.requires_grad_(False)
    return partial(METHODS[method], model, [[0]] * texts)


def cached(model, prompts):
    """As scripts/generate.py does it; the lists of tokens."""
    return list(engine.generate_batch(model, prompts, model.config.max_seq_len, seed=0))


def uncached(model, prompts):
    """The same as one would write it first: for each token a forward pass over the whole text."""
    tokens = torch.tensor(prompts, device=model.lm_head.weight.device)
    draws, steps = [random.Random(n) for n in range(len(prompts))], []
    for _ in range(model.config.max_seq_len):
        steps.append(engine.pick(model.logits(tokens)[:, -1], 0.8, 50, 1.0, draws))
        tokens = torch.cat((tokens, torch.tensor(steps[-1:], device=tokens.device).T), 1)
    return steps


def products(model, prompts):
    """The matrix-vector products of so many tokens and nothing else."""
    roles = model.parameters_by_role()
    matrices = [*roles["matrix"].values(), *roles["unembedding"].values()]
    vectors = {matrix.size(1): matrix.new_ones(len(prompts), matrix.size(1)) for matrix in matrices}
    for _ in range(model.config.max_seq_len):
        for matrix in matrices:
            F.linear(vectors[matrix.size(1)], matrix)


METHODS = {"no cache": uncached, "cache": cached, "products alone": products}


def prepare_attention(dist, kernel, compiled, shape):
    """Forward and backward pass of one layer's attention over (B, H, T, D)."""
    function = torch.compile(KERNELS[kernel], dynamic=False) if compiled else KERNELS[kernel]
    q, k, v, gradient = (torch.randn(shape, device=dist.device).to(dist.dtype) for _ in range(4))
    q, k = (gpt.norm(x, gpt.GPTConfig.norm_eps) for x in (q, k))  # as QK-norm leaves them, which bounds the scores
    inputs = [x.requires_grad_() for x in (q, k, v)]
    scale = gpt.GPTConfig.attention_gain / math.sqrt(shape[-1])
    return lambda: torch.autograd.grad(function(*inputs, scale), inputs, gradient)


def sdpa(q, k, v, scale):
    """What the model uses."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


def explicit_softmax(q, k, v, scale):
    """All scores, masked, and torch's softmax."""
    mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril()
    return (q @ k.mT * scale).masked_fill(~mask, -math.inf).softmax(-1) @ v


def explicit_exp(q, k, v, scale, segments=1):
    """exp without subtracting a maximum; each of `segments` runs of queries leaves out the keys after its last one."""
    outputs, length = [], -(-q.size(2) // segments)
    for start in range(0, q.size(2), length):
        end = min(start + length, q.size(2))
        mask = torch.ones(end - start, end, dtype=torch.bool, device=q.device).tril(start)
        scores = (q[:, :, start:end] @ k[:, :, :end].mT).float() * scale
        weights = torch.where(mask, scores.exp(), 0.0)
        outputs.append((weights / weights.sum(-1, keepdim=True)).to(v.dtype) @ v[:, :, :end])
    return torch.cat(outputs, 2)


KERNELS = {
    "SDPA": sdpa,
    "softmax": explicit_softmax,
    "exp": explicit_exp,
    "exp, 2 segments": partial(explicit_exp, segments=2),
}


def prepare_loss(dist, chunk, compiled, tokens, width, vocab_size):
    """Forward and backward pass from the last hidden states to the loss, by chunks of so many rows or with "full"
    logits.
    """
    hidden = torch.randn(tokens, width, device=dist.device).to(dist.dtype).requires_grad_()
    weight = (torch.randn(vocab_size, width, device=dist.device) / width).requires_grad_()
    targets, cap = torch.randint(vocab_size, (tokens,), device=dist.device), gpt.GPTConfig.softcap
    function = full_loss if chunk == "full" else loss.softmax_gradient
    function = torch.compile(function, dynamic=False) if compiled else function

    def run():
        if chunk == "full":
            return torch.autograd.grad(function(hidden, weight, targets, cap), (hidden, weight))
        with replaced(loss, "CHUNK_ROWS", {dist.device.type: chunk}):
            return torch.autograd.grad(loss.mean_loss(hidden, weight, targets, cap, function), (hidden, weight))

    return run


def full_loss(hidden, weight, targets, cap):
    """The loss as one would write it first: every logit in float32 at once."""
    return F.cross_entropy(loss.softcap(F.linear(hidden, weight.to(hidden.dtype)).float(), cap), targets)


@contextlib.contextmanager
def replaced(module, name, value):
    """`module.name` is `value` for a while."""
    old = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, old)


# ---- measuring ----


@dataclass(frozen=True)
class Variant:
    """One row of a table: what to run, and how the process that runs it is set up."""

    labels: dict  # the columns that tell it from the others
    prepare: object  # called with the process's DistContext
    tokens: int  # of one call; 0: a call has nothing to do with tokens
    flops: int
    device: str
    dtype: str
    float32_precision: str = "highest"  # torch.set_float32_matmul_precision
    cache_dir: str = ""  # of compiled code; empty: torch's own
    watched: Training | None = None  # whose matrix products' dtypes become a column


def session(variant):
    """Yields {"first_seconds", "dtypes"} when the variant is ready in this process, and then, as often as asked, a
    measurement: the rate of the large matrix product, and right after it the time of a call.
    """
    if variant.cache_dir:
        hardware.use_compile_cache(variant.cache_dir)
    dist = init_distributed(variant.device, variant.dtype, deterministic=False)
    torch.set_float32_matmul_precision(variant.float32_precision)
    dtypes = matmul_dtypes(dist, variant.watched) if variant.watched else None
    function = variant.prepare(dist)
    first_seconds, _ = seconds_of(dist, function)
    for _ in range(2):  # the second also meets the memory that the first has left
        seconds, _ = seconds_of(dist, function)
    calls = max(round(SECONDS / seconds), 1)
    yield {"first_seconds": first_seconds, "dtypes": dtypes}
    while True:
        rate = hardware.matmul_flops(dist.device, dist.dtype, SECONDS / 2)
        seconds, result = seconds_of(dist, function, calls)
        parts = result if isinstance(result, dict) else None
        yield {"seconds": seconds, "rate": rate, "parts": parts, "memory": hardware.peak_memory_bytes(dist.device)}


def seconds_of(dist, function, calls=1):
    """(seconds of one call, what the last one returned)."""
    begin = time.perf_counter()
    for _ in range(calls):
        result = function()
    hardware.synchronize(dist.device)
    return (time.perf_counter() - begin) / calls, result


class SeenDtypes(TorchDispatchMode):
    """Collects the dtypes that enter matrix products and attention, below autocast."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in MATMULS or "scaled_dot_product" in name:
            tensors = [x for x in args if isinstance(x, torch.Tensor)][:3]  # what follows are statistics
            self.found |= {str(tensor.dtype).removeprefix("torch.") for tensor in tensors}
        return function(*args, **(kwargs or {}))


def matmul_dtypes(dist, training):
    """The dtypes seen in a whole step on one sequence; eager, because compiled code hides its products."""
    step = prepare_training(dist, replace(training, compile_mode="off", rows=1))
    with SeenDtypes() as seen:
        step()
    return " ".join(sorted(seen.found))


@contextlib.contextmanager
def worker(variant):
    """A function that gives the next answer of a session in a process of its own; {"failed": reason} is the last."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit threads that are not there
    pipe, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, variant))
    process.start()
    theirs.close()

    def ask():
        try:
            pipe.send("next")
            return pipe.recv()
        except (EOFError, OSError):
            return {"failed": "the process was ended, perhaps for want of memory"}

    try:
        yield ask
    finally:
        pipe.close()
        process.join(ENDING_SECONDS)  # by itself, so that it clears up after itself
        process.terminate()  # after Ctrl-C it may be in the middle of a long call
        process.join()


def serve(pipe, variant):
    """A worker's process: answers until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends Ctrl-C to all; the parent ends this one
    answers = session(variant)
    with contextlib.suppress(EOFError, OSError):
        while pipe.recv():
            try:
                answer = next(answers)
            except Exception as error:  # a variant that does not work here is a row that says so
                line = (str(error).strip() or "no message").splitlines()[0]
                answer = {"failed": f"{type(error).__name__}: {line}"}
            pipe.send(answer)


def measure(variants):
    """For each variant the list of its answers: when it is ready, then a measurement in each repetition."""
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(worker(variant)) for variant in variants]
        answers = [[] for _ in variants]
        for turn in progress(range((1 + REPETITIONS) * len(variants)), "measuring"):
            ask, found = workers[turn % len(variants)], answers[turn % len(variants)]
            if not (found and "failed" in found[-1]):
                found.append(ask())
    return answers


def progress(items, text):
    """A bar that is gone when it is done."""
    return tqdm(items, desc=text, leave=False, dynamic_ncols=True)


def table(variants):
    """The rows of variants."""
    return [row(variant, answers) for variant, answers in zip(variants, measure(variants), strict=True)]


def row(variant, answers):
    """What a variant's answers come to."""
    ready, *measurements = answers
    labels = {**variant.labels, **({"dtypes": ready.get("dtypes", "-")} if variant.watched else {})}
    if "failed" in answers[-1]:
        tqdm.write(f"{variant.labels}: {answers[-1]['failed']}", file=sys.stderr)
        return {**labels, "ms": "failed", **dict.fromkeys(("spread", "tok/s", "of matmul", "MiB"), "-")}
    return numbers(labels, [found["seconds"] for found in measurements], measurements, variant.tokens, variant.flops)


def numbers(labels, seconds, measurements, tokens, flops):
    """A row from seconds, one a measurement; tokens or flops of 0 mean that there is nothing to say."""
    shares = [flops / time / found["rate"] for time, found in zip(seconds, measurements, strict=True)]
    return {
        **labels,
        "ms": figure(1000 * statistics.median(seconds)),
        "spread": f"{figure(1000 * min(seconds)):g}-{figure(1000 * max(seconds)):g}",
        "tok/s": round(tokens / statistics.median(seconds)) if tokens else "-",
        "of matmul": round(statistics.median(shares), 2) if flops else "-",
        "MiB": round(max(found["memory"] for found in measurements) / 2**20),
    }


def figure(value):
    """Three digits are all that such a measurement has."""
    return float(f"{value:.3g}") if value < 100 else round(value)


# ---- tables ----


def training(**changes):
    """The settings' training step, with some of its fields changed."""
    width, _ = recipe.model_width(DEPTH, ASPECT_RATIO, HEAD_DIM)
    usual = Training(DEPTH, width, HEAD_DIM, VOCAB_SIZE, DEVICE_BATCH_SIZE, MAX_SEQ_LEN, compile_mode(), BIGRAM_ROWS)
    return replace(usual, **changes)


def compile_mode():
    """`block` where the settings and this machine let it compile, else `off`."""
    return "block" if COMPILE == "on" or (COMPILE == "auto" and hardware.can_compile()) else "off"


def variant(labels, work, dtype="", **options):
    """A Variant on the settings' device."""
    return Variant(labels, *work, DEVICE, dtype or DTYPE, **options)


def precision_table():
    """The same step in float32, in float32 through oneDNN (TF32 on CUDA), and in bfloat16."""
    choices = (("float32", "highest"), ("float32", "medium"), ("bfloat16", "highest"))
    return table(
        [
            variant(
                {"precision": f"{dtype}, oneDNN" if precision == "medium" else dtype},
                training().work(),
                dtype,
                float32_precision=precision,
                watched=training(),
            )
            for dtype, precision in choices
        ]
    )


def compile_table(modes=("off", "block", "whole")):
    """With the seconds of the first step in a new process: cold with an empty cache of compiled code, warm with what
    the cold one left there. Without the bigram table: torch compiles no whole model with its sparse gradient.
    """
    with tempfile.TemporaryDirectory() as folder:
        variants = [
            variant({"compile": mode}, training(compile_mode=mode, bigram_rows=0).work(), cache_dir=f"{folder}/{mode}")
            for mode in modes
        ]
        cold = []
        for each in progress(variants, "cold"):
            with worker(each) as ask:
                cold.append(ask())
        answers = measure(variants)
    rows = []
    for each, first, found in zip(variants, cold, answers, strict=True):
        times = {"cold s": first.get("first_seconds"), "warm s": found[0].get("first_seconds")}
        times = {name: "-" if seconds is None else figure(seconds) for name, seconds in times.items()}
        rows.append(row(replace(each, labels=each.labels | times), found))
    return rows


def attention_table():
    """One layer's attention, forward and backward, as the model does it and as it could be done."""
    heads = recipe.model_width(DEPTH, ASPECT_RATIO, HEAD_DIM)[1]
    shape = (DEVICE_BATCH_SIZE, heads, MAX_SEQ_LEN, HEAD_DIM)
    # over the whole square of scores, as the formula for training counts them
    tokens, flops = DEVICE_BATCH_SIZE * MAX_SEQ_LEN, 12 * math.prod(shape) * MAX_SEQ_LEN
    return table(
        [
            variant(labels, (partial(prepare_attention, kernel=kernel, compiled=compiled, shape=shape), tokens, flops))
            for compiled in compile_choices()
            for kernel in KERNELS
            for labels in ({"kernel": kernel, "compile": "on" if compiled else "off"},)
            if not (compiled and kernel == "SDPA")  # nothing around it to fuse
        ]
    )


def loss_table(chunks=("full", 256, 512, 1024, 4096)):
    """From hidden states to the loss and back, the head's products included."""
    width, _ = recipe.model_width(DEPTH, ASPECT_RATIO, HEAD_DIM)
    tokens = DEVICE_BATCH_SIZE * MAX_SEQ_LEN
    rows = []
    for compiled in compile_choices():
        for chunk in chunks:
            prepare = partial(prepare_loss, chunk=chunk, compiled=compiled)
            prepare = partial(prepare, tokens=tokens, width=width, vocab_size=VOCAB_SIZE)
            labels = {"chunk": chunk, "compile": "on" if compiled else "off"}
            rows.append(variant(labels, (prepare, tokens, 6 * tokens * width * VOCAB_SIZE)))
    return table(rows)


def compile_choices():
    """Whether to compile, for tables that show both."""
    return (False, True) if compile_mode() != "off" else (False,)


def training_table(name):
    """A table of whole training steps; its first columns are the fields of Training in which the rows differ."""
    tokens = DEVICE_BATCH_SIZE * MAX_SEQ_LEN
    changes = {
        # the same rows a step, in so many passes
        "accumulation": [{"grad_accum_steps": n, "rows": max(DEVICE_BATCH_SIZE // n, 1)} for n in (1, 4, 8)],
        "batch": [{"rows": rows} for rows in (4, 8, 16, 32, 64)],
        # about the same tokens a step
        "length": [{"seq_len": length, "rows": max(tokens // length, 1)} for length in (128, 256, 512, 1024, 2048)],
        # each block keeps its activations, or makes them again in the backward pass
        "checkpointing": [{"checkpointing": choice} for choice in ("off", "on")],
        "depth": [{"depth": n, "width": recipe.model_width(n, ASPECT_RATIO, HEAD_DIM)[0]} for n in DEPTHS],
    }
    return table([variant(change, training(**change).work()) for change in changes[name]])


def generation_table():
    """Texts of max_seq_len tokens, with a KV cache and without, several at once, and in a deeper model too against the
    time of their matrix-vector products alone. Speed is that in tokens against one text with a cache. All in float32,
    as logits always are.
    """
    of_both, of_one = [("cache", 1), ("products alone", 1)], [("no cache", 1), ("cache", 4), ("cache", 16)]
    found = []
    for depth in dict.fromkeys((DEPTH, DEEP)):
        model = training(depth=depth, width=recipe.model_width(depth, ASPECT_RATIO, HEAD_DIM)[0])
        variants = []
        for method, texts in of_both + (of_one if depth == DEPTH else []):
            tokens = texts * model.seq_len
            work = (partial(prepare_generation, training=model, method=method, texts=texts), tokens)
            labels = {"depth": depth, "method": method, "texts": texts}
            variants.append(variant(labels, (*work, 2 * model.weights() * tokens), "float32"))
        rows = table(variants)
        found += [
            {**each.labels, "speed": relative(row, rows[0]), **row} for each, row in zip(variants, rows, strict=True)
        ]
    return found


def relative(row, first):
    """How many times the tokens a second of the first row."""
    return figure(row["tok/s"] / first["tok/s"]) if "-" not in (row["tok/s"], first["tok/s"]) else "-"


def optimizer_table():
    """The update of one step by part; the share of the matmul rate is that of the orthogonalisation's products."""
    eager = training(compile_mode="off")
    shapes = [sorted(matrix.shape) for matrix in eager.parameters("matrix")]
    flops = len(optim.POLAR_EXPRESS) * sum(4 * r * r * c + 2 * r**3 for r, c in shapes)  # X X^T, A A and A X
    ((_, *measurements),) = measure([variant({}, (partial(prepare_optimizers, training=eager), 0, 0))])
    if not measurements or "failed" in measurements[-1]:
        raise UserError("the optimizers' step does not work here")
    rows = []
    for part in [*measurements[0]["parts"], "all"]:
        seconds = [found["parts"].get(part, sum(found["parts"].values())) for found in measurements]
        rows.append(numbers({"part": part}, seconds, measurements, 0, flops if "orthogonal" in part else 0))
    return rows


def loader_table():
    """The loader's tokens per second into (B, T) buffers, end to end, against `encode_batch_fast` alone.

    Both read texts of the same data set, one after the other in each repetition.
    """
    tokenizer = BPETokenizer.load(paths.tokenizer_dir(TOKENIZER_DIR))
    shards = dataset.open_shards(paths.data_dir(DATA_DIR))
    slices = dataloader.slices_of(shards.train, NUM_STREAMS)
    texts = some_texts(shards)
    rows = []
    for threads in (1, 2):
        for batch_size, seq_len in SHAPES:
            pairs = []
            for _ in range(REPETITIONS):
                hardware.use_tokenizer_threads(threads > 1)
                alone = tokenizer_speed(tokenizer, texts)
                hardware.use_tokenizer_threads(False)  # the reader has threads of its own
                pairs.append((loader_speed(slices, tokenizer, batch_size, seq_len, threads), alone))
            ratios = sorted(loaded / alone for loaded, alone in pairs)
            rows.append(
                {
                    "threads": threads if threads == 1 else "all",
                    "shape": f"({batch_size}, {seq_len})",
                    "loader tok/s": round(statistics.median(loaded for loaded, _ in pairs)),
                    "tokenizer tok/s": round(statistics.median(alone for _, alone in pairs)),
                    "ratio": round(statistics.median(ratios), 3),
                    "spread": f"{ratios[0]:.2f}-{ratios[-1]:.2f}",
                }
            )
    return rows


def some_texts(shards):
    """Texts of about LOADER_TOKENS tokens, from the train shards in order."""
    texts, chars = [], 0
    for group in dataset.row_groups([shard.path for shard in shards.train]):
        texts += group
        chars += sum(map(len, group))
        if chars > 3 * LOADER_TOKENS:
            break
    return texts


def tokenizer_speed(tokenizer, texts):
    """Tokens per second of `encode_batch_fast` in calls of 64 texts, their ids never looked at."""
    begin, tokens = time.perf_counter(), 0
    for start in range(0, len(texts), 64):
        encodings = tokenizer.inner.encode_batch_fast(texts[start : start + 64], add_special_tokens=False)
        tokens += sum(map(len, encodings))
    return tokens / (time.perf_counter() - begin)


def loader_speed(slices, tokenizer, batch_size, seq_len, threads):
    """Tokens per second into (B, T + 1) buffers of a reader that starts anew, its first batch not counted."""
    reader = dataloader.SequenceReader(slices, tokenizer, seq_len, NUM_STREAMS, seed=1337, threads=threads)
    sequences = np.empty((batch_size, seq_len + 1), dtype=np.int64)
    reader.fill(sequences)
    batches = max(LOADER_TOKENS // sequences[:, 1:].size, 1)
    begin = time.perf_counter()
    for _ in range(batches):
        reader.fill(sequences)
    return batches * sequences[:, 1:].size / (time.perf_counter() - begin)


def step_table():
    """Where the time of one training step goes, the data loader included.

    Plain steps and steps under torch's profiler take turns. The profiler gives the own time of every operation, which
    `part_of` sorts into parts; what no operation covers (Python, autograd, dispatch) is the rest, so that the parts
    make up the profiled steps. They are compared with the plain ones: the difference is what the profiler costs, and
    noise. The last line is what the step would take if all operations of the formula ran at the matmul rate.
    """
    dist = init_distributed(DEVICE, DTYPE, deterministic=False)
    hardware.silence_profiler()  # its lines would break the progress bar
    tokenizer = BPETokenizer.load(paths.tokenizer_dir(TOKENIZER_DIR))
    slices = dataloader.slices_of(dataset.open_shards(paths.data_dir(DATA_DIR)).train, NUM_STREAMS)
    hardware.use_tokenizer_threads(False)  # the reader has threads of its own
    threads = hardware.cores_of_a_rank()
    reader = dataloader.SequenceReader(slices, tokenizer, MAX_SEQ_LEN, NUM_STREAMS, seed=1337, threads=threads)
    work = training(vocab_size=tokenizer.vocab_size)
    if work.compile_mode != "off":
        import torch._inductor.config  # not at the top: it takes seconds

        torch._inductor.config.cpp.enable_kernel_profile = True  # else all kernels of a graph are one event
    rounds, plain, ideal = [], [], []
    with dataloader.DataLoader(reader, DEVICE_BATCH_SIZE, dist.device) as loader:

        def next_batch():
            batch = next(loader)
            return batch.inputs, batch.targets

        step = prepare_training(dist, work, next_batch)
        for repetition in progress(range(-1, STEPS_A_REPETITION * REPETITIONS), "measuring"):
            for _ in range(3 if repetition < 0 else 1):
                seconds, _ = seconds_of(dist, step)
            parts = profiled(dist, step)
            rate = hardware.matmul_flops(dist.device, dist.dtype)
            if repetition >= 0:
                plain.append(seconds)
                rounds.append(parts)
                ideal.append(work.work()[2] / rate)
    measured = statistics.median(plain)
    lines = {part: statistics.median(found[part] for found in rounds) for part in PARTS}
    lines |= {"sum": sum(lines.values()), "measured step": measured, "at the matmul rate": statistics.median(ideal)}
    return [
        {"part": part, "ms": round(1000 * seconds, 2), "of the step": round(seconds / measured, 3)}
        for part, seconds in lines.items()
    ]


def profiled(dist, step):
    """{part: seconds} of one step: of the CPU's time, or where the device is a GPU of the GPU's."""
    on_gpu = dist.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=activities) as profile:
        with record_function("step"):
            whole, _ = seconds_of(dist, step)
    parts = dict.fromkeys(PARTS, 0.0)
    for event in profile.events():
        names, above = [event.name], event.cpu_parent
        while above is not None:
            names.append(above.name)
            above = above.cpu_parent
        if event.device_type == DeviceType.CPU and (names[-1] == "step" or on_gpu):
            parts[part_of(names)] += 1e-6 * (event.self_device_time_total if on_gpu else event.self_cpu_time_total)
    parts["rest"] += whole - sum(parts.values())
    return parts


def part_of(names):
    """The part of a step that a profiler's event belongs to, by its name and those of the events around it, inner ones
    first.

    loss: everything in it, the head's products included. optimizer: everything in it, and the norm of the gradient.
    norms and residuals: every other operation on tensors, such as rotary positions, casts, the MLP's activation, the
    tables and the sums of gradients.
    """
    for name in names:
        for scope, part in (("MeanLoss", "loss"), ("optimizer", "optimizer"), ("loader", "loader")):
            if scope in name:
                return part
    own, operation = names[0], names[0].removeprefix("aten::")
    if "_fused_" in own and not own.startswith("aten::"):  # a compiled kernel, named by what it does
        return "attention" if {"exp", "softmax"} & set(own.split("_")) else "norms and residuals"
    if operation == own:
        return "rest"
    if "attention" in operation or operation in ("bmm", "baddbmm"):  # the blocks' other products have two dimensions
        return "attention"
    return "matmul" if operation in MATMULS else "norms and residuals"


def markdown(rows):
    """A table of dicts with the same keys."""
    lines = [[str(value) if isinstance(value, str) else f"{value:,}" for value in row.values()] for row in rows]
    header = list(rows[0])
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines))


if __name__ == "__main__":
    arguments = []
    errors.run(lambda: arguments.extend(config.override(__name__, positional=True)), lambda: main(arguments))
