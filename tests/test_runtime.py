"""One process, two processes, devices and precisions."""

import gc
import json
import os
import platform
import re
import socket
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch

from nanotrain import runtime
from nanotrain.errors import CheckpointError, DataError, UserError

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _own_process_state(monkeypatch):
    """No rank from outside, and torch's settings back as they were."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    deterministic, random_state = torch.are_deterministic_algorithms_enabled(), torch.get_rng_state()
    filling = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = filling
    torch.set_rng_state(random_state)


@pytest.fixture
def _cuda(monkeypatch):
    """Two CUDA devices, as far as choosing one goes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch, "manual_seed", lambda seed: None)


# ---- start ----


def test_one_process_needs_no_environment():
    rt = runtime.start(device="cpu", dtype="float32", seed=3)
    assert (rt.rank, rt.local_rank, rt.world_size, rt.is_main) == (0, 0, 1, True)
    assert (rt.device, rt.dtype, rt.dtype_reason) == (torch.device("cpu"), torch.float32, "as asked")
    assert not torch.distributed.is_initialized()
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(3)))
    rt.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "--device=gpu: must be one of auto, cuda, mps, cpu"),
        ({"dtype": "bf16"}, "--dtype=bf16: must be one of auto, bfloat16, float16, float32"),
        ({"device": "cuda"}, "--device=cuda: torch finds no CUDA device"),
        ({"device": "mps"}, "--device=mps: torch finds no Metal device"),
    ],
)
def test_a_device_or_dtype_that_cannot_be_is_refused(options, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        runtime.start(**options)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (
            {"WORLD_SIZE": "2"},
            "WORLD_SIZE=2 without RANK and MASTER_ADDR and MASTER_PORT:",
        ),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost"}, "WORLD_SIZE=2 without MASTER_PORT"),
        ({"WORLD_SIZE": "two"}, "RANK=0 LOCAL_RANK=0 WORLD_SIZE=two: no place"),
        ({"WORLD_SIZE": "0"}, "RANK=0 LOCAL_RANK=0 WORLD_SIZE=0: no place"),
        ({"RANK": "1"}, "RANK=1 LOCAL_RANK=0 WORLD_SIZE=1: no place"),
        ({"RANK": "-1"}, "RANK=-1 LOCAL_RANK=0 WORLD_SIZE=1: no place"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 LOCAL_RANK=0 WORLD_SIZE=2: no place"),
    ],
)
def test_a_place_that_cannot_be_is_refused_with_its_values(place, message, monkeypatch):
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"^{re.escape(message)}.* start the ranks with torchrun"):
        runtime.start(device="cpu")
    assert not torch.distributed.is_initialized()


