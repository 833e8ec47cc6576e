"""Tables of time and memory, one per question. Run it on an otherwise idle machine.

    python -m scripts.bench                    all tables
    python -m scripts.bench precision depth    these two
    python -m scripts.bench step               where the time of one training step goes

Each case of a table runs in a process of its own, so that no setting, compiled code or memory of another can reach it,
and the cases take turns: each is measured once before any is measured again. A row has the median and the spread of the
repetitions; "ratio" is its time per token over that of the first row (in generation and loader of the nearest row above
with a ratio of 1), the median of the ratios within each repetition; "of matmul" is the share of the rate of one large
matrix product, measured in the same process right before; memory is the peak of the process, Python and torch included.
`loader` and `step` read a data set. The tables are printed as Markdown; --out gets the same numbers as JSON.
"""

import atexit
import contextlib
import itertools
import math
import multiprocessing
import operator
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from nanotrain import checkpoint, config, dataloader, dataset, engine, errors, gpt, hardware, loss, optim, paths, recipe
from nanotrain.dist import DistContext, init_distributed
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

SECONDS = 0.3  # a shorter call is repeated until it takes this long
ROUNDS = 3  # of the table step in a repetition, whose medians must agree to a few percent
NUM_STREAMS = 48
RATES = {"matrix": 0.02, "embedding": 0.2, "unembedding": 0.004, "scalar": 0.04}  # any that keep the weights finite
MATMULS = {"mm", "addmm", "bmm", "baddbmm"}
PARTS = ("matmul", "attention", "loss", "norms and residuals", "optimizer", "loader", "rest")


def main(names: Sequence[str] = ()) -> None:
    """Print the tables `names` (none: all of them) and write them to OUT."""
    check_settings(names)
    dist = init_distributed(DEVICE, DTYPE, deterministic=False)
    environment = hardware.environment(dist.device, dist.dtype, dist.world_size)
    found = {"environment": environment, "settings": config.settings(__name__), "tables": {}}
    print(f"{environment['device_name']}, {environment['threads']} threads, {environment['dtype']}, ", end="")
    print(f"torch {environment['packages']['torch']}, commit {environment['commit']}")
    for name in names or TABLES:
        found["tables"][name] = rows = table(list(TABLES[name]()))
        lines = [[str(value) if isinstance(value, str) else f"{value:,}" for value in row.values()] for row in rows]
        lines = [rows[0], ["---"] * len(rows[0]), *lines]
        print(f"\n## {name}\n", *(f"| {' | '.join(line)} |" for line in lines), sep="\n", flush=True)
        if OUT:  # after every table, so that an interruption loses only one
            write_json(OUT, found)


def check_settings(names: Sequence[str]) -> None:
    """Raise UserError for an unknown table, a wrong setting or missing data, before anything is measured."""
    unknown = [name for name in names if name not in TABLES]
    if unknown:
        raise UserError(f"no table {unknown[0]!r}: there are {', '.join(TABLES)}")
    config.choice("COMPILE", COMPILE, ("auto", "on", "off"))
    positive = ("REPETITIONS", "LOADER_TOKENS", "DEVICE_BATCH_SIZE", "MAX_SEQ_LEN", "VOCAB_SIZE")
    config.check_numbers(config.snapshot(__name__), at_least_one=positive)
    recipe.model_width(DEPTH, ASPECT_RATIO, HEAD_DIM)
    if {"loader", "step"} & set(names or TABLES):
        open_data(DATA_DIR, TOKENIZER_DIR)


# ---- measuring ----


@dataclass(frozen=True)
class Case:
    """What is timed, and how the process that runs it is set up: one row of a table, or one per part."""

    labels: dict  # {column: value}, which tell its row from the others
    prepare: Callable  # DistContext -> the function to time, or one that returns {part: seconds}
    tokens: int = 0  # of a call
    flops: int = 0  # of a call
    dtype: str = field(default_factory=lambda: DTYPE)
    device: str = field(default_factory=lambda: DEVICE)
    cache_dir: str = ""  # of compiled code; empty: torch's own
    is_reference: bool = False  # for the ratios from here on, as the first row is
    part_column: str = ""  # the heading of the parts
    counted_part: str = ""  # the one that tokens and FLOPs are of; empty: every one


