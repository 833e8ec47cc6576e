"""Benchmarks as tables of time and memory. Run them on an otherwise idle machine.

    python -m scripts.bench                    all tables
    python -m scripts.bench precision depth    two of them
    python -m scripts.bench step               time of one training step, by part

Each case has a process of its own, and all cases are measured once before any is measured again. "ms" is the median
and "spread" the range of the repetitions; "ratio" is time per token relative to the first row, the median of the ratios
in each repetition; "of matmul" is the share of the rate of a large matrix product, measured just before; "first s" is
the first call, with compilation; "MiB" is the peak memory of the process.
"""

import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from nanotrain import checkpoint, config, dataloader, dataset, engine, errors, gpt, hardware, loss, optim, paths, recipe
from nanotrain.dist import DistContext, init_distributed
from nanotrain.files import write_json
from nanotrain.terminal import progress_bar
from nanotrain.tokenizer import BPETokenizer

# --- settings
DEVICE = "auto"  # auto, cuda, mps or cpu
DTYPE = "auto"  # dtype of matrix products: auto, bfloat16, float16 or float32
COMPILE = "auto"  # torch.compile in tables that do not vary it: auto (if there is a compiler), on or off
DEPTH = 4  # layers; the width follows
ASPECT_RATIO = 0  # width per layer; 0: 64, but a width of at least 256
HEAD_DIM = 128  # head dimension; the width is rounded up to whole heads
VOCAB_SIZE = 4096  # vocabulary of tables on random tokens
BIGRAM_ROWS = 65536  # rows of the hashed bigram table; 0: no table
DEVICE_BATCH_SIZE = 16  # sequences per forward pass
MAX_SEQ_LEN = 256  # tokens per sequence
DATA_DIR = ""  # folder of shards (loader, step); empty: the only data set in NANOTRAIN_DIR/data
TOKENIZER_DIR = ""  # folder of tokenizer.json (loader, step); empty: NANOTRAIN_DIR/tokenizer
REPETITIONS = 5  # repetitions of each measurement
OUT = ""  # file for the rows of all tables as JSON; empty: none
# ------------