def test_empty_variables_count_as_unset(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")
    assert runtime.start(device="cpu").world_size == 1


@pytest.mark.usefixtures("_cuda")
def test_a_local_rank_beyond_the_devices_is_refused_with_the_number_that_works(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert runtime.start(device="cuda").device == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    for device in ("auto", "cuda"):
        with pytest.raises(UserError, match=r"local rank 2, but there are 2 CUDA devices.*--nproc_per_node=2"):
            runtime.start(device=device)


def test_metal_runs_one_process_and_torchrun_on_a_mac_means_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert runtime.start().device == torch.device("mps")
    assert runtime.start().dtype == torch.float32
    monkeypatch.setenv("RANK", "0")
    assert runtime.start().device == torch.device("cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"--device=mps runs one process, not 2: use --device=cpu"):
        runtime.start(device="mps")


# ---- precision ----


@pytest.mark.parametrize(
    ("capabilities", "dtype", "reason"),
    [
        ({}, torch.float32, "this CPU has neither AVX512_BF16 nor AMX"),
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32, "neither"),
        ({"avx512_bf16": True}, torch.bfloat16, "this CPU has AVX512_BF16"),
        ({"avx512_bf16": True, "amx_bf16": True}, torch.bfloat16, "this CPU has AMX_BF16"),
        ({"amx_tile": True, "amx_bf16": False}, torch.float32, "neither"),
    ],
)
def test_precision_of_a_cpu(capabilities, dtype, reason, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    rt = runtime.start(device="cpu")
    assert rt.dtype == dtype
    assert reason in rt.dtype_reason
    assert runtime.start(device="cpu", dtype="float16").dtype == torch.float16  # what is asked for counts


@pytest.mark.usefixtures("_cuda")
@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ((9, 0), torch.bfloat16),
        ((8, 0), torch.bfloat16),
        ((12, 0), torch.bfloat16),
        ((7, 5), torch.float16),
        ((7, 0), torch.float16),
        ((6, 1), torch.float32),
    ],
)
def test_precision_of_a_gpu(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    rt = runtime.start(device="auto")
    assert (rt.device, rt.dtype) == (torch.device("cuda", 0), dtype)
    assert "CUDA capability {}.{}".format(*capability) in rt.dtype_reason
    assert runtime.start(device="cuda", dtype="float32").dtype == torch.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_autocast_makes_products_of_the_chosen_dtype(dtype):
    rt = runtime.start(device="cpu", dtype=dtype)
    x = torch.ones(2, 2)
    with rt.autocast():
        assert (x @ x).dtype == rt.dtype == runtime.DTYPES[dtype]
    assert (x @ x).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA GB200", 2.5e15),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
        ("Tesla T4", None),
        ("NVIDIA A10", None),
    ],
)
def test_published_peaks_by_device_name(name, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert runtime.peak_flops(torch.device("cuda", 0)) == expected
    assert runtime.peak_flops(torch.device("cpu")) is None


# ---- collectives ----


def fail(error):
    raise error


def test_one_rank_is_a_world_of_its_own():
    rt = runtime.start(device="cpu", dtype="float32")
    big = 2**32 - 1
    assert rt.sum([1, 2.5, True, big, torch.tensor(3.0), torch.tensor(7)]) == [1.0, 2.5, 1.0, float(big), 3.0, 7.0]
    value = {"a": [1, None, "x"]}
    assert rt.broadcast(value) == value
    assert rt.gather(value) == [value]
    assert rt.on_main(lambda: 5) == rt.together(lambda: 5) == 5
    rt.synchronize()


@pytest.mark.parametrize("error", [UserError("a"), DataError("b"), CheckpointError("c")])
def test_an_error_keeps_its_kind_and_message(error):
    rt = runtime.start(device="cpu", dtype="float32")
    for shared in (rt.on_main, rt.together):
        with pytest.raises(UserError, match=f"^{error}$") as raised:
            shared(lambda: fail(error))
        assert type(raised.value) is type(error)


def test_what_only_a_programmer_can_break_is_not_hidden():
    rt = runtime.start(device="cpu", dtype="float32")
    for shared in (rt.on_main, rt.together):
        with pytest.raises(ZeroDivisionError):
            shared(lambda: 1 / 0)


def test_every_kind_of_error_can_be_shared():
    """A kind that only one module knows is told to the other ranks as the one of `errors` that it is a case of."""
    rt = runtime.start(device="cpu", dtype="float32")

    def kinds(kind):
        return [kind, *(deeper for below in kind.__subclasses__() for deeper in kinds(below))]

    assert DataError in kinds(UserError)
    for kind in (kind for kind in kinds(UserError) if kind.__module__.startswith("nanotrain.")):  # not those of tests
        with pytest.raises(UserError, match=r"^message$") as raised:
            rt.together(lambda kind=kind: fail(kind("message")))
        assert raised.value.exit_code == kind.exit_code
        assert issubclass(kind, type(raised.value))


RANK_PROGRAM = """
import time
begin = time.monotonic()
import json, sys
import torch
from nanotrain import runtime
from nanotrain.errors import DataError, CheckpointError, UserError

rt = runtime.start(device="cpu", dtype="float32", seed=3)
found = {"place": [rt.rank, rt.world_size, rt.is_main]}

def told(shared, function):
    try:
        return ["result", shared(function)]
    except UserError as error:
        return [type(error).__name__, str(error)]

def fail(error):
    raise error

ran = []
found["sum"] = rt.sum([rt.rank + 1, 0.25, rt.rank == 1, torch.tensor(2.0 * rt.rank), 2**32 - 1])
found["broadcast"] = rt.broadcast({"from": rt.rank})
found["gather"] = rt.gather({"rank": rt.rank})
found["on main"] = told(rt.on_main, lambda: ran.append("main") or rt.rank)
found["on main, failing"] = told(rt.on_main, lambda: fail(CheckpointError("none here")))
found["ran"] = ran
found["together"] = told(rt.together, lambda: rt.rank)
found["together, one failing"] = told(rt.together, lambda: rt.rank or fail(DataError("rank 0 fails")))
found["together, other failing"] = told(rt.together, lambda: fail(DataError("rank 1 fails")) if rt.rank else 0)
found["together, both failing"] = told(rt.together, lambda: fail(DataError(f"rank {rt.rank}")))

def trial(number):
    tried.append(number)
    if number > (12, 3)[rt.rank]:  # the ranks have unequal memory
        raise torch.OutOfMemoryError("no memory")

for name, runtime_of_trial in (("fits", rt), ("fits alone", runtime.Runtime(0, 0, 1, rt.device, rt.dtype, ""))):
    tried = []
    found[name] = [runtime_of_trial.largest_that_fits(40, trial), tried]
found["afterwards"] = rt.gather(rt.rank)
rt.close()
found["seconds"] = [time.monotonic() - begin, runtime.seconds_since_start()]
with open(sys.argv[1], "w") as file:
    json.dump(found, file)
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What each of two ranks found, and the seconds between its start and its end as seen from here."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begin, processes = time.monotonic(), []
    for rank in (0, 1):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **{name: str(value) for name, value in place.items()}, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", RANK_PROGRAM, str(folder / f"{rank}.json")]
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        for process in processes:
            _, complaints = process.communicate(timeout=60)
            assert process.returncode == 0, complaints
    finally:
        for process in processes:
            process.kill()
    seconds = time.monotonic() - begin
    return [json.loads((folder / f"{rank}.json").read_text()) | {"lifetime": seconds} for rank in (0, 1)]


def test_two_ranks_agree(two_ranks):
    assert [found["place"] for found in two_ranks] == [[0, 2, True], [1, 2, False]]
    for found in two_ranks:
        assert found["sum"] == [3.0, 0.5, 1.0, 2.0, 2.0**33 - 2]
        assert found["broadcast"] == {"from": 0}
        assert found["gather"] == [{"rank": 0}, {"rank": 1}]
        assert found["on main"] == ["result", 0]
        assert found["afterwards"] == [0, 1]
    assert [found["ran"] for found in two_ranks] == [["main"], []]
    assert [found["together"] for found in two_ranks] == [["result", 0], ["result", 1]]


def test_an_error_on_one_rank_is_raised_on_both(two_ranks):
    for found in two_ranks:
        assert found["on main, failing"] == ["CheckpointError", "none here"]
        assert found["together, one failing"] == ["DataError", "rank 0 fails"]
        assert found["together, other failing"] == ["DataError", "rank 1 fails"]
        assert found["together, both failing"] == ["DataError", "rank 0"]


def test_ranks_of_unequal_memory_find_one_number_that_fits_all(two_ranks):
    assert [found["fits"] for found in two_ranks] == [[2, [40, 20, 10, 5, 2]]] * 2
    alone = [found["fits alone"] for found in two_ranks]  # the twin: without asking the others they differ
    assert alone == [[10, [40, 20, 10]], [2, [40, 20, 10, 5, 2]]]


class Held:
    """Something large, in a frame of its own that refers to itself, as those of torch may."""

    def __init__(self):
        self.itself = self


@pytest.mark.parametrize("collected", [True, False], ids=["as it is", "twin"])
def test_what_did_not_fit_is_freed_before_the_next_trial(monkeypatch, collected):
    rt, seen = runtime.start(device="cpu"), []
    if not collected:
        monkeypatch.setattr(runtime.gc, "collect", lambda: 0)

    def trial(number):
        still_there = [reference() for reference in seen if reference() is not None]
        if still_there:
            raise AssertionError(still_there)
        held = Held()
        seen.append(weakref.ref(held))
        if number > 6:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    gc.disable()  # it would otherwise come when it likes
    try:
        if collected:
            assert rt.largest_that_fits(24, trial) == 6
            assert len(seen) == 3
        else:
            with pytest.raises(AssertionError):
                rt.largest_that_fits(24, trial)
    finally:
        gc.enable()


def test_where_nothing_fits_the_number_is_0_and_other_errors_are_not_taken_for_memory():
    def fail(error):
        raise error

    rt = runtime.start(device="cpu")
    assert rt.largest_that_fits(5, lambda number: fail(MemoryError())) == 0
    assert rt.largest_that_fits(5, lambda number: None) == 5
    with pytest.raises(RuntimeError, match="shapes"):
        rt.largest_that_fits(5, lambda number: fail(RuntimeError("shapes differ")))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("x"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_what_counts_as_memory_that_has_run_out(error, expected):
    assert runtime.is_out_of_memory(error) is expected


def test_ranks_of_one_machine_share_its_free_memory(monkeypatch):
    alone = runtime.free_memory_bytes(torch.device("cpu"))
    assert 2**26 < alone < runtime.memory_bytes(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert runtime.free_memory_bytes(torch.device("cpu")) == pytest.approx(alone / 4, rel=0.2)


HEAP = """
import torch
from pathlib import Path
from nanotrain import runtime

def resident_mib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) // 1024

