"""Device, precision, memory, cores and speed of this machine; `python -m nanotrain.hardware` prints them."""

import contextlib
import ctypes
import hashlib
import math
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import time
from importlib import metadata
from pathlib import Path

import torch
import torch.nn.functional as F

from nanotrain import config, errors
from nanotrain.errors import UserError
from nanotrain.files import file_sha256

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
STARTED = time.monotonic()  # approximate start of the process, because this module is imported early
# Published dense bf16 FLOP/s by a part of the device name; the first match counts.
PEAK_FLOPS = {
    "GB200": 2.5e15, "B200": 2.25e15, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
    "A100": 312e12, "L40S": 362e12, "A10G": 70e12, "RTX 5090": 209.5e12, "RTX 4090": 165.2e12, "RTX 3090": 71e12,
}  # fmt: skip


def find_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """The device for a local rank; auto: cuda, mps (one process only) or cpu. Raises UserError if there is none."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = "cuda" if found["cuda"] else "mps" if found["mps"] and "RANK" not in os.environ else "cpu"
    if not found[name]:
        raise UserError(f"--device={name}: torch finds no such device (see python -m nanotrain.hardware)")
    count = torch.cuda.device_count()
    if name == "cuda" and local_rank >= count:
        raise UserError(f"no GPU for local rank {local_rank}, there are {count}: use torchrun --nproc_per_node={count}")
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)


def find_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """(dtype of matrix products, reason). auto: the fastest dtype that is safe on the device."""
    if name != "auto":
        return DTYPES[name], f"--dtype={name}"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        fast = torch.bfloat16 if capability >= (8, 0) else torch.float16 if capability >= (7, 0) else torch.float32
        return fast, f"CUDA capability {capability[0]}.{capability[1]}"
    if device.type == "cpu":
        can = torch.cpu.get_capabilities()
        # avx512_fp16 without AMX: the CPU has AMX, but it is hidden, and its AVX512_BF16 has half the rate of float32.
        if has_amx() or (can.get("avx512_bf16") and not can.get("avx512_fp16")):
            return torch.bfloat16, "fast on this CPU"
        return torch.float32, "no fast bfloat16 on this CPU"
    return torch.float32, "the safe choice on this device"


def has_amx() -> bool:
    """Whether this CPU has AMX for products in bfloat16."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def configure(device: torch.device, seed: int = 1337, deterministic: bool = True) -> None:
    """Seed torch and configure it for `device`. deterministic: repeatable kernels on CUDA (always on for a CPU)."""
    if device.type == "cpu":
        # Make glibc reuse large freed blocks: new pages for a 32 MB tensor take longer than the product that fills it.
        _call_glibc("mallopt", -1, 2**31 - 1)  # M_TRIM_THRESHOLD: never return the top of the heap
        _call_glibc("mallopt", -3, 2**30)  # M_MMAP_THRESHOLD: no separate mapping for blocks below 1 GiB
    if "OMP_NUM_THREADS" not in os.environ and cores_of_a_rank() < torch.get_num_threads():
        torch.set_num_threads(cores_of_a_rank())  # torch ignores CPU quotas
    if deterministic or device.type == "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if device.type == "cuda":
            torch.use_deterministic_algorithms(True)
        else:
            torch.set_deterministic_debug_mode("error")  # same flag, without a second spent on importing the compiler
        torch.utils.deterministic.fill_uninitialized_memory = False
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # silences torch's profiler
    torch.sparse.check_sparse_tensor_invariants.disable()  # the default, but torch 2.11 warns if it is not explicit
    torch.manual_seed(seed)


def give_back_freed_memory() -> None:
    """Return freed memory, which `configure` makes glibc keep, to the system."""
    _call_glibc("malloc_trim", 0)