def seconds_of(dist: DistContext, function: Callable, calls: int = 1) -> tuple[float, object]:
    """(seconds of one call, what the last one returned)."""
    begin = time.perf_counter()
    for _ in range(calls):
        result = function()
    hardware.synchronize(dist.device)
    return (time.perf_counter() - begin) / calls, result


WORKER = {}  # in the process of a case: the arguments of `seconds_of`


def answer(case: Case) -> float | dict:
    """In the process of a case: the seconds of the first call; every later time a measurement."""
    if not WORKER:
        if case.cache_dir:
            hardware.use_compile_cache(case.cache_dir)
        dist = init_distributed(case.device, case.dtype, deterministic=False)
        function = case.prepare(dist)
        first, _, third = [seconds_of(dist, function)[0] for _ in range(3)]  # the third reuses what the first has freed
        WORKER.update(dist=dist, function=function, calls=max(round(SECONDS / third), 1))
        return first
    dist = WORKER["dist"]
    rate = hardware.matmul_flops(dist.device, dist.dtype, SECONDS / 2)
    seconds, result = seconds_of(**WORKER)
    seconds = result if isinstance(result, dict) else {"": seconds}
    return {"seconds": seconds, "rate": rate, "memory": hardware.peak_memory_bytes(dist.device)}


def measure(cases: Sequence[Case], repetitions: int) -> list[list]:
    """For each case the seconds of its first call and a measurement per repetition, taken in turns; if it fails, the
    last entry is the exception.
    """
    answers, spawn = [[] for _ in cases], multiprocessing.get_context("spawn")  # a fork would have lost its threads
    quiet = (signal.signal, (signal.SIGINT, signal.SIG_DFL))  # Ctrl-C reaches all processes: no traceback from these
    with contextlib.ExitStack() as stack:
        pools = [stack.enter_context(ProcessPoolExecutor(1, spawn, *quiet)) for _ in cases]
        turns = list(zip(cases, pools, answers, strict=True)) * (1 + repetitions)
        for case, pool, found in tqdm(turns, desc="measuring", leave=False, dynamic_ncols=True):
            if found and isinstance(found[-1], Exception):
                continue
            try:
                found.append(pool.submit(answer, case).result())
            except Exception as error:  # a case that does not work here is a row that says so
                tqdm.write(f"{case.labels}: {type(error).__name__}: {errors.first_line(error)}", file=sys.stderr)
                found.append(error)
    return answers


def table(cases: Sequence[Case]) -> list[dict]:
    """The rows of cases."""
    rows, reference = [], []
    for case, found in zip(cases, measure(cases, REPETITIONS), strict=True):
        measurements = [] if isinstance(found[-1], Exception) else found[1:]
        for part in measurements[0]["seconds"] if measurements else ["-"]:
            row = case.labels | ({case.part_column: part} if case.part_column else {})
            row |= {"ms": "failed", **dict.fromkeys(("spread", "ratio", "tok/s", "of matmul", "MiB"), "-")}
            seconds = [each["seconds"][part] for each in measurements]
            costs = [each / max(case.tokens, 1) for each in seconds]
            if case.is_reference or not rows:
                reference = costs
            if seconds:
                row["ms"] = figure(1000 * median(seconds))
                row["spread"] = f"{figure(1000 * min(seconds)):g}-{figure(1000 * max(seconds)):g}"
                row["MiB"] = round(max(each["memory"] for each in measurements) / 2**20)
                if reference:
                    row["ratio"] = figure(median(map(operator.truediv, costs, reference)))
                is_counted = case.counted_part in ("", part)
                if case.tokens and is_counted:
                    row["tok/s"] = round(case.tokens / median(seconds))
                if case.flops and is_counted:
                    times = [case.flops / each["rate"] for each in measurements]
                    row["of matmul"] = round(median(map(operator.truediv, times, seconds)), 2)
            rows.append(row)
    return rows


