"""This process: rank, device, precision, seed, process group, small collectives, and what the hardware can do.

`python -m nanotrain.runtime` prints what this machine is to nanotrain.
"""

import contextlib
import ctypes
import gc
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from nanotrain import config, errors
from nanotrain.errors import PeerError, UserError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

JOIN_SECONDS = 600.0  # in which all ranks must have started
MESSAGE_BYTES = 2**26  # up to which tensors are sent together: long enough for full speed, short enough to copy

# Dense bf16 FLOP/s as the vendors publish them, by a part of the device's name; the first match counts.
PEAK_FLOPS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}


@dataclass(frozen=True)
class Runtime:
    """One process of a run: its place among the ranks, its device, and the dtype of its matrix products."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype
    dtype_reason: str

    @property
    def is_main(self):
        """True on rank 0, which alone prints, logs and writes."""
        return self.rank == 0

    def say(self, text):
        """Print `text` on rank 0."""
        if self.is_main:
            print(text, flush=True)

    def autocast(self):
        """The context in which the model's matrix products run in `dtype`; does nothing for float32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def sum(self, values):
        """The sums over all ranks of a list of numbers or () tensors, as floats, with one read of the device."""
        device = self.device if self.device.type == "cuda" else "cpu"  # MPS has no float64
        numbers = [0.0 if isinstance(value, torch.Tensor) else value for value in values]
        total = torch.tensor(numbers, dtype=torch.float64).to(device, non_blocking=True)  # one by one each would wait
        for place, value in zip(total, values, strict=True):
            if isinstance(value, torch.Tensor):
                place.copy_(value)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def broadcast(self, value):
        """Rank 0's `value` (anything JSON-like), on every rank."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0)  # by the CPU: a GPU's collective would not wait for a slow rank 0
        return box[0]

    def gather(self, value):
        """A list of every rank's `value` (anything JSON-like), on every rank."""
        boxes = [value]
        if self.world_size > 1:
            boxes = [None] * self.world_size
            dist.all_gather_object(boxes, value)
        return boxes

    def concatenate(self, tensor):
        """The tensors of all ranks joined along their first dimension, which may differ in size, in order of rank."""
        if self.world_size == 1:
            return tensor
        sizes = torch.empty(self.world_size, dtype=torch.int64, device=tensor.device)
        dist.all_gather(list(sizes.split(1)), torch.tensor([len(tensor)], device=tensor.device))
        sizes = sizes.tolist()
        padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        joined = tensor.new_empty((self.world_size, *padded.shape))
        dist.all_gather(list(joined.unbind()), padded)
        return torch.cat([part[:size] for part, size in zip(joined, sizes, strict=True)])

    def share(self, owned):
        """Begin to give every rank the tensors that each rank owns; returns a function that waits until all are there.

        owned: for each rank, a list of its 1-D contiguous tensors of one dtype, which the other ranks have too, to be
        overwritten. Small ones travel in one message, large ones without being copied.
        """
        sent = []
        for rank, tensors in enumerate(owned if self.world_size > 1 else ()):
            for message in _messages(tensors):
                if len(message) == 1:
                    flat = message[0]
                elif rank == self.rank:
                    flat = torch.cat(message)
                else:
                    flat = message[0].new_empty(sum(map(len, message)))
                sent.append((rank, message, flat, dist.broadcast(flat, rank, async_op=True)))

        def wait():
            for rank, message, flat, work in sent:
                work.wait()
                if rank != self.rank and len(message) > 1:
                    torch._foreach_copy_(message, flat.split([len(tensor) for tensor in message]))

        return wait

    def assemble(self, part, sizes):
        """The 1-D tensors of all ranks joined in order of rank, for rank 0; None for the others. sizes: of each rank's,
        which all ranks know. It is made in the memory of the CPU, unless there is only one rank.
        """
        if self.world_size == 1:
            return part
        if not self.is_main:
            if sizes[self.rank]:
                dist.send(part.cpu(), 0)
            return None
        joined = torch.empty(sum(sizes), dtype=part.dtype)
        for rank, place in enumerate(joined.split(sizes)):
            if rank == self.rank:
                place.copy_(part)
            elif len(place):
                dist.recv(place, rank)
        return joined

    def on_main(self, function):
        """The result of `function()`, which only rank 0 runs; a UserError or OSError of it is raised on every rank."""
        result, error = None, None
        if self.is_main:
            try:
                result = function()
            except (UserError, OSError) as raised:
                error = _portable(raised)
        result, error = self.broadcast((result, error))
        if error:
            raise getattr(errors, error[0])(error[1])
        return result

    def together(self, function):
        """This rank's result of `function()`, after all have run it; a UserError or OSError on any is raised on all."""
        result, error = None, None
        try:
            result = function()
        except (UserError, OSError) as raised:
            error = _portable(raised)
        first = next((found for found in self.gather(error) if found), None)
        if first:
            raise getattr(errors, first[0])(first[1])
        return result

    def largest_that_fits(self, most, attempt):
        """The first of `most`, half of it, ... 1 with which `attempt(number)` runs out of memory on no rank; 0 if there
        is none. All ranks try the same numbers; `attempt` must not wait for another rank.
        """
        number = most
        while number:
            failed = False
            try:
                attempt(number)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failed = True
            # Only here, where the error and the frames of its traceback have gone, can their tensors go too.
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if not any(self.gather(failed)):
                break
            number //= 2
        return number

    def synchronize(self):
        """Wait until the device has done all its work, so that a clock reading means something."""
        _synchronize(self.device)

    def peak_memory_bytes(self):
        """The most memory this process has held so far: on the GPU, or for the others of the process itself."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        with contextlib.suppress(OSError):
            # first choice, because getrusage also counts the process that started this one
            for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        import resource  # not on Windows

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def forget_peak_memory(self):
        """On the GPU, let `peak_memory_bytes` begin anew."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def close(self):
        """Leave the process group."""
        if self.world_size > 1:
            dist.destroy_process_group()