def _call_glibc(function, *arguments):
    with contextlib.suppress(AttributeError):  # not glibc, as on macOS
        getattr(ctypes.CDLL(None), function)(*arguments)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` means that the device or the machine is out of memory."""
    texts = ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")  # CPU, GPU, CUDA libraries
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in texts)


def can_compile() -> bool:
    """Whether torch.compile has what it needs, a GPU or a C++ compiler."""
    return bool(torch.cuda.is_available() or shutil.which("g++") or shutil.which("clang++"))


def cpu_cores(root: Path = Path("/")) -> int:
    """Number of CPU cores this process may use: its affinity or its control groups' quota (rounded up), if smaller."""
    limits = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    for group in _control_groups("cpu", root):
        quota = _number(group / "cpu.max") or _number(group / "cpu.cfs_quota_us")
        period = _number(group / "cpu.max", 1) or _number(group / "cpu.cfs_period_us")
        if quota > 0 and period > 0:
            limits.append(math.ceil(quota / period))
    return min(limits)


def cores_of_a_rank() -> int:
    """Number of CPU cores per rank on this machine, at least 1."""
    return max(cpu_cores() // int(os.environ.get("LOCAL_WORLD_SIZE") or 1), 1)


def _memory_limits(root):
    """[(limit, usage)] in bytes of this process's control groups. Usage excludes cached files, which can be evicted."""
    limits = []
    for group in _control_groups("memory", root):
        limit = _number(group / "memory.max") or _number(group / "memory.limit_in_bytes")
        used = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes")
        with contextlib.suppress(OSError):
            stat = (group / "memory.stat").read_text(encoding="utf-8", errors="replace")
            found = re.findall(r"^(total_)?(?:in)?active_file (\d+)$", stat, re.MULTILINE)
            below = any(total for total, _ in found)  # version 1 has separate totals that include child groups
            used -= sum(int(number) for total, number in found if bool(total) == below)
        if limit:
            limits.append((limit, used))
    return limits


def _number(path, place=0):
    """The integer at word `place` of a file; 0 if it is not a number, as in "max", or there is no such file."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(path.read_text(encoding="utf-8").split()[place])
    return 0


def _control_groups(controller, root):
    """Yield the folders of this process's control groups and their parents; some may not exist."""
    with contextlib.suppress(OSError):  # not Linux
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
        for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") > 1):
            if controller in (controllers or controller).split(","):  # version 2 has one line without controllers
                group = Path(path.lstrip("/"))  # in a container perhaps invisible, unlike its parents
                for mount in {controllers, controllers and controller}:
                    yield from (root / "sys/fs/cgroup" / mount / part for part in (group, *group.parents))


def seconds_since_start() -> float:
    """Seconds since this process started, imports included; without /proc, since this module was imported."""
    with contextlib.suppress(OSError):
        ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        # not /proc/uptime, which some containers count from their own start instead of the system's
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - STARTED


def peak_flops(device: torch.device) -> float | None:
    """Published dense bf16 FLOP/s of a CUDA device, None if unknown or not CUDA."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def matmul_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """Median FLOP/s of a (4096, 256) @ (256, 1024) product in `dtype`, with every side 8 times as long on CUDA."""
    rows, inner, columns = (8 * side if device.type == "cuda" else side for side in (4096, 256, 1024))
    a = torch.randn(rows, inner, device=device).to(dtype)
    b = torch.randn(columns, inner, device=device).to(dtype).t()
    out = torch.empty(rows, columns, device=device, dtype=dtype)
    return 2 * rows * inner * columns / _median_seconds(lambda: torch.mm(a, b, out=out), device, seconds)


def training_flops_per_second(device: torch.device, dtype: torch.dtype, seconds: float = 0.1) -> float:
    """Median FLOP/s of an eager forward and backward pass through one plain transformer layer of width 256 (1,024 on
    CUDA) on 2,048 tokens (16,384). Unlike `matmul_flops`, it includes attention and memory-bound operations.
    """
    width, rows = (1024, 64) if device.type == "cuda" else (256, 8)
    shapes = ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width))
    weights = [(torch.randn(shape, device=device) / width**0.5).requires_grad_() for shape in shapes]
    qkv, output, up, down = weights
    x = torch.randn(rows, 256, width, device=device)

    def train():
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            heads = F.linear(F.rms_norm(x, (width,)), qkv).view(rows, 256, 3, width // 128, 128).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).reshape(x.shape)
            y = x + F.linear(attended, output)
            y = y + F.linear(F.relu(F.linear(F.rms_norm(y, (width,)), up)).square(), down)
        torch.autograd.grad(y.float().sum(), weights)

    return rows * 256 * (6 * 12 * width**2 + 12 * width * 256) / _median_seconds(train, device, seconds)


def _median_seconds(function, device, seconds):
    """Median time of the calls made within about `seconds`, without the first."""
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 4:
        begin = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work, for timing."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: torch's allocations on a GPU, elsewhere the resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # preferred, because getrusage includes the peak of the parent process
    peak = _proc_value("/proc/self/status", "VmHWM")
    return int(peak.split()[0]) * 1024 if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def memory_bytes(device: torch.device, root: Path = Path("/")) -> int:
    """Total bytes of the device's memory; for a CPU the machine's, or the limit of its control groups if smaller."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([whole, *(limit for limit, _ in _memory_limits(root))])


def free_memory_bytes(device: torch.device, root: Path = Path("/")) -> int:
    """Bytes available to this rank: all of its GPU's memory, or its share of what is free on the machine."""
    if device.type == "cuda":
        return memory_bytes(device)
    available = _proc_value("/proc/meminfo", "MemAvailable")
    free = int(available.split()[0]) * 1024 if available else memory_bytes(device)
    free = min([free, *(limit - used for limit, used in _memory_limits(root))])
    return free // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def device_name(device: torch.device) -> str:
    """Model of the GPU or the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _proc_value("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()


def _proc_value(path, field):
    """The value in the first line "field: value" of a file in /proc; None if there is none, as on macOS."""
    with contextlib.suppress(OSError):
        found = re.search(rf"^{field}\s*:(.*)$", Path(path).read_text(encoding="utf-8"), re.MULTILINE)
        return found and found[1].strip()


def environment(device: torch.device, dtype: torch.dtype, world_size: int) -> dict:
    """JSON-like dict of the versions and hardware that results depend on, besides the settings."""
    packages = {name: metadata.version(name) for name in ("pyarrow", "tokenizers", "numpy", "safetensors")}
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {"torch": str(torch.__version__), **packages},  # names the build, unlike some metadata
        "cuda": torch.version.cuda,
        "device": device.type,
        "device_name": device_name(device),
        "cpu_cores": cpu_cores(),
        "threads": torch.get_num_threads(),
        "world_size": world_size,
        "dtype": str(dtype).removeprefix("torch."),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        **code(Path(__file__).parent),
    }


def code(package: Path) -> dict:
    """{code_sha256: hash of the package's files; commit, changed: from git, or None if its parent is not a clone}."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("[!.]*.py")):
        digest.update(os.fsencode(path.relative_to(package)) + bytes.fromhex(file_sha256(path)))
    commit = changed = None
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments):
        command = ["git", "-C", str(package.parent), *arguments]
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, env=environment, text=True).rstrip("\n")

    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        if not git("rev-parse", "--show-prefix"):  # otherwise a copy inside another repository
            commit, changed = git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    return {"code_sha256": digest.hexdigest(), "commit": commit, "changed": changed}


def main() -> None:
    device = find_device()
    configure(device)
    dtype, reason = find_dtype("auto", device)
    print(f"python     {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}")
    print(f"device     {device} ({device_name(device)}), {cpu_cores()} cores, {torch.get_num_threads()} threads")
    print(f"GPUs       {torch.cuda.device_count()}")
    print(f"precision  {str(dtype).removeprefix('torch.')} ({reason})")
    print(f"compiler   {'found' if can_compile() else 'none: training runs eagerly'}")
    for name in ("float32", "bfloat16"):
        print(f"matmul     {matmul_flops(device, DTYPES[name]) / 1e9:,.0f} GFLOP/s in {name}")
    print(f"training   {training_flops_per_second(device, dtype) / 1e9:.1f} GFLOP/s in one small layer")
    print(f"memory     {memory_bytes(device) / 2**30:.1f} GiB")


if __name__ == "__main__":
    errors.run(lambda: config.override(__name__), main)
