"""Checks and measurements for the first minutes on a GPU, in steps with time limits.

    bash dev/gpu_check.sh OUT               both parts, each at most 5 minutes
    bash dev/gpu_check.sh --part=1 OUT      machine, GPU tests, kernel rates, training speed
    bash dev/gpu_check.sh --part=2 OUT      profile of a step, a run, kill and resume, memory
    bash dev/gpu_check.sh --smoke OUT       everything on a CPU, with tiny sizes

OUT receives gpu_check.md and gpu_check.json, rewritten after each step, and gpu_check.log with all output. Results of
the other part are kept. If a step fails or times out, the others still run and the exit code is 1. The script uses the
python3 on PATH, needs no network, and keeps data and runs in a temporary folder.
"""

import contextlib
import importlib.util
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from nanotrain import config, errors, paths
from nanotrain.errors import UserError
from nanotrain.files import atomic_file, file_sha256, write_json

# --- settings
SMOKE = False  # tiny sizes on the CPU
PART = 0  # part to run, 1 or 2; 0: both
STEP = ""  # single step to run in this process, without a limit and with data and runs in OUT; empty: all
# ------------

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = __file__  # program to start with --step
SMOKE_FACTOR = 4  # multiplies the limits on a CPU, which may be shared
MARK = "RESULT "  # prefix of a JSON row in a step's output
TAIL_LINES = 40  # lines of output shown for a failed step
SEQ_LEN, VOCAB_SIZE = 2048, 32768
LARGEST_BATCH = 256  # sequences per forward pass to start from; halved until they fit


@dataclass(frozen=True)
class Step:
    """A function that reports numbers with `tell` and raises an error if a check fails."""

    part: int
    seconds: int  # time limit on a GPU
    work: Callable


class StepsFailedError(UserError):
    """Steps failed or timed out."""

    exit_code = 1


def main(arguments: list[str]) -> None:
    """Run the steps chosen by the settings and write the report to the folder in `arguments`."""
    config.choice("PART", str(PART), ("0", "1", "2"))
    if len(arguments) != 1:
        raise UserError("give one folder for the report: bash dev/gpu_check.sh OUT")
    out = Path(arguments[0]).expanduser().absolute()
    if STEP:
        os.environ["NANOTRAIN_DIR"] = str(out)
        STEPS[config.choice("STEP", STEP, tuple(STEPS))].work()
        return
    check_machine()
    out.mkdir(parents=True, exist_ok=True)
    new = {"result": "not run", "seconds": 0.0, "rows": [], "output": []}
    steps = [
        {"name": name, "part": step.part, "limit": step.seconds * (SMOKE_FACTOR if SMOKE else 1), **new}
        for name, step in STEPS.items()
        if PART in (0, step.part)
    ]
    with tempfile.TemporaryDirectory(prefix="nanotrain-gpu-", ignore_cleanup_errors=True) as work:
        others = steps_of_the_other_part(out)
        for step in steps:
            print(f"== {step['name']}, at most {step['limit']} s", flush=True)
            step |= run_step(step["name"], step["limit"], Path(work), out / "gpu_check.log")
            write_report(out, sorted(steps + others, key=lambda step: step["part"]))
            print(section(step), flush=True)
    failed = [f"{step['name']} ({step['result']})" for step in steps if step["result"] != "ok"]
    if failed:
        raise StepsFailedError(f"{len(failed)} of {len(steps)} steps: {', '.join(failed)}; see {out / 'gpu_check.md'}")
    print(f"all {len(steps)} steps passed: {out / 'gpu_check.md'}")


def check_machine() -> None:
    """Raise UserError if no step can run here."""
    if importlib.util.find_spec("torch") is None:
        raise UserError(f"{sys.executable} has no torch: put a python3 with torch first on PATH")
    if not SMOKE:
        import torch  # takes seconds

        if not torch.cuda.is_available():
            raise UserError("torch finds no CUDA device: --smoke runs everything on a CPU, with tiny sizes")


def steps_of_the_other_part(out: Path) -> list[dict]:
    """Results that an earlier call with the other part left in a folder."""
    if not (out / "gpu_check.json").exists():
        return []
    found = json.loads((out / "gpu_check.json").read_text(encoding="utf-8"))
    return [step for step in found["steps"] if PART and step["part"] != PART and found["smoke"] == SMOKE]