runtime.start("cpu")
before = resident_mib()
blocks = [torch.ones(2**18) for _ in range(200)]  # of 1 MiB
last = blocks.pop()
del blocks
kept = resident_mib() - before
{call}
print(kept, resident_mib() - before)
"""


@pytest.mark.skipif("glibc" not in platform.libc_ver()[0], reason="only glibc can be told to keep freed memory")
@pytest.mark.parametrize("call", ["runtime.give_back_freed_memory()", ""])
def test_freed_memory_is_kept_until_it_is_given_back(call):
    command = [sys.executable, "-c", HEAP.format(call=call)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    kept, left = map(int, result.stdout.split())
    assert 190 < kept < 220
    assert left < 20 if call else left == kept


def test_where_there_is_no_glibc_nothing_happens(monkeypatch):
    monkeypatch.setattr(runtime.ctypes, "CDLL", lambda name: fail(TypeError("argument 1 must be str, not None")))
    assert runtime.start("cpu").device.type == "cpu"
    runtime.give_back_freed_memory()


# ---- clock, hardware, command ----


def test_seconds_since_start_count_imports_and_nothing_before_the_process(two_ranks):
    for found in two_ranks:
        inside, measured = found["seconds"]
        assert inside - 0.02 <= measured <= found["lifetime"] + 0.02


def test_seconds_since_start_run_as_a_clock_does():
    readings = []
    for _ in range(2):
        readings.append((time.monotonic(), runtime.seconds_since_start(), time.monotonic()))
        while time.monotonic() < readings[-1][2] + 0.03:
            pass
    (before, first, after), (later, second, last) = readings
    assert later - after - 1e-4 <= second - first <= last - before + 1e-4


def test_seconds_since_start_are_right_where_proc_uptime_is_the_containers(monkeypatch):
    before, read_text = runtime.seconds_since_start(), Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda path, **options: "5.0 1.0" if path.name == "uptime" else read_text(path, **options)
    )
    assert runtime.seconds_since_start() == pytest.approx(before, abs=1)


@pytest.mark.parametrize(
    ("elapsed", "seconds"), [("00:07", 7), ("   02:03", 123), ("01:02:03", 3723), ("2-01:00:05", 176_405)]
)
def test_seconds_since_start_without_proc_are_those_of_ps(elapsed, seconds, monkeypatch, tmp_path):
    answer = subprocess.CompletedProcess([], 0, stdout=elapsed + "\n")
    monkeypatch.setattr(runtime, "Path", lambda path: tmp_path / "no such file")
    monkeypatch.setattr(subprocess, "run", lambda command, **options: answer if command[0] == "ps" else None)
    assert runtime.seconds_since_start() == seconds


def test_seconds_since_start_without_proc_and_ps_are_those_of_work(monkeypatch, tmp_path):
    monkeypatch.setattr(runtime, "Path", lambda path: tmp_path / "no such file")
    monkeypatch.setattr(subprocess, "run", lambda command, **options: fail(FileNotFoundError(2, "no ps")))
    assert runtime.seconds_since_start() == pytest.approx(time.process_time(), abs=0.1)


def test_the_machine_describes_itself():
    rt = runtime.start(device="cpu")
    found = json.loads(json.dumps(runtime.environment(rt)))
    assert found["packages"]["torch"] == torch.__version__
    assert found["device"] == "cpu"
    assert found["dtype"] == str(rt.dtype).removeprefix("torch.")
    assert found["deterministic"] is True
    assert 2**20 < rt.peak_memory_bytes() < runtime.memory_bytes(rt.device)
    block = torch.ones(2**26)  # 256 MiB
    assert rt.peak_memory_bytes() >= block.nbytes
    assert runtime.device_name(rt.device)


def test_the_command_says_what_this_machine_is(run_script):
    done = run_script("nanotrain.runtime")
    assert (done.returncode, done.stderr) == (0, "")
    lines = dict(line.split(None, 1) for line in done.stdout.splitlines())
    assert set(lines) == {"python", "device", "GPUs", "precision", "compiler", "matmul", "memory"}
    assert torch.__version__ in lines["python"]
    assert int(lines["GPUs"]) == torch.cuda.device_count()
    assert re.fullmatch(r"(bfloat16|float16|float32) \(.+\)", lines["precision"])
    assert float(lines["memory"].split()[0]) > 0.1
    rates = re.findall(r"matmul +([\d,]+) GFLOP/s in (\w+)", done.stdout)
    assert [dtype for _, dtype in rates] == ["float32", "bfloat16"]
    assert all(int(rate.replace(",", "")) > 0 for rate, _ in rates)


def test_small_tensors_travel_together_in_order_and_large_ones_alone(monkeypatch):
    monkeypatch.setattr(runtime, "MESSAGE_BYTES", 40)
    sizes = [3, 4, 3, 1, 25, 2, 10, 1]  # of four bytes each
    messages = runtime._messages([torch.zeros(size) for size in sizes])
    assert [[len(tensor) for tensor in message] for message in messages] == [[3, 4, 3], [1], [25], [2], [10], [1]]
    assert runtime._messages([]) == []