def figure(value: float) -> float:
    """Three significant digits, which are all that such a measurement has."""
    return float(f"{value:.3g}") if value < 100 else round(value)


# ---- training steps ----


@dataclass(frozen=True)
class Training:
    """Optimizer steps of a model on sequences of its max_seq_len."""

    model: gpt.GPTConfig
    batch_size: int  # sequences of a forward pass
    compile_mode: str = "off"  # or block, or whole
    grad_accum_steps: int = 1
    checkpointing: str = "off"  # or on

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch_size * self.model.max_seq_len * self.grad_accum_steps

    @property
    def flops(self) -> int:
        """FLOPs of a step by the formula of the plan."""
        sizes = (self.model.num_layers, self.model.model_dim, self.model.max_seq_len)
        weights = sum(matrix.numel() for matrix in matrices(checkpoint.build_model(self.model, "meta")))
        return self.tokens * recipe.training_flops_per_token(weights, *sizes)

    def build(self, dist: DistContext) -> tuple[gpt.GPT, list[optim.ShardedOptimizer]]:
        """(model with random weights, its optimizers), compiled as asked."""
        model = checkpoint.build_model(self.model, dist.device)
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

    def prepare(self, dist: DistContext, next_batch: Callable | None = None, built: tuple | None = None) -> Callable:
        """A step as scripts/base_train.py does it, without its log. next_batch: returns (inputs, targets) (B, T) int64;
        None: the same random tokens in every step. built: what `build` has returned, if that is to be used again.
        """
        model, optimizers = built or self.build(dist)
        parameters, tokens = list(model.parameters()), self.random_tokens(dist)

        def step():
            for _ in range(self.grad_accum_steps):
                with record_function("loader"):
                    inputs, targets = next_batch() if next_batch else tokens
                with dist.autocast():
                    mean = model(inputs, targets) / self.grad_accum_steps
                mean.backward()
            with record_function("optimizer"):
                torch.nn.utils.get_total_norm(optim.collect_gradients(parameters, dist))
                optim.step(optimizers)
            for parameter in parameters:
                parameter.grad = None

        return step

    def random_tokens(self, dist: DistContext) -> torch.Tensor:
        """(2, B, T) int64, inputs and targets."""
        shape = (2, self.batch_size, self.model.max_seq_len)
        return torch.randint(self.model.vocab_size, shape, device=dist.device)


def matrices(model: gpt.GPT) -> list[torch.Tensor]:
    """The matrices that every token is multiplied by."""
    roles = model.parameters_by_role()
    return [*roles["matrix"].values(), *roles["unembedding"].values()]


def training(depth: int = 0, seq_len: int = 0, vocab_size: int = 0, **changes: object) -> Training:
    """The training step of the settings. changes: fields of Training, or bigram_rows."""
    _, heads = recipe.model_width(depth or DEPTH, ASPECT_RATIO, HEAD_DIM)
    sizes = (vocab_size or VOCAB_SIZE, seq_len or MAX_SEQ_LEN, depth or DEPTH, heads, heads, HEAD_DIM)
    model = gpt.GPTConfig(*sizes, changes.pop("bigram_rows", BIGRAM_ROWS))
    return replace(Training(model, DEVICE_BATCH_SIZE, "block" if compiles() else "off"), **changes)


def compiles() -> bool:
    """Whether to compile, by the settings and what this machine has."""
    return COMPILE == "on" or (COMPILE == "auto" and hardware.can_compile())


def training_case(labels: dict, training: Training, **options: object) -> Case:
    """Training steps as a case."""
    return Case(labels, training.prepare, training.tokens, training.flops, **options)