def run_step(name: str, limit: float, work: Path, log: Path) -> dict:
    """Run one step in its own process and return {"result", "seconds", "rows", "output"}, however it ends."""
    begin, start = time.monotonic(), log.stat().st_size if log.exists() else 0
    command = [sys.executable, PROGRAM, f"--smoke={str(SMOKE).lower()}", f"--step={name}", str(work)]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(work / "compiled"), "PYTHONUNBUFFERED": "1"}
    if SMOKE:
        environment["OMP_NUM_THREADS"] = "1"  # more threads only wait for each other at tiny sizes
    with open(log, "ab") as file:
        streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **streams)
        try:
            result = "failed" if process.wait(limit) else "ok"
        except subprocess.TimeoutExpired:
            result = "timed out"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # including its children
            process.wait()
    seconds = round(time.monotonic() - begin, 1)
    lines = log.read_bytes()[start:].decode("utf-8", "replace").splitlines()
    rows = [json.loads(line.removeprefix(MARK)) for line in lines if line.startswith(MARK) and line.endswith("}")]
    said = [line for line in lines if line.strip() and not line.startswith(MARK) and "%|" not in line]  # no bars
    return {"result": result, "seconds": seconds, "rows": rows, "output": said[-TAIL_LINES:]}


def tell(**numbers: object) -> None:
    """Print a row of numbers for `run_step`, which finds it even if the step never ends."""
    print(f"{MARK}{json.dumps(numbers)}", flush=True)


def write_report(out: Path, steps: list[dict]) -> None:
    """Write the results so far as JSON and Markdown."""
    write_json(out / "gpu_check.json", {"smoke": SMOKE, "steps": steps})
    title = "# GPU check" + (": smoke test on a CPU, no measure of a GPU" if SMOKE else "")
    overview = table([{key: step[key] for key in ("name", "part", "result", "seconds", "limit")} for step in steps])
    with atomic_file(out / "gpu_check.md") as temporary:
        temporary.write_text("\n\n".join([title, overview, *map(section, steps)]) + "\n", encoding="utf-8")


def section(step: dict) -> str:
    """A step's results as Markdown, with the end of its output unless it is ok."""
    parts = [f"## {step['name']}: {step['result']} in {step['seconds']} s"]
    parts += [table(list(rows)) for _, rows in itertools.groupby(step["rows"], key=list)]
    if step["result"] != "ok":
        parts.append("\n".join(f"    {line}" for line in step["output"]))
    return "\n\n".join(parts)