def start(device="auto", dtype="auto", seed=1337, deterministic=True):
    """The Runtime of this process, with a process group whenever torchrun started more than one.

    device: auto, cuda, mps or cpu. dtype: auto, bfloat16, float16 or float32. `deterministic` asks torch for
    repeatable kernels (always used on the CPU). Raises UserError for what this machine does not have.
    """
    config.choice("DEVICE", device, ("auto", "cuda", "mps", "cpu"))
    config.choice("DTYPE", dtype, ("auto", *DTYPES))
    rank, local_rank, world_size = _place()
    found = _device(device, local_rank)
    if found.type == "cuda":
        torch.cuda.set_device(found)  # before NCCL begins, which takes the present one
    if world_size > 1:
        _join(found, world_size)
    if found.type == "cpu":
        _keep_freed_memory()
    if deterministic or found.type == "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if found.type == "cuda":
            torch.use_deterministic_algorithms(True)
        else:
            torch.set_deterministic_debug_mode("error")  # the same flag, without a second of imports for the compiler
        torch.utils.deterministic.fill_uninitialized_memory = False
    torch.sparse.check_sparse_tensor_invariants.disable()  # said aloud, for torch 2.11 warns where it is not
    torch.manual_seed(seed)
    compute_dtype, reason = _dtype(dtype, found)
    return Runtime(rank, local_rank, world_size, found, compute_dtype, reason)


def _messages(tensors):
    """Lists of consecutive tensors: as many as make up MESSAGE_BYTES at most, or one."""
    found, size = [], MESSAGE_BYTES
    for tensor in tensors:
        if size + tensor.nbytes > MESSAGE_BYTES:
            found.append([])
            size = 0
        found[-1].append(tensor)
        size += tensor.nbytes
    return found


def _portable(error):
    """(name of the kind of error in nanotrain.errors, message), which another rank can raise."""
    if isinstance(error, OSError):
        return "FileError", f"{error.strerror}: {error.filename}" if error.filename else str(error)
    return next(kind.__name__ for kind in type(error).__mro__ if hasattr(errors, kind.__name__)), str(error)


def _place():
    """[rank, local rank, world size], as torchrun gives them to its processes."""
    defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    given = {name: os.environ.get(name) or default for name, default in defaults.items()}
    place = [int(value) if value.isdecimal() else -1 for value in given.values()]
    if min(place) < 0 or place[0] >= place[2]:
        written = " ".join(f"{name}={value}" for name, value in given.items())
        raise UserError(f"{written}: no place among ranks; start the ranks with torchrun, or unset all three")
    return place


def _device(name, local_rank):
    have_cuda, have_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if have_cuda else "mps" if have_mps and "RANK" not in os.environ else "cpu"
    if name == "cuda" and not have_cuda:
        raise UserError(
            "--device=cuda: torch finds no CUDA device here (python -m nanotrain.runtime says what it finds)"
        )
    if name == "mps" and not have_mps:
        raise UserError(
            "--device=mps: torch finds no Metal device here (python -m nanotrain.runtime says what it finds)"
        )
    if name == "cuda" and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank}, but there are {torch.cuda.device_count()} CUDA devices: "
            f"use torchrun --nproc_per_node={torch.cuda.device_count()}"
        )
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)