SECONDS = 0.3  # minimum duration of a measurement; shorter calls are repeated
LOADER_TOKENS = 4_000_000  # tokens per loader measurement; fewer would measure mostly the first read of each slice
NUM_STREAMS = 48
ATTENTION_KERNELS = ("default", "FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
RATES = {"matrix": 0.02, "embedding": 0.2, "unembedding": 0.004, "scalar": 0.04}  # any that keep the weights finite
# {part: pattern of "event < parent < ..."}; the first match decides. A compiled kernel is named after its operations.
PARTS = {
    "loss": "MeanLoss", "optimizer": "optimizer", "loader": "loader", "matmul": r"^aten::(add)?mm\b",
    "attention": r"^\S*(attention|bmm|softmax|_exp_)", "norms and residuals": r"^aten::|^\S*_fused_",
    "rest": "",  # Python, autograd, dispatch
}  # fmt: skip


def tables() -> dict[str, tuple[Callable, list[dict]]]:
    """{table: (function that prepares the Work to time, its arguments per case, shown as the first columns)}."""
    size, tokens, choices = DEVICE_BATCH_SIZE, DEVICE_BATCH_SIZE * MAX_SEQ_LEN, ("off", "on")[: 1 + (COMPILE != "off")]
    precisions = (("float32", "highest"), ("float32", "medium"), ("bfloat16", "highest"))
    texts = ((DEPTH, "on", 1), (DEPTH, "off", 1), (DEPTH, "on", 4), (DEPTH, "on", 16), (8, "on", 1))
    reads = [(n, *shape) for n in sorted({1, hardware.cores_of_a_rank()}) for shape in ((16, 256), (32, 2048))]
    return {
        "precision": (precision, [{"dtype": dtype, "float32_precision": rule} for dtype, rule in precisions]),
        "compile": (training, [{"compile": mode, "bigram_rows": 0} for mode in ("off", "block", "whole")]),
        "attention": (attention, [{"kernel": kernel} for kernel in ATTENTION_KERNELS]),
        "loss": (head, [{"chunk": n, "compile": choice} for choice in choices for n in (256, 512, 1024, 4096)]),
        "accumulation": (training, [{"batch_size": max(size // n, 1), "grad_accum_steps": n} for n in (1, 4, 8)]),
        "batch": (training, [{"batch_size": n} for n in (4, 8, 16, 32, 64)]),
        "length": (training, [{"batch_size": tokens // n or 1, "max_seq_len": n} for n in (128, 256, 512, 1024, 2048)]),
        "checkpointing": (training, [{"checkpointing": choice} for choice in ("off", "on")]),
        "depth": (training, [{"depth": n} for n in (2, 4, 6, 8, 10, 12)]),
        "generation": (generation, [{"depth": depth, "cache": cache, "texts": n} for depth, cache, n in texts]),
        "optimizer": (optimizer, [{}]),
        "loader": (loader, [{"threads": n, "batch_size": size, "seq_len": length} for n, size, length in reads]),
        "step": (step_by_parts, [{}]),
    }


def main(names: Sequence[str] = ()) -> None:
    """Print the tables `names` (none: all of them) as Markdown and write their rows to OUT."""
    config.check_numbers(config.snapshot(__name__), ("REPETITIONS", "DEVICE_BATCH_SIZE", "MAX_SEQ_LEN", "VOCAB_SIZE"))
    config.choice("COMPILE", COMPILE, ("auto", "on", "off"))
    known, found = tables(), {}
    if unknown := [name for name in names if name not in known]:
        raise errors.UserError(f"no table {unknown[0]!r}; tables: {', '.join(known)}")
    if {"loader", "step"} & set(names or known):
        open_reader(MAX_SEQ_LEN, 1)  # report missing data before measuring anything
    device = init_distributed(DEVICE, DTYPE, deterministic=False).device
    print(f"{hardware.device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name in names or known:
        found[name] = rows = table(*known[name])
        heading = list(max(rows, key=len))  # a case that failed has fewer columns
        lines = [heading, ["---"] * len(heading), *([str(row.get(key, "-")) for key in heading] for row in rows)]
        print(f"\n## {name}\n", *(f"| {' | '.join(line)} |" for line in lines), sep="\n", flush=True)
        if OUT:  # after every table: an interruption loses only one
            write_json(OUT, found)


@dataclass(frozen=True)
class Work:
    """What a case times."""

    function: Callable[[], object] | None  # may return {part: seconds}, shown as one row per part
    tokens: int = 0  # per call
    flops: int = 0  # per call
    columns: dict = field(default_factory=dict)  # extra columns, {heading: value}


def seconds_of(dist: DistContext, function: Callable, calls: int = 1) -> tuple[float, object]:
    """(seconds per call, result of the last call)."""
    begin = time.perf_counter()
    for _ in range(calls):
        result = function()
    hardware.synchronize(dist.device)
    return (time.perf_counter() - begin) / calls, result


WORKER = []  # in the process of a prepared case: its DistContext, its Work, calls per measurement


def measurement(settings: dict, cache_dir: str, prepare: Callable, case: dict) -> tuple:
    """Prepare a case in its process and return (seconds of the first call, Work without its function); when called
    again, return ({part: seconds}, FLOP/s of a matrix product, peak memory in bytes).
    """
    if not WORKER:
        globals().update(settings)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache_dir
        dist = init_distributed(DEVICE, case.get("dtype", DTYPE), deterministic=False)
        work = prepare(dist, **case)
        first, _, third = [seconds_of(dist, work.function)[0] for _ in range(3)]  # the third reuses freed memory
        WORKER.extend((dist, work, max(round(SECONDS / third), 1)))
        return first, replace(work, function=None)
    dist, work, calls = WORKER
    rate = hardware.matmul_flops(dist.device, dist.dtype, SECONDS / 2)
    seconds, result = seconds_of(dist, work.function, calls)
    return result if isinstance(result, dict) else {"": seconds}, rate, hardware.peak_memory_bytes(dist.device)


def measure(prepare: Callable, cases: Sequence[dict]) -> list[list]:
    """Results of `measurement` for each case, taken in turns; the last one is the exception if a case fails."""
    found, settings, spawn = [[] for _ in cases], config.settings(__name__), multiprocessing.get_context("spawn")
    quiet = (signal.signal, (signal.SIGINT, signal.SIG_DFL))  # Ctrl-C reaches all processes: no traceback from these
    with tempfile.TemporaryDirectory(prefix="nanotrain-bench-") as folder, ExitStack() as stack:
        workers = [stack.enter_context(ProcessPoolExecutor(1, spawn, *quiet)) for _ in cases]
        turns = list(zip(range(len(cases)), cases, workers, found, strict=True)) * (1 + REPETITIONS)
        for number, case, worker, answers in (bar := progress_bar(turns, "measuring")):
            if answers and isinstance(answers[-1], Exception):
                continue
            try:
                answers.append(worker.submit(measurement, settings, f"{folder}/{number}", prepare, case).result())
            except Exception as error:  # such as a kernel that this machine lacks: its row says "failed"
                bar.write(f"{case}: {type(error).__name__}: {errors.first_line(error)}", file=sys.stderr)
                answers.append(error)
    return found


def table(prepare: Callable, cases: Sequence[dict]) -> list[dict]:
    """The rows of a table, rounded to three significant digits."""
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
            row = {**case, **work.columns, **({"part": part} if part else {}), "ms": rounded(1000 * middle)}
            row["spread"] = f"{rounded(1000 * seconds.min()):g}-{rounded(1000 * seconds.max()):g}"
            row |= {"ratio": rounded(np.median(costs / reference)), "tok/s": round(work.tokens / middle) or "-"}
            row |= {"of matmul": rounded(np.median(work.flops / (rates * seconds))) or "-", "first s": rounded(first)}
            rows.append(row | {"MiB": round(max(memory) / 2**20)})
    return rows


def rounded(value: float) -> float:
    return float(f"{value:.3g}") if value < 100 else round(value)


def model_config(depth: int = 0, **other: int) -> gpt.GPTConfig:
    """The model of the settings, at another depth if given, and with `other` fields."""
    _, heads = recipe.model_width(depth or DEPTH, ASPECT_RATIO, HEAD_DIM)
    return replace(gpt.GPTConfig(VOCAB_SIZE, MAX_SEQ_LEN, depth or DEPTH, heads, heads, HEAD_DIM, BIGRAM_ROWS), **other)


def build(model_config: gpt.GPTConfig, dist: DistContext) -> tuple[gpt.GPT, list[optim.ShardedOptimizer]]:
    """(model with random weights, its optimizers)."""
    model = checkpoint.build_model(model_config, dist.device)
    model.init_weights(0)
    muon_dtype = torch.bfloat16 if dist.dtype == torch.bfloat16 else torch.float32
    return model, optim.build_optimizers(model.parameters_by_role(), RATES, 0.0, muon_dtype, dist)


def training(
    dist: DistContext, batches=(), batch_size=0, grad_accum_steps=1, compile="", checkpointing="off", **model
) -> Work:
    """Training steps as in scripts/base_train.py, on `batches` of (inputs, targets) or the same random tokens. 0 and ""
    stand for the settings. compile: off, block or whole. model: arguments of `model_config`, or `built` from `build`.
    """
    model, optimizers = model.get("built") or build(model_config(**model), dist)
    parameters, size, counts = list(model.parameters()), model.config, model.parameter_counts()
    tokens = torch.randint(size.vocab_size, (2, batch_size or DEVICE_BATCH_SIZE, size.max_seq_len), device=dist.device)
    model.recompute_blocks = checkpointing == "on"
    compile = compile or ("block" if COMPILE == "on" or (COMPILE == "auto" and hardware.can_compile()) else "off")
    if compile != "off":
        torch._inductor.config.cpp.vec_isa_ok = True  # skips test programs, which take as long as a model
        model.compile(dynamic=False) if compile == "whole" else model.compile_parts()  # whole: no bigram rows

    def step():
        for _ in range(grad_accum_steps):
            with record_function("loader"):
                inputs, targets = next(iter(batches), tokens)
            with dist.autocast():
                mean = model(inputs, targets) / grad_accum_steps
            mean.backward()
        with record_function("optimizer"):
            torch.nn.utils.get_total_norm(optim.collect_gradients(parameters, dist))
            optim.step(optimizers)
        model.zero_grad()

    weights, count = counts["matrix"] + counts["unembedding"], tokens[0].numel() * grad_accum_steps
    flops = recipe.training_flops_per_token(weights, size.num_layers, size.model_dim, size.max_seq_len)
    return Work(step, count, flops * count)


def precision(dist: DistContext, dtype: str, float32_precision: str) -> Work:
    """Training steps, and the dtypes of the products' inputs. medium: bfloat16 in oneDNN, TF32 on CUDA."""
    torch.set_float32_matmul_precision(float32_precision)
    seen = set()

    class Watch(TorchDispatchMode):  # below autocast
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if re.search("^(add)?mm$|^(badd)?bmm$|scaled_dot_product", function.overloadpacket.__name__):
                seen.update(str(x.dtype).removeprefix("torch.") for x in args[:3] if isinstance(x, torch.Tensor))
            return function(*args, **(kwargs or {}))

    with Watch():  # eager: compiled code hides its products
        training(dist, batch_size=1, compile="off").function()
    return replace(training(dist), columns={"products see": " ".join(sorted(seen))})


def optimizer(dist: DistContext) -> Work:
    """The update of all parameters, and of those of each optimizer, from the gradients of one sequence."""
    model, optimizers = build(model_config(), dist)
    model(*torch.randint(VOCAB_SIZE, (2, 1, MAX_SEQ_LEN), device=dist.device)).backward()
    parts = {"all": optimizers, **{type(each).__name__: [each] for each in optimizers}}
    return Work(lambda: {part: seconds_of(dist, partial(optim.step, some))[0] for part, some in parts.items()})


def attention(dist: DistContext, kernel: str, shape: Sequence[int] = ()) -> Work:
    """Attention forward and backward with one of torch's kernels. shape: (B, H, T, D), by default one layer's."""
    shape = shape or (DEVICE_BATCH_SIZE, model_config().num_heads, MAX_SEQ_LEN, HEAD_DIM)
    q, k, v, gradient = (torch.randn(shape, device=dist.device).to(dist.dtype).requires_grad_() for _ in range(4))

    def function():
        with nullcontext() if kernel == "default" else sdpa_kernel(getattr(SDPBackend, kernel)):
            found = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return torch.autograd.grad(found, (q, k, v), gradient)

    return Work(function, shape[0] * shape[2], 12 * q.numel() * shape[2])  # FLOPs without a causal mask, as in recipe


def head(dist: DistContext, chunk: int, compile: str) -> Work:
    """The loss from hidden states, forward and backward, with the logits of `chunk` tokens at a time."""
    tokens, width = DEVICE_BATCH_SIZE * MAX_SEQ_LEN, model_config().model_dim
    hidden = torch.randn(tokens, width, device=dist.device).to(dist.dtype).requires_grad_()
    weight = (torch.randn(VOCAB_SIZE, width, device=dist.device) / width).requires_grad_()
    targets, cap = torch.randint(VOCAB_SIZE, (tokens,), device=dist.device), gpt.GPTConfig.softcap
    kernel = torch.compile(loss.softmax_gradient, dynamic=False) if compile == "on" else loss.softmax_gradient
    loss.CHUNK_ROWS[dist.device.type] = chunk
    mean = partial(loss.mean_loss, hidden, weight, targets, cap, kernel)
    return Work(lambda: torch.autograd.grad(mean(), (hidden, weight)), tokens, 6 * tokens * width * VOCAB_SIZE)


def generation(dist: DistContext, depth: int, cache: str, texts: int) -> Work:
    """Greedy decoding of `texts` texts of MAX_SEQ_LEN tokens together, in float32 like all generation."""
    model = checkpoint.build_model(model_config(depth), dist.device).requires_grad_(False)
    model.init_weights(0)
    prompts = [[number] for number in range(texts)]

    def uncached():  # a forward pass over the whole text for each token
        tokens = torch.tensor(prompts, device=dist.device)
        for _ in range(MAX_SEQ_LEN):
            tokens = torch.cat((tokens, model.logits(tokens)[:, -1:].argmax(-1)), 1)
        return tokens.T[1:].tolist()

    cached = partial(engine.generate_batch, model, prompts, MAX_SEQ_LEN, temperature=0)
    return Work(lambda: list(cached() if cache == "on" else uncached()), texts * MAX_SEQ_LEN)


def open_reader(seq_len: int, threads: int) -> dataloader.SequenceReader:
    """A reader of the training sequences, as in a run."""
    tokenizer = BPETokenizer.load(paths.tokenizer_dir(TOKENIZER_DIR))
    slices = dataloader.slices_of(dataset.open_shards(paths.data_dir(DATA_DIR)).train, NUM_STREAMS)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the reader has threads of its own
    return dataloader.SequenceReader(slices, tokenizer, seq_len, NUM_STREAMS, seed=1337, threads=threads)


def loader(dist: DistContext, threads: int, batch_size: int, seq_len: int) -> Work:
    """The loader's next batches, in host memory."""
    reader, sequences = open_reader(seq_len, threads), np.empty((batch_size, seq_len + 1), dtype=np.int64)
    count = max(LOADER_TOKENS // (batch_size * seq_len), 1)
    return Work(lambda: [reader.fill(sequences) for _ in range(count)], count * batch_size * seq_len)


def step_by_parts(dist: DistContext) -> Work:
    """A training step with the loader, without and with torch's profiler, which slows it. Parts are GPU or CPU time."""
    torch._inductor.config.cpp.enable_kernel_profile = True  # otherwise all kernels of a graph are one event
    reader, on_gpu = open_reader(MAX_SEQ_LEN, hardware.cores_of_a_rank()), dist.device.type == "cuda"
    loader = dataloader.DataLoader(reader, DEVICE_BATCH_SIZE, dist.device)
    step = training(dist, ((b.inputs, b.targets) for b in loader), vocab_size=reader.tokenizer.vocab_size).function

    def function():
        (plain, _), parts = seconds_of(dist, step), dict.fromkeys(PARTS, 0.0)
        with profile() as found, record_function("step"):
            whole, _ = seconds_of(dist, step)
        for event in found.events():
            names, above = event.name, event
            while above := above.cpu_parent:
                names += f" < {above.name}"
            if event.device_type == torch.autograd.DeviceType.CPU and (names.endswith("step") or on_gpu):
                part = next(part for part, pattern in PARTS.items() if re.search(pattern, names))
                parts[part] += 1e-6 * (event.self_device_time_total if on_gpu else event.self_cpu_time_total)
        parts["rest"] += whole - sum(parts.values())
        return {"step": plain, "profiled step": whole, **parts}

    return Work(function)


if __name__ == "__main__":
    errors.run(lambda: main(config.override(__name__, positional=True)), for_its_output=True)