def table(rows: list[dict]) -> str:
    """A Markdown table of dicts with the same keys."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: object) -> str:
    """A value formatted for a table."""
    if value is None or isinstance(value, (str, bool)):
        return {None: "-", True: "yes", False: "no"}.get(value, value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def machine() -> None:
    """Part 1: versions and device."""
    import torch

    from nanotrain import hardware

    dist = start()
    found = hardware.environment(dist.device, dist.dtype, dist.world_size)
    found |= {**found.pop("packages"), "GPUs": torch.cuda.device_count()}
    found["memory GiB"] = hardware.memory_bytes(dist.device) / 2**30
    found["published FLOP/s"] = hardware.peak_flops(dist.device)
    for name in ("triton", "pytest", "wandb", "matplotlib"):
        found[name] = importlib.util.find_spec(name) is not None
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        found["driver, clock, power"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    for name, value in found.items():
        tell(what=name, value=value)


def gpu_tests() -> None:
    """The GPU tests; in a smoke run, the CPU tests of the same file."""
    if importlib.util.find_spec("pytest") is None:
        raise UserError("pytest is not installed, so the tests cannot run")
    chosen = ["-m", "gpu", "tests/test_gpu.py", "tests/test_base_train.py"]
    if SMOKE:
        chosen = ["-k", "cpu", "tests/test_gpu.py"]
    report, temporary = paths.base_dir() / "tests.xml", paths.base_dir() / "pytest"
    options = ["-vv", "--tb=short", "-p", "no:cacheprovider", f"--basetemp={temporary}", f"--junitxml={report}"]
    code = begin("pytest", *options, *chosen).wait()
    found = ElementTree.parse(report).getroot()[0].attrib
    tests, skipped = int(found["tests"]), int(found["skipped"])
    failed = int(found["failures"]) + int(found["errors"])
    tell(passed=tests - failed - skipped, failed=failed, skipped=skipped)
    if code or tests == skipped:
        raise UserError(f"pytest exited with {code}: {failed} tests failed, {skipped} were skipped")


def kernels() -> None:
    """Rates of matrix products, a copy, and attention with torch's default kernel and two others."""
    import torch

    from nanotrain import hardware
    from scripts import bench

    dist = start()
    peak = hardware.peak_flops(dist.device)

    def show(kernel, rate, unit="TFLOP/s", share=None):
        tell(kernel=kernel, rate=rate, unit=unit, **{"of peak": share})

    for dtype in dict.fromkeys((torch.float32, dist.dtype)):
        rate = hardware.matmul_flops(dist.device, dtype, 0.5)
        show(f"matmul {dtype}", rate / 1e12, share=rate / peak if peak and dtype == dist.dtype else None)
    block = torch.zeros(2, 2**25 if SMOKE else 2**32, dtype=torch.uint8, device=dist.device)
    seconds = seconds_of_call(dist, lambda: block[0].copy_(block[1]))
    show("copy, read and written", block.nbytes / seconds / 1e9, "GB/s")
    for heads, name in itertools.product((6, 10), ("default", "FLASH_ATTENTION", "CUDNN_ATTENTION")):
        shape = (1, heads, 64, 128) if SMOKE else (16, heads, SEQ_LEN, 128)
        kernel = f"attention {name} {shape}, forward and backward, without the causal saving"
        work = bench.attention(dist, name, shape)
        try:
            rate = work.flops / seconds_of_call(dist, work.function)
        except RuntimeError as error:
            if name == "default":
                raise
            print(f"{kernel}: {error}", flush=True)
            show(kernel, None, "not available")
        else:
            show(kernel, rate / 1e12, share=rate / peak if peak else None)


def seconds_of_call(dist: object, function: Callable) -> float:
    """Median seconds per call over five measurements of a tenth of a second each."""
    from scripts import bench

    bench.seconds_of(dist, function)  # warm-up: allocates memory
    calls = max(round(0.1 / bench.seconds_of(dist, function)[0]), 1)
    return statistics.median(bench.seconds_of(dist, function, calls)[0] for _ in range(5))