def _join(device, world_size):
    if device.type == "mps":
        raise UserError(f"--device=mps runs one process, not {world_size}: use --device=cpu or one process")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(f"WORLD_SIZE={world_size} without {' and '.join(missing)}: start the ranks with torchrun")
    if not dist.is_initialized():
        store, rank, _ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(_name_of_attempt(store, rank, world_size), store)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def _name_of_attempt(store, rank, world_size):
    """A name that rank 0 draws for this start of the ranks and that all of them get.

    torchrun (2.13) hands restarted ranks the store of those it has ended, with addresses where nobody listens any more;
    whoever looks first would find them. So every rank gets the name under a key that it has drawn itself, and rank 0
    goes on answering until all of this start have it.
    """
    if rank:
        key = uuid.uuid4().hex
        store.set(f"nanotrain/rank{rank}", key)
        name = store.get(key).decode()
        store.set(f"{name}/rank{rank}", "here")
        return name
    name, missing = uuid.uuid4().hex, set(range(1, world_size))
    end = time.monotonic() + JOIN_SECONDS
    while missing:
        for other in missing:
            if store.check([f"nanotrain/rank{other}"]):
                store.set(store.get(f"nanotrain/rank{other}").decode(), name)
        missing = {other for other in missing if not store.check([f"{name}/rank{other}"])}
        if missing and time.monotonic() > end:
            raise PeerError(f"rank {', '.join(map(str, sorted(missing)))} did not start within {JOIN_SECONDS:.0f} s")
        time.sleep(0.01)
    return name


def _dtype(name, device):
    if name != "auto":
        return DTYPES[name], "as asked"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        version = f"CUDA capability {capability[0]}.{capability[1]}"
        if capability >= (8, 0):
            return torch.bfloat16, version
        if capability >= (7, 0):
            return torch.float16, f"{version}: fast float16, no bfloat16"
        return torch.float32, f"{version}: no fast 16-bit matrix products"
    if device.type == "cpu":
        can = torch.cpu.get_capabilities()
        for feature in ("amx_bf16", "avx512_bf16"):
            if can.get(feature):
                return torch.bfloat16, f"this CPU has {feature.upper()}"
        return torch.float32, "this CPU has neither AVX512_BF16 nor AMX"
    return torch.float32, "the safe choice on this device"


def _keep_freed_memory():
    """Tell glibc to reuse large freed blocks: fresh pages of a 32 MB tensor cost more time than the product that fills
    it.
    """
    _call_glibc("mallopt", -1, 2**31 - 1)  # M_TRIM_THRESHOLD: never give the top of the heap back
    _call_glibc("mallopt", -3, 2**30)  # M_MMAP_THRESHOLD: no private mapping for blocks below 1 GiB


def give_back_freed_memory():
    """Give back to the system what `start` lets glibc keep, before something else than a step needs memory: its large
    blocks would fit into none of the holes that a step leaves.
    """
    _call_glibc("malloc_trim", 0)


def _call_glibc(function, *arguments):
    """Elsewhere nothing happens: on macOS there is no such function, on Windows no library without a name."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        getattr(ctypes.CDLL(None), function)(*arguments)


def is_out_of_memory(error):
    """Whether `error` says that the device or the machine has no memory left."""
    texts = ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")  # of the CPU, of a GPU, of its libraries
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in texts)


def is_lost_peer(error):
    """Whether `error` is what a collective raises when another rank has ended."""
    text = str(error)
    return isinstance(error, dist.DistError) or "gloo/transport" in text or "Connection closed by peer" in text


def use_tokenizer_threads(parallel):
    """Let each call of the tokenizers library use all cores, or only the thread that makes it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if parallel else "false"


def use_compile_cache(folder):
    """Let torch.compile keep its results in `folder`; call it before anything is compiled."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def can_compile():
    """Whether torch.compile has what it needs: a GPU, or a C++ compiler."""
    return bool(torch.cuda.is_available() or shutil.which("g++") or shutil.which("clang++"))


def silence_profiler():
    """Keep torch's profiler from writing a line to the terminal whenever it starts or stops."""
    os.environ["KINETO_LOG_LEVEL"] = "6"  # above all of its levels


def trust_cpu_flags(trust):
    """Let torch.compile take the vector instructions that the CPU names, without compiling nine test programs first,
    which takes as long as the model.
    """
    torch._inductor.config.cpp.vec_isa_ok = True if trust else None