def training_cases(name: str) -> Iterator[Case]:
    """Training steps that differ in the fields that are the first columns."""
    tokens = DEVICE_BATCH_SIZE * MAX_SEQ_LEN
    changes = {
        # the same sequences a step, in so many passes
        "accumulation": [{"grad_accum_steps": n, "batch_size": max(DEVICE_BATCH_SIZE // n, 1)} for n in (1, 4, 8)],
        "batch": [{"batch_size": batch_size} for batch_size in (4, 8, 16, 32, 64)],
        # about the same tokens a step
        "length": [{"seq_len": n, "batch_size": max(tokens // n, 1)} for n in (128, 256, 512, 1024, 2048)],
        "checkpointing": [{"checkpointing": choice} for choice in ("off", "on")],
        "depth": [{"depth": depth} for depth in (2, 4, 6, 8, 10, 12)],
    }
    for change in changes[name]:
        yield training_case(change, training(**change))


def compile_cases() -> Iterator[Case]:
    """With the seconds of the first step in a new process: cold with an empty cache of compiled code, warm with what
    the cold one left there. Without the bigram table: torch compiles no whole model with its sparse gradient.
    """
    folder, cases = tempfile.mkdtemp(prefix="nanotrain-bench-"), []
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for mode in ("off", "block", "whole"):
        work = training(compile_mode=mode, bigram_rows=0)
        cases.append(training_case({"compile": mode}, work, cache_dir=f"{folder}/{mode}"))
    for column in ("cold s", "warm s"):
        for case, (first,) in zip(cases, measure(cases, 0), strict=True):
            case.labels[column] = "-" if isinstance(first, Exception) else figure(first)
    yield from cases


def precision_cases() -> Iterator[Case]:
    """The same step in float32, in float32 through oneDNN (TF32 on CUDA), and in bfloat16."""
    for name, precision in (("float32", "highest"), ("float32, oneDNN", "medium"), ("bfloat16", "highest")):
        case = training_case({"precision": name}, training(), dtype=name.partition(",")[0], part_column="dtypes")
        yield replace(case, prepare=partial(prepare_precision, training(), precision))


def prepare_precision(training: Training, float32_precision: str, dist: DistContext) -> Callable:
    """A step that returns {the dtypes that its matrix products see: seconds}."""
    torch.set_float32_matmul_precision(float32_precision)
    with SeenDtypes() as seen:  # eager, because compiled code hides its products
        replace(training, compile_mode="off", batch_size=1).prepare(dist)()
    step = training.prepare(dist)
    return lambda: {" ".join(sorted(seen.found)): seconds_of(dist, step)[0]}


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


# ---- parts of a model ----


KERNELS = {  # (B, H, T, D) each: what the model uses; all scores and their softmax; exp without subtracting a maximum
    "SDPA": lambda q, k, v, scale: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale),
    "softmax": lambda q, k, v, scale: (
        (q @ k.mT * scale + q.new_full([q.size(2)] * 2, -math.inf).triu(1)).softmax(-1) @ v
    ),
    "exp": lambda q, k, v, scale: F.normalize(((q @ k.mT).float() * scale).exp().tril(), 1, -1).to(v.dtype) @ v,
}


def attention_cases() -> Iterator[Case]:
    """One layer's attention, forward and backward, as the model does it and as it could be done."""
    shape = (DEVICE_BATCH_SIZE, training().model.num_heads, MAX_SEQ_LEN, HEAD_DIM)
    flops = 12 * math.prod(shape) * MAX_SEQ_LEN  # over the whole square of scores, as the formula for training counts
    for choice, kernel in itertools.product(("off", "on")[: 1 + compiles()], KERNELS):
        if choice == "off" or kernel != "SDPA":  # around which there is nothing to fuse
            prepare = partial(prepare_attention, kernel, choice == "on", shape)
            yield Case({"kernel": kernel, "compile": choice}, prepare, DEVICE_BATCH_SIZE * MAX_SEQ_LEN, flops)


def prepare_attention(kernel: str, compiled: bool, shape: Sequence[int], dist: DistContext) -> Callable:
    """Forward and backward pass of one layer's attention over (B, H, T, D)."""
    function = torch.compile(KERNELS[kernel], dynamic=False) if compiled else KERNELS[kernel]
    q, k, v, gradient = (torch.randn(shape, device=dist.device).to(dist.dtype) for _ in range(4))
    q, k = (gpt.norm(x, gpt.GPTConfig.norm_eps) for x in (q, k))  # as QK-norm leaves them, which bounds the scores
    inputs = [x.requires_grad_() for x in (q, k, v)]
    scale = gpt.GPTConfig.attention_gain / math.sqrt(shape[-1])
    return lambda: torch.autograd.grad(function(*inputs, scale), inputs, gradient)


def loss_cases() -> Iterator[Case]:
    """From hidden states to the loss and back, the head's products included."""
    shape = (DEVICE_BATCH_SIZE * MAX_SEQ_LEN, training().model.model_dim, VOCAB_SIZE)
    for choice, chunk in itertools.product(("off", "on")[: 1 + compiles()], ("full", 256, 512, 1024, 4096)):
        prepare = partial(prepare_loss, chunk, choice == "on", shape)
        yield Case({"chunk": chunk, "compile": choice}, prepare, shape[0], 6 * math.prod(shape))


def prepare_loss(chunk: int | str, compiled: bool, shape: tuple[int, int, int], dist: DistContext) -> Callable:
    """Forward and backward pass from the last hidden states to the loss, with the logits of `chunk` tokens at a time
    or with all ("full"). shape: tokens, width, vocabulary.
    """
    tokens, width, vocab_size = shape
    hidden = torch.randn(tokens, width, device=dist.device).to(dist.dtype).requires_grad_()
    weight = (torch.randn(vocab_size, width, device=dist.device) / width).requires_grad_()
    arguments = (hidden, weight, torch.randint(vocab_size, (tokens,), device=dist.device), gpt.GPTConfig.softcap)
    function = full_loss if chunk == "full" else loss.softmax_gradient
    function = torch.compile(function, dynamic=False) if compiled else function
    if chunk == "full":
        return lambda: torch.autograd.grad(function(*arguments), (hidden, weight))
    loss.CHUNK_ROWS[dist.device.type] = chunk
    return lambda: torch.autograd.grad(loss.mean_loss(*arguments, function), (hidden, weight))


def full_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, cap: float) -> torch.Tensor:
    """hidden (N, C), weight (V, C), targets (N,) int64 -> () float32: `loss.mean_loss` with all logits at once."""
    return F.cross_entropy(loss.softcap(F.linear(hidden, weight.to(hidden.dtype)).float(), cap), targets)


def generation_cases() -> Iterator[Case]:
    """Texts of max_seq_len tokens, with a KV cache and without, several at once, and in a deeper model; beside them
    their matrix-vector products alone. All in float32, as logits always are.
    """
    deep, choices = 8, (("cache", 1), ("products alone", 1), ("no cache", 1), ("cache", 4), ("cache", 16))
    for depth, (method, texts) in [(DEPTH, choice) for choice in choices] + [(deep, choice) for choice in choices[:2]]:
        model, tokens = training(depth).model, texts * MAX_SEQ_LEN
        flops = 2 * tokens * sum(matrix.numel() for matrix in matrices(checkpoint.build_model(model, "meta")))
        labels, is_reference = {"depth": depth, "method": method, "texts": texts}, (method, texts) == ("cache", 1)
        prepare = partial(prepare_generation, model, method, texts)
        yield Case(labels, prepare, tokens, flops, "float32", is_reference=is_reference)


def prepare_generation(model_config: gpt.GPTConfig, method: str, texts: int, dist: DistContext) -> Callable:
    """So many texts of max_seq_len tokens at once, each from a prompt of one token: [the tokens of each step]."""
    model = checkpoint.build_model(model_config, dist.device)
    model.init_weights(0)
    model.requires_grad_(False)
    prompts, length = [[0]] * texts, model_config.max_seq_len

    def cached():  # as scripts/generate.py does it
        return list(engine.generate_batch(model, prompts, length, seed=0))

    def uncached():  # a forward pass over the whole text for each token
        tokens, draws, steps = torch.tensor(prompts, device=dist.device), [random.Random(n) for n in range(texts)], []
        for _ in range(length):
            steps.append(engine.pick(model.logits(tokens)[:, -1], 0.8, 50, 1.0, draws))
            tokens = torch.cat((tokens, torch.tensor(steps[-1:], device=dist.device).T), 1)
        return steps

    def products():
        vectors = {matrix.size(1): matrix.new_ones(texts, matrix.size(1)) for matrix in matrices(model)}
        for _, matrix in itertools.product(range(length), matrices(model)):
            F.linear(vectors[matrix.size(1)], matrix)

    return {"cache": cached, "no cache": uncached, "products alone": products}[method]


def optimizer_cases() -> Iterator[Case]:
    """The update of one step, and each part of it alone."""
    work, part = training(compile_mode="off", batch_size=1), "orthogonalization"
    of_muon = checkpoint.build_model(work.model, "meta").parameters_by_role()["matrix"].values()
    flops = 2 * len(optim.POLAR_EXPRESS) * sum(map(optim.orthogonalization_cost, of_muon))
    yield Case({}, partial(prepare_optimizers, work), flops=flops, part_column="part", counted_part=part)


def prepare_optimizers(training: Training, dist: DistContext) -> Callable:
    """Updates from the gradients of one batch, as a function that returns {part: seconds}."""
    model, (muon, *others) = training.build(dist)
    with dist.autocast():
        model(*training.random_tokens(dist)).backward()
    stacks = [
        torch.stack([p.grad if p.size(0) <= p.size(1) else p.grad.t() for p in group["params"]])
        for group in muon.param_groups
    ]
    parts = {"all": partial(optim.step, [muon, *others])}
    parts |= {type(each).__name__: each.step for each in (muon, *others)}
    parts["orthogonalization"] = lambda: [optim.orthogonalize(stack, muon.dtype) for stack in stacks]
    return lambda: {part: seconds_of(dist, function)[0] for part, function in parts.items()}


# ---- data ----


def open_data(data_dir: str, tokenizer_dir: str) -> tuple[Sequence[dataset.Shard], BPETokenizer]:
    """(train shards, tokenizer) of the settings' folders. Raises DataError where they are missing."""
    tokenizer = BPETokenizer.load(paths.tokenizer_dir(tokenizer_dir))
    return dataset.open_shards(paths.data_dir(data_dir)).train, tokenizer


def open_reader(folders: tuple[str, str], seq_len: int, threads: int) -> dataloader.SequenceReader:
    """The train sequences as a run reads them."""
    shards, tokenizer = open_data(*folders)
    hardware.use_tokenizer_threads(False)  # the reader has threads of its own
    slices = dataloader.slices_of(shards, NUM_STREAMS)
    return dataloader.SequenceReader(slices, tokenizer, seq_len, NUM_STREAMS, seed=1337, threads=threads)


def loader_cases() -> Iterator[Case]:
    """The loader's tokens per second into (B, T + 1) buffers against the tokenizer alone, on one core and on all."""
    for threads in dict.fromkeys((1, hardware.cores_of_a_rank())):
        for shape in ((), (16, 256), (32, 2048)):
            batches = max(LOADER_TOKENS // math.prod(shape), 1)
            prepare = partial(prepare_loader, (DATA_DIR, TOKENIZER_DIR), shape, batches, threads)
            labels = {"threads": threads, "what": f"loader {shape}" if shape else "tokenizer"}
            yield Case(labels, prepare, batches * math.prod(shape), is_reference=not shape)


def prepare_loader(
    folders: tuple[str, str], shape: tuple[int, ...], batches: int, threads: int, dist: DistContext
) -> Callable:
    """The next batches of shape (B, T); without a shape texts of so many tokens, tokenized 64 at a time."""
    if shape:
        reader = open_reader(folders, shape[1], threads)
        sequences = np.empty((shape[0], shape[1] + 1), dtype=np.int64)
        return lambda: [reader.fill(sequences) for _ in range(batches)]
    shards, tokenizer = open_data(*folders)
    hardware.use_tokenizer_threads(threads > 1)
    texts, tokens = [], 0
    for text in itertools.cycle(itertools.chain.from_iterable(dataset.row_groups([each.path for each in shards]))):
        texts.append(text)
        tokens += len(tokenizer.encode(text))
        if tokens >= batches:
            break
    groups = [texts[start : start + 64] for start in range(0, len(texts), 64)]

    def tokenize():
        for group in groups:
            tokenizer.inner.encode_batch_fast(group, add_special_tokens=False)  # whose ids are never looked at

    return tokenize


# ---- where the time of a step goes ----


def step_cases() -> Iterator[Case]:
    """Where the time of one training step goes, the data loader included.

    Plain steps and steps under torch's profiler take turns. The profiler gives the own time of every operation, which
    `part_of` sorts into parts; what no operation covers (Python, autograd, dispatch) is the rest, so that the parts
    make up the profiled step. What that takes longer than the plain step is the cost of the profiler, and noise.
    """
    folders = (DATA_DIR, TOKENIZER_DIR)
    work = training(vocab_size=open_data(*folders)[1].vocab_size)
    prepare = partial(prepare_step, work, folders)
    yield replace(training_case({}, work, part_column="part", counted_part="step"), prepare=prepare)


def prepare_step(training: Training, folders: tuple[str, str], dist: DistContext) -> Callable:
    """Plain and profiled steps in turns, as a function that returns {part: median seconds}."""
    if training.compile_mode != "off":
        import torch._inductor.config  # not at the top: it takes seconds

        torch._inductor.config.cpp.enable_kernel_profile = True  # else all kernels of a graph are one event
    reader = open_reader(folders, training.model.max_seq_len, hardware.cores_of_a_rank())
    loader = dataloader.DataLoader(reader, training.batch_size, dist.device)
    step = training.prepare(dist, lambda: operator.attrgetter("inputs", "targets")(next(loader)))

    def rounds():
        found = [{"step": seconds_of(dist, step)[0], **profiled(dist, step)} for _ in range(ROUNDS)]
        return {part: median(each[part] for each in found) for part in found[0]}

    return rounds


def profiled(dist: DistContext, step: Callable) -> dict[str, float]:
    """{part: seconds} of one step: of the CPU's time, or where the device is a GPU of the GPU's."""
    on_gpu = dist.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as found:
        with record_function("step"):
            whole, _ = seconds_of(dist, step)
    parts = {"profiled step": whole} | dict.fromkeys(PARTS, 0.0)
    for event in found.events():
        names, above = [event.name], event.cpu_parent
        while above is not None:
            names.append(above.name)
            above = above.cpu_parent
        if event.device_type == DeviceType.CPU and (names[-1] == "step" or on_gpu):
            parts[part_of(names)] += 1e-6 * (event.self_device_time_total if on_gpu else event.self_cpu_time_total)
    parts["rest"] += whole - sum(parts[part] for part in PARTS)
    return parts


def part_of(names: Sequence[str]) -> str:
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


TABLES = {
    "precision": precision_cases,
    "compile": compile_cases,
    "attention": attention_cases,
    "loss": loss_cases,
    **{name: partial(training_cases, name) for name in ("accumulation", "batch", "length", "checkpointing", "depth")},
    "generation": generation_cases,
    "optimizer": optimizer_cases,
    "loader": loader_cases,
    "step": step_cases,
}

if __name__ == "__main__":
    arguments = []
    errors.run(lambda: arguments.extend(config.override(__name__, positional=True)), lambda: main(arguments))