def speed(depth: int) -> None:
    """Training steps on random tokens with the largest batch that fits, eager and then compiled."""
    import torch

    from nanotrain import hardware, loss, recipe, warmup
    from nanotrain.gpt import GPTConfig
    from scripts import bench

    dist = start()
    on_gpu, heads = dist.device.type == "cuda", recipe.model_width(depth, 0, 128)[1]
    model_config = GPTConfig(VOCAB_SIZE, SEQ_LEN, depth, heads, heads, 128)
    if SMOKE:
        model_config = GPTConfig(300, 16, depth // 10, 2, 2, 16)
    model, _ = built = bench.build(model_config, dist)
    batch_size = warmup.largest_batch_that_fits(dist, model, 4 if SMOKE else LARGEST_BATCH)
    parameters = model.parameter_counts()
    matmul, peak = hardware.matmul_flops(dist.device, dist.dtype), hardware.peak_flops(dist.device)
    for compiled in (False, True) if hardware.can_compile() else (False,):
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_accumulated_memory_stats()
            torch.cuda.reset_peak_memory_stats()
        before = hardware.peak_memory_bytes(dist.device)
        work = bench.training(dist, built=built, batch_size=batch_size, compile="block" if compiled else "off")
        first, *_ = [bench.seconds_of(dist, work.function)[0] for _ in range(3)]
        seconds = statistics.median(bench.seconds_of(dist, work.function)[0] for _ in range(5))
        policy = recipe.ActivationPolicy(dist.dtype.itemsize, compiled, False, loss.chunk_rows(dist.device))
        plan = recipe.estimate_memory(parameters, model_config, batch_size, 1, 1, policy)
        row = {"depth": model_config.num_layers, "compiled": compiled, "batch size": batch_size}
        row |= {"first step s": first, "step ms": 1000 * seconds, "tokens/s": round(work.tokens / seconds)}
        rate = work.flops / seconds
        row |= {"of peak": rate / peak if peak else None, "of matmul": rate / matmul}
        row |= against_plan(hardware.peak_memory_bytes(dist.device), plan, before, on_gpu)
        tell(**row, **{"alloc retries": torch.cuda.memory_stats()["num_alloc_retries"] if on_gpu else None})


def against_plan(measured: int, plan: object, before: int, on_gpu: bool) -> dict:
    """Peak memory, measured and planned (a recipe.Memory). before: bytes of a CPU process without its model."""
    from nanotrain import recipe

    planned = plan.peak if on_gpu else before + recipe.process_growth(plan)
    return {"peak GiB": measured / 2**30, "planned GiB": planned / 2**30, "measured / planned": measured / planned}


def data() -> None:
    """Part 2: the embedded corpus, a tokenizer for the runs, and a larger one for `bench step`."""
    wait_for(begin("nanotrain.dataset", "--dataset=stdlib"))
    for folder, vocab_size in (("tokenizer", 300 if SMOKE else 8192), ("large", 320 if SMOKE else VOCAB_SIZE)):
        chosen = [f"--vocab-size={vocab_size}", f"--tokenizer-dir={paths.base_dir() / folder}"]
        wait_for(begin("scripts.tok_train", *chosen, f"--max-chars={200_000 if SMOKE else 20_000_000}"))
        tell(tokenizer=folder, bytes=(paths.base_dir() / folder / "tokenizer.json").stat().st_size)


def bench_table(name: str) -> None:
    """A table of scripts.bench."""
    out, large = paths.base_dir() / f"bench-{name}.json", paths.base_dir() / "large"
    sizes = [f"--vocab-size={300 if SMOKE else VOCAB_SIZE}", f"--repetitions={1 if SMOKE else 2}"]
    wait_for(begin("scripts.bench", name, *model_flags(), *sizes, f"--tokenizer-dir={large}", f"--out={out}"))
    for row in json.loads(out.read_text(encoding="utf-8"))[name]:
        tell(**row)


def train() -> None:
    """A run by time with about 40 seconds of steps; its loss must fall."""
    code = begin_run("train", "--num-iterations=60" if SMOKE else "--target-minutes=1.1").wait()
    steps, bpb = metrics("train", "train/loss"), [row["val/bpb"] for row in metrics("train", "val/bpb")]
    losses, tenth = [row["train/loss"] for row in steps], max(len(steps) // 10, 1)
    first, last = statistics.mean(losses[:tenth]), statistics.mean(losses[-tenth:])
    row = {"steps": len(steps), "seconds of steps": sum(row["train/seconds"] for row in steps)}
    row["tokens/s"] = statistics.median(row["train/tok_per_sec"] for row in steps)
    row["of peak"] = statistics.median(row["train/mfu"] for row in steps) if "train/mfu" in steps[0] else None
    tell(**row, **{"first loss": first, "last loss": last, "first bpb": bpb[0], "last bpb": bpb[-1]})
    if code:
        raise UserError(f"the run exited with {code}")
    if not last < 0.95 * first:
        raise UserError(f"the loss did not fall: {first:.4f} in the first tenth of the steps, {last:.4f} in the last")


def resume() -> None:
    """Two runs with the same settings side by side; one is killed after a checkpoint and resumed."""
    steps, save = (200, 20) if SMOKE else (20, 8)
    flags = ["--deterministic=true", "--eval-every=0", f"--num-iterations={steps}"]
    straight = begin_run("straight", *flags, "--save-every=0")
    killed = begin_run("killed", *flags, f"--save-every={save}")
    saved = paths.run_dir("killed") / "checkpoints"
    while killed.poll() is None and not list(saved.glob("step_*")):
        time.sleep(0.01)
    killed.kill()
    if killed.wait() != -signal.SIGKILL:
        raise UserError(f"the run to be killed exited with {killed.returncode} before that")
    newest = max(int(folder.name.removeprefix("step_")) for folder in saved.glob("step_*"))
    again = begin_run("killed", *flags, f"--save-every={save}", "--resume")
    wait_for(straight, again)
    results = []
    for what, one, other in zip(
        ("weights", "optimizer", "data", "losses"), bits("straight"), bits("killed"), strict=True
    ):
        results.append(one == other)
        tell(what=what, steps=steps, **{"killed after": newest, "same": one == other, "SHA-256": one, "resumed": other})
    if not all(results):
        raise UserError("the resumed run is not bit-identical to the undisturbed one")


def bits(name: str) -> list[str]:
    """Hashes of a run's last weights and optimizer state, and of each step's data and loss."""
    last = max((paths.run_dir(name) / "checkpoints").glob("step_*"))
    found = [last / file for file in ("model.safetensors", "optim-00000-of-00001.safetensors")]
    for key in ("data_hash", "train/loss"):
        found.append(paths.run_dir(name) / key.replace("/", "_"))
        found[-1].write_text("\n".join(f"{row['step']} {row[key]}" for row in metrics(name, key)), encoding="utf-8")
    return [file_sha256(file)[:16] for file in found]


def peak_memory() -> None:
    """Peak memory of the `train` step's run against its plan."""
    from nanotrain import hardware, recipe
    from scripts import base_train  # noqa: F401  counts as the run's memory on a CPU

    dist = start()
    record = json.loads((paths.run_dir("train") / "config.json").read_text(encoding="utf-8"))
    plan = recipe.Memory(**record["plan"]["memory"])
    measured = max(row["system/peak_memory_bytes"] for row in metrics("train", "system/peak_memory_bytes"))
    tell(**against_plan(measured, plan, hardware.peak_memory_bytes(dist.device), dist.device.type == "cuda"))


def start() -> object:
    """The DistContext of a step."""
    from nanotrain.dist import init_distributed

    return init_distributed("cpu" if SMOKE else "cuda", "float32" if SMOKE else "auto", deterministic=False)


def model_flags() -> list[str]:
    """Flags for the model and batch of part 2, for base_train and bench."""
    if SMOKE:
        sizes = ["--depth=1", "--aspect-ratio=32", "--head-dim=16", "--max-seq-len=16", "--device-batch-size=4"]
        return [*sizes, "--bigram-rows=0", "--device=cpu", "--dtype=float32", "--compile=off"]
    return ["--depth=12", f"--max-seq-len={SEQ_LEN}", "--device-batch-size=32", "--bigram-rows=0", "--device=cuda"]


def begin_run(name: str, *flags: str) -> subprocess.Popen:
    """Start base_train on the embedded corpus."""
    batch = ["--total-batch-size=128", "--eval-tokens=1024"] if SMOKE else ["--total-batch-size=65536"]
    fixed = [f"--run-name={name}", *model_flags(), *batch, "--spectral-tokens=0", "--report=false"]
    return begin("scripts.base_train", *fixed, *flags)


def begin(module: str, *arguments: str) -> subprocess.Popen:
    """Start `python -m module` in the repository's folder."""
    return subprocess.Popen([sys.executable, "-m", module, *arguments], cwd=ROOT, stdin=subprocess.DEVNULL)


def wait_for(*processes: subprocess.Popen) -> None:
    """Wait for all processes. Raises UserError if one fails."""
    for process in processes:
        if process.wait():
            raise UserError(f"{' '.join(process.args[1:])} exited with {process.returncode}")


def metrics(name: str, key: str) -> list[dict]:
    """The rows of a run's metrics.jsonl that have `key`."""
    lines = (paths.run_dir(name) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if key in row]


STEPS = {
    "machine": Step(1, 15, machine),
    "tests": Step(1, 90, gpu_tests),
    "kernels": Step(1, 30, kernels),
    "speed 12": Step(1, 70, partial(speed, 12)),
    "speed 20": Step(1, 85, partial(speed, 20)),
    "data": Step(2, 25, data),
    "bench step": Step(2, 60, partial(bench_table, "step")),
    "bench optimizer": Step(2, 30, partial(bench_table, "optimizer")),
    "train": Step(2, 85, train),
    "resume": Step(2, 90, resume),
    "memory": Step(2, 10, peak_memory),
}


def run() -> None:
    """Parse the command line and run."""
    arguments = []
    errors.run(lambda: arguments.extend(config.override(__name__, positional=True)), lambda: main(arguments))


if __name__ == "__main__":
    run()