def cores_of_a_rank():
    """How many cores each rank of this machine may count as its own, at least 1."""
    return max((os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE") or 1), 1)


def seconds_since_start():
    """Seconds since this process was started by the system, so that imports count."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        # not /proc/uptime, which in some containers counts from the container's start and not from the system's
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    with contextlib.suppress(OSError, ValueError):
        found = subprocess.run(
            ["ps", "-o", "etime=", "-p", str(os.getpid())], capture_output=True, text=True, check=False
        )
        days, _, clock = found.stdout.strip().rpartition("-")
        seconds = 0
        for part in clock.split(":"):
            seconds = 60 * seconds + int(part)
        return float(seconds + 86400 * int(days or 0))
    return time.process_time()


def peak_flops(device):
    """The device's published dense bf16 FLOP/s, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def matmul_flops(device, dtype, seconds=0.2):
    """The median FLOP/s of a (4096, 256) by (256, 1024) product in `dtype` on this machine (all sides 8 times as long
    on CUDA, where the product would be over before the wait for it), measured for about `seconds`.
    """
    rows, inner, columns = (8 * side if device.type == "cuda" else side for side in (4096, 256, 1024))
    a = torch.randn(rows, inner, device=device).to(dtype)
    b = torch.randn(columns, inner, device=device).to(dtype).t()
    out = torch.empty(rows, columns, device=device, dtype=dtype)
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        begin = time.perf_counter()
        torch.mm(a, b, out=out)
        _synchronize(device)
        times.append(time.perf_counter() - begin)
    return 2 * rows * inner * columns / statistics.median(times)


def training_flops_per_second(device, dtype, seconds=0.1):
    """The median FLOP/s of the forward and backward pass of one plain transformer layer of width 256 (1,024 on CUDA)
    on 2,048 tokens (16,384), eager, measured for about `seconds`.

    Unlike `matmul_flops` it also pays for attention and for what moves memory, in the proportion of a real layer, so
    it says how long training takes on machines of any balance.
    """
    width, rows = (1024, 64) if device.type == "cuda" else (256, 8)
    shapes = ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width))
    weights = [(torch.randn(shape, device=device) / width**0.5).requires_grad_() for shape in shapes]
    x = torch.randn(rows, 256, width, device=device)
    amp = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)

    def layer():
        qkv, output, expand, contract = weights
        heads = F.linear(F.rms_norm(x, (width,)), qkv).view(rows, 256, 3, width // 128, 128).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).reshape(x.shape)
        y = x + F.linear(attended, output)
        return y + F.linear(F.relu(F.linear(F.rms_norm(y, (width,)), expand)).square(), contract)

    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 4:
        begin = time.perf_counter()
        with amp:
            loss = layer().float().sum()
        torch.autograd.grad(loss, weights)
        _synchronize(device)
        times.append(time.perf_counter() - begin)
    return rows * 256 * (6 * 12 * width**2 + 12 * width * 256) / statistics.median(times[1:])


def _synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def memory_bytes(device):
    """The device's whole memory in bytes; for a CPU the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory_bytes(device):
    """What a rank may count on: the whole memory of its GPU; of a CPU its share of what programs can still get."""
    if device.type == "cuda":
        return memory_bytes(device)
    free = memory_bytes(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    return free // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def device_name(device):
    """The device as its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def environment(runtime):
    """What a result depends on beside the settings: versions and hardware, as a JSON-like dict."""
    packages = {name: metadata.version(name) for name in ("pyarrow", "tokenizers", "numpy", "safetensors")}
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {"torch": str(torch.__version__), **packages},  # which names its build, as the metadata may not
        "cuda": torch.version.cuda,
        "device": runtime.device.type,
        "device_name": device_name(runtime.device),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "world_size": runtime.world_size,
        "dtype": str(runtime.dtype).removeprefix("torch."),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "commit": _commit(),
    }


def _commit():
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        folder = Path(__file__).parent
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True)
        return found.stdout.strip()
    return None


def main():
    runtime = start()
    cuda = torch.version.cuda or "not in this build"
    compiler = shutil.which("g++") or shutil.which("clang++") or "none: on the CPU torch.compile falls back to eager"
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    print(f"python     {platform.python_version()}, torch {torch.__version__}, CUDA {cuda}")
    print(f"device     {runtime.device} ({device_name(runtime.device)}), {cores}")
    print(f"GPUs       {torch.cuda.device_count()}")
    print(f"precision  {str(runtime.dtype).removeprefix('torch.')} ({runtime.dtype_reason})")
    print(f"compiler   {compiler}")
    for name in ("float32", "bfloat16"):
        print(f"matmul     {matmul_flops(runtime.device, DTYPES[name]) / 1e9:,.0f} GFLOP/s in {name}")
    print(f"memory     {memory_bytes(runtime.device) / 2**30:.1f} GiB")
    runtime.close()


if __name__ == "__main__":
    errors.run(lambda: config.override(globals()), main)
