"""Tables of time and memory, one per question. Run it on an otherwise idle machine.

    python -m scripts.bench                    all tables
    python -m scripts.bench precision depth    these two
    python -m scripts.bench step               where the time of one training step goes

Each case of a table runs in a process of its own, and the cases take turns: each is measured once before any is
measured again. A row has the median and the spread of the repetitions. "ratio" is the time per token over that of the
first row, the median of the ratios within each repetition; "of matmul" is the share of the rate of one large matrix
product, measured right before; "first s" is the first call, compilation included; memory is the peak of the process.
"""

import itertools
import math
import multiprocessing
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from nanotrain import checkpoint, config, dataloader, dataset, engine, errors, gpt, hardware, loss, optim, paths, recipe
from nanotrain.dist import DistContext, init_distributed
from nanotrain.errors import UserError
from nanotrain.files import write_json
from nanotrain.terminal import progress_bar
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
# --- measurement
REPETITIONS = 5  # of every measurement
OUT = ""  # file for the rows of all tables as JSON; empty: none
# ------------

SECONDS = 0.3  # a shorter call is repeated until it takes this long
LOADER_TOKENS = 4_000_000  # per measurement of the loader; with fewer, the first read of each slice would dominate
NUM_STREAMS = 48
ATTENTION_KERNELS = ("default", "FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
RATES = {"matrix": 0.02, "embedding": 0.2, "unembedding": 0.004, "scalar": 0.04}  # any that keep the weights finite
# The parts of a step: what an event of the profiler is called, and the events around it, inner ones first. The first
# pattern decides. A compiled kernel has the names of its operations; the loss has the head's products.
PARTS = {
    "loss": "MeanLoss",
    "optimizer": "optimizer",
    "loader": "loader",
    "matmul": r"^aten::(add)?mm\b",
    "attention": r"^\S*(attention|bmm|softmax|_exp_)",
    "norms and residuals": r"^aten::|^\S*_fused_",
    "rest": "",  # Python, autograd, dispatch
}


def tables() -> dict[str, tuple[Callable, list[dict]]]:
    """{table: (function that returns the Work to time, its arguments in each case, which are the first columns)}."""
    tokens, choices = DEVICE_BATCH_SIZE * MAX_SEQ_LEN, ("off", "on")[: 1 + compiles()]
    precisions = (("float32", "highest"), ("float32", "medium"), ("bfloat16", "highest"))
    passes = [(max(DEVICE_BATCH_SIZE // n, 1), n) for n in (1, 4, 8)]  # the same sequences a step
    lengths = [(max(tokens // n, 1), n) for n in (128, 256, 512, 1024, 2048)]  # about the same tokens a step
    texts = ((DEPTH, "on", 1), (DEPTH, "off", 1), (DEPTH, "on", 4), (DEPTH, "on", 16), (8, "on", 1))
    batches = [(n, *shape) for n in sorted({1, hardware.cores_of_a_rank()}) for shape in ((16, 256), (32, 2048))]
    return {
        "precision": (precision, [{"dtype": dtype, "float32_precision": rule} for dtype, rule in precisions]),
        # torch compiles no whole model with the sparse gradient of a bigram table
        "compile": (training, [{"compile": mode, "bigram_rows": 0} for mode in ("off", "block", "whole")]),
        "attention": (attention, [{"kernel": kernel} for kernel in ATTENTION_KERNELS]),
        "loss": (head, [{"chunk": n, "compile": choice} for choice in choices for n in (256, 512, 1024, 4096)]),
        "accumulation": (training, [{"batch_size": size, "grad_accum_steps": n} for size, n in passes]),
        "batch": (training, [{"batch_size": n} for n in (4, 8, 16, 32, 64)]),
        "length": (training, [{"batch_size": size, "max_seq_len": n} for size, n in lengths]),
        "checkpointing": (training, [{"checkpointing": choice} for choice in ("off", "on")]),
        "depth": (training, [{"depth": n} for n in (2, 4, 6, 8, 10, 12)]),
        "generation": (generation, [{"depth": depth, "cache": cache, "texts": n} for depth, cache, n in texts]),
        "optimizer": (optimizer, [{}]),
        "loader": (loader, [{"threads": n, "batch_size": size, "seq_len": length} for n, size, length in batches]),
        "step": (step_by_parts, [{}]),
    }


def main(names: Sequence[str] = ()) -> None:
    """Print the tables `names` (none: all of them) as Markdown and write their rows to OUT."""
    positive = ("REPETITIONS", "DEVICE_BATCH_SIZE", "MAX_SEQ_LEN", "VOCAB_SIZE")
    config.check_numbers(config.snapshot(__name__), at_least_one=positive)
    config.choice("COMPILE", COMPILE, ("auto", "on", "off"))
    known, found = tables(), {}
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"no table {unknown[0]!r}: there are {', '.join(known)}")
    names = names or list(known)
    if "loader" in names or "step" in names:
        open_reader(MAX_SEQ_LEN, 1)  # missing data are an error before anything is measured
    device = init_distributed(DEVICE, DTYPE, deterministic=False).device
    print(f"{hardware.device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name in names:
        found[name] = rows = table(*known[name])
        heading = list(max(rows, key=len))  # a case that failed has fewer columns
        lines = [heading, ["---"] * len(heading), *([str(row.get(key, "-")) for key in heading] for row in rows)]
        print(f"\n## {name}\n", *(f"| {' | '.join(line)} |" for line in lines), sep="\n", flush=True)
        if OUT:  # after every table, so that an interruption loses only one
            write_json(OUT, found)


# ---- measuring ----


@dataclass(frozen=True)
class Work:
    """What a case times."""

    function: Callable[[], object] | None  # may return {part: seconds}, which gives a row for each part
    tokens: int = 0  # of a call
    flops: int = 0
    columns: dict = field(default_factory=dict)  # further ones, {heading: value}


def seconds_of(dist: DistContext, function: Callable, calls: int = 1) -> tuple[float, object]:
    """(seconds of one call, what the last one returned)."""
    begin = time.perf_counter()
    for _ in range(calls):
        result = function()
    hardware.synchronize(dist.device)
    return (time.perf_counter() - begin) / calls, result


WORKER = []  # in the process of a case, once it is prepared: its DistContext, its Work, calls of a measurement


def measurement(settings: dict, cache_dir: str, prepare: Callable, case: dict) -> tuple:
    """In the process of a case: at first (seconds of the first call, the work without its function), then ({part:
    seconds}, FLOP/s of a matrix product, bytes of peak memory).
    """
    if not WORKER:
        globals().update(settings)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache_dir
        dist = init_distributed(DEVICE, case.get("dtype", DTYPE), deterministic=False)
        work = prepare(dist, **case)
        first, _, third = [seconds_of(dist, work.function)[0] for _ in range(3)]  # reuses what the first freed
        WORKER.extend((dist, work, max(round(SECONDS / third), 1)))
        return first, replace(work, function=None)
    dist, work, calls = WORKER
    rate = hardware.matmul_flops(dist.device, dist.dtype, SECONDS / 2)
    seconds, result = seconds_of(dist, work.function, calls)
    parts = result if isinstance(result, dict) else {"": seconds}
    return parts, rate, hardware.peak_memory_bytes(dist.device)


def measure(prepare: Callable, cases: Sequence[dict]) -> list[list]:
    """The results of `measurement` of each case, taken in turns; where one fails, its last is the error."""
    found, settings, spawn = [[] for _ in cases], config.settings(__name__), multiprocessing.get_context("spawn")
    quiet = (signal.signal, (signal.SIGINT, signal.SIG_DFL))  # Ctrl-C reaches all processes: no traceback from these
    with tempfile.TemporaryDirectory(prefix="nanotrain-bench-") as folder, ExitStack() as stack:
        workers = [stack.enter_context(ProcessPoolExecutor(1, spawn, *quiet)) for _ in cases]
        for number in progress_bar([*range(len(cases))] * (1 + REPETITIONS), "measuring"):
            answers, case = found[number], cases[number]
            if answers and isinstance(answers[-1], Exception):
                continue
            try:
                task = workers[number].submit(measurement, settings, f"{folder}/{number}", prepare, case)
                answers.append(task.result())
            except Exception as error:  # a case that does not work here is a row that says so
                tqdm.write(f"{case}: {type(error).__name__}: {errors.first_line(error)}", file=sys.stderr)
                answers.append(error)
    return found


def table(prepare: Callable, cases: Sequence[dict]) -> list[dict]:
    """The rows of a table, with three significant digits, which are all that such a measurement has."""
    rows, reference = [], None
    for case, answers in zip(cases, measure(prepare, cases), strict=True):
        if isinstance(answers[-1], Exception):
            rows.append({**case, "ms": "failed"})
            continue
        first, work = answers[0]
        parts, rates, memory = zip(*answers[1:], strict=True)
        for part in parts[0]:
            seconds = np.array([found[part] for found in parts])
            costs, middle = seconds / max(work.tokens, 1), np.median(seconds)
            reference = costs if reference is None else reference
            row = {**case, **work.columns, **({"part": part} if part else {})}
            row["ms"] = rounded(1000 * middle)
            row["spread"] = f"{rounded(1000 * seconds.min()):g}-{rounded(1000 * seconds.max()):g}"
            row["ratio"] = rounded(np.median(costs / reference))
            row["tok/s"] = round(work.tokens / middle) if work.tokens else "-"
            row["of matmul"] = rounded(np.median(work.flops / (rates * seconds))) if work.flops else "-"
            row["first s"], row["MiB"] = rounded(first), round(max(memory) / 2**20)
            rows.append(row)
    return rows


def rounded(value: float) -> float:
    return float(f"{value:.3g}") if value < 100 else round(value)


# ---- training steps ----


def compiles() -> bool:
    """Whether to compile, by the settings and what this machine has."""
    return COMPILE == "on" or (COMPILE == "auto" and hardware.can_compile())


def model_config(depth: int = 0, **changes: int) -> gpt.GPTConfig:
    """The model of the settings, or of another depth, but for the fields in `changes`."""
    _, heads = recipe.model_width(depth or DEPTH, ASPECT_RATIO, HEAD_DIM)
    model = gpt.GPTConfig(VOCAB_SIZE, MAX_SEQ_LEN, depth or DEPTH, heads, heads, HEAD_DIM, BIGRAM_ROWS)
    return replace(model, **changes)


def build(model_config: gpt.GPTConfig, dist: DistContext) -> tuple[gpt.GPT, list[optim.ShardedOptimizer]]:
    """(model with random weights, its optimizers)."""
    model = checkpoint.build_model(model_config, dist.device)
    model.init_weights(0)
    muon_dtype = torch.bfloat16 if dist.dtype == torch.bfloat16 else torch.float32
    return model, optim.build_optimizers(model.parameters_by_role(), RATES, 0.0, muon_dtype, dist)


def training(
    dist: DistContext,
    built: tuple | None = None,
    batches: Iterable | None = None,
    batch_size: int = 0,
    grad_accum_steps: int = 1,
    compile: str = "",
    checkpointing: str = "off",
    **model: int,
) -> Work:
    """Steps as scripts/base_train.py does them; what is not given is by the settings. built: from `build`, or model:
    for `model_config`. batches: of (inputs, targets), else the same random tokens. compile: off, block or whole.
    """
    model, optimizers = built or build(model_config(**model), dist)
    parameters, sizes, counts = list(model.parameters()), model.config, model.parameter_counts()
    shape = (2, batch_size or DEVICE_BATCH_SIZE, sizes.max_seq_len)
    random_tokens = torch.randint(sizes.vocab_size, shape, device=dist.device)
    batches = iter(batches or itertools.repeat(random_tokens))
    if checkpointing == "on":
        model.recompute_blocks = True
    compile = compile or ("block" if compiles() else "off")
    if compile != "off":
        torch._inductor.config.cpp.vec_isa_ok = True  # its test programs take as long as a model
        model.compile(dynamic=False) if compile == "whole" else model.compile_parts()

    def step():
        for _ in range(grad_accum_steps):
            with record_function("loader"):
                inputs, targets = next(batches)
            with dist.autocast():
                mean = model(inputs, targets) / grad_accum_steps
            mean.backward()
        with record_function("optimizer"):
            torch.nn.utils.get_total_norm(optim.collect_gradients(parameters, dist))
            optim.step(optimizers)
        for parameter in parameters:
            parameter.grad = None

    weights, tokens = counts["matrix"] + counts["unembedding"], random_tokens[0].numel() * grad_accum_steps
    flops = recipe.training_flops_per_token(weights, sizes.num_layers, sizes.model_dim, sizes.max_seq_len)
    return Work(step, tokens, flops * tokens)


def precision(dist: DistContext, dtype: str, float32_precision: str) -> Work:
    """Steps, and the dtypes that their products see. medium: bfloat16 through oneDNN, TF32 on CUDA."""
    torch.set_float32_matmul_precision(float32_precision)
    seen = set()

    class Watch(TorchDispatchMode):  # below autocast
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.overloadpacket.__name__
            if name in ("mm", "addmm", "bmm", "baddbmm") or "scaled_dot_product" in name:
                tensors = [x for x in args if isinstance(x, torch.Tensor)][:3]  # what follows are statistics
                seen.update(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
            return function(*args, **(kwargs or {}))

    with Watch():  # eager, because compiled code hides its products
        training(dist, batch_size=1, compile="off").function()
    return replace(training(dist), columns={"products see": " ".join(sorted(seen))})


def optimizer(dist: DistContext) -> Work:
    """The update from the gradients of one sequence, and each part of it alone."""
    model, optimizers = build(model_config(), dist)
    with dist.autocast():
        model(*torch.randint(VOCAB_SIZE, (2, 1, MAX_SEQ_LEN), device=dist.device)).backward()
    parts = {"all": optimizers, **{type(each).__name__: [each] for each in optimizers}}
    return Work(lambda: {part: seconds_of(dist, partial(optim.step, some))[0] for part, some in parts.items()})


# ---- parts of a model ----


def attention(dist: DistContext, kernel: str, shape: Sequence[int] = ()) -> Work:
    """Attention over shape (B, H, T, D), by default one layer's, forward and backward, by a kernel of torch."""
    shape = shape or (DEVICE_BATCH_SIZE, model_config().num_heads, MAX_SEQ_LEN, HEAD_DIM)
    q, k, v, gradient = (torch.randn(shape, device=dist.device).to(dist.dtype).requires_grad_() for _ in range(4))

    def function():
        with nullcontext() if kernel == "default" else sdpa_kernel(getattr(SDPBackend, kernel)):
            found = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return torch.autograd.grad(found, (q, k, v), gradient)

    flops = 12 * math.prod(shape) * shape[2]  # over the whole square of scores, as the formula for training counts
    return Work(function, shape[0] * shape[2], flops)


def head(dist: DistContext, chunk: int, compile: str) -> Work:
    """From hidden states to the loss and back, with the logits of `chunk` tokens at a time."""
    tokens, width = DEVICE_BATCH_SIZE * MAX_SEQ_LEN, model_config().model_dim
    hidden = torch.randn(tokens, width, device=dist.device).to(dist.dtype).requires_grad_()
    weight = (torch.randn(VOCAB_SIZE, width, device=dist.device) / width).requires_grad_()
    targets, cap = torch.randint(VOCAB_SIZE, (tokens,), device=dist.device), gpt.GPTConfig.softcap
    kernel = torch.compile(loss.softmax_gradient, dynamic=False) if compile == "on" else loss.softmax_gradient
    loss.CHUNK_ROWS[dist.device.type] = chunk
    mean = partial(loss.mean_loss, hidden, weight, targets, cap, kernel)
    return Work(lambda: torch.autograd.grad(mean(), (hidden, weight)), tokens, 6 * tokens * width * VOCAB_SIZE)


def generation(dist: DistContext, depth: int, cache: str, texts: int) -> Work:
    """So many texts of MAX_SEQ_LEN tokens at once, each from a prompt of one token, in float32 as logits always are."""
    model = checkpoint.build_model(model_config(depth), dist.device)
    model.init_weights(0)
    model.requires_grad_(False)
    prompts = [[0]] * texts

    def uncached():  # a forward pass over the whole text for each token
        tokens, draws = torch.tensor(prompts, device=dist.device), [random.Random(n) for n in range(texts)]
        for _ in range(MAX_SEQ_LEN):
            picked = engine.pick(model.logits(tokens)[:, -1], 0.8, 50, 1.0, draws)
            tokens = torch.cat((tokens, torch.tensor([picked], device=dist.device).T), 1)
        return tokens.T[1:].tolist()

    def cached():  # as scripts/generate.py does it
        return list(engine.generate_batch(model, prompts, MAX_SEQ_LEN))

    return Work(cached if cache == "on" else uncached, texts * MAX_SEQ_LEN)


# ---- data, and where the time of a step goes ----


def open_reader(seq_len: int, threads: int) -> dataloader.SequenceReader:
    """The train sequences as a run reads them."""
    tokenizer = BPETokenizer.load(paths.tokenizer_dir(TOKENIZER_DIR))
    slices = dataloader.slices_of(dataset.open_shards(paths.data_dir(DATA_DIR)).train, NUM_STREAMS)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the reader has threads of its own
    return dataloader.SequenceReader(slices, tokenizer, seq_len, NUM_STREAMS, seed=1337, threads=threads)


def loader(dist: DistContext, threads: int, batch_size: int, seq_len: int) -> Work:
    """The next batches of the loader in host memory."""
    reader, sequences = open_reader(seq_len, threads), np.empty((batch_size, seq_len + 1), dtype=np.int64)
    count = max(LOADER_TOKENS // (batch_size * seq_len), 1)
    return Work(lambda: [reader.fill(sequences) for _ in range(count)], count * batch_size * seq_len)


def step_by_parts(dist: DistContext) -> Work:
    """A training step with the loader, plain and then under torch's profiler, which adds a cost of its own."""
    torch._inductor.config.cpp.enable_kernel_profile = True  # else all kernels of a graph are one event
    reader = open_reader(MAX_SEQ_LEN, hardware.cores_of_a_rank())
    loader = dataloader.DataLoader(reader, DEVICE_BATCH_SIZE, dist.device)
    batches = ((batch.inputs, batch.targets) for batch in loader)
    step = training(dist, batches=batches, vocab_size=reader.tokenizer.vocab_size).function
    return Work(lambda: {"step": seconds_of(dist, step)[0], **profiled(dist, step)})


def profiled(dist: DistContext, step: Callable) -> dict[str, float]:
    """{part: seconds} of one step: of the CPU's time, or where the device is a GPU of the GPU's."""
    on_gpu = dist.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as found:
        with record_function("step"):
            whole, _ = seconds_of(dist, step)
    parts = dict.fromkeys(PARTS, 0.0)
    for event in found.events():
        names, above = [event.name], event.cpu_parent
        while above is not None:
            names.append(above.name)
            above = above.cpu_parent
        if event.device_type == DeviceType.CPU and (names[-1] == "step" or on_gpu):
            parts[part_of(names)] += 1e-6 * (event.self_device_time_total if on_gpu else event.self_cpu_time_total)
    parts["rest"] += whole - sum(parts.values())
    return {"profiled step": whole, **parts}


def part_of(names: Sequence[str]) -> str:
    """The part of a step that an event belongs to, by its name and those of the events around it."""
    return next(part for part, pattern in PARTS.items() if re.search(pattern, " < ".join(names)))


if __name__ == "__main__":
    errors.run(lambda: main(config.override(__name__, positional=True)), for_its_output=True)
