"""Devices, precisions, memory, and the command that prints what there is."""

import json
import re
import subprocess

import pytest
import torch

from nanotrain import hardware, warmup
from nanotrain.dist import DistContext

pytestmark = pytest.mark.usefixtures("own_process_state")


# ---- precision ----


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({}, torch.float32),
        ({"avx512_f": True, "amx_tile": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": True, "avx512_fp16": True}, torch.float32),
        ({"avx512_bf16": True, "avx512_fp16": True, "amx_bf16": True}, torch.bfloat16),
    ],
)
def test_precision_of_a_cpu(capabilities, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert hardware.find_dtype("auto", torch.device("cpu"))[0] == dtype
    assert hardware.find_dtype("float16", torch.device("cpu"))[0] == torch.float16  # what is asked for counts


@pytest.mark.parametrize("amx", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_short_runs_compile_only_where_products_are_fast(amx, device, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx, "avx512_bf16": True})
    dist = DistContext(0, 1, torch.device(device), dtype, "test")
    fast = (amx or device == "cuda") and dtype != torch.float32
    found = [warmup.compile_pays("auto", dist, minutes) for minutes in (0.5, 1.0, 2.4, 2.5, 0.0)]
    assert found == [False, fast, fast, True, True]
    assert warmup.compile_pays("on", dist, 0.1)
    assert not warmup.compile_pays("off", dist, 60.0)


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((8, 0), torch.bfloat16), ((12, 0), torch.bfloat16), ((7, 5), torch.float16), ((6, 1), torch.float32)],
)
def test_precision_of_a_gpu(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    device = hardware.find_device()
    assert device == torch.device("cuda", 0)
    assert hardware.find_dtype("auto", device)[0] == dtype
    assert hardware.find_dtype("float32", device)[0] == torch.float32


def test_published_peaks_by_device_name(monkeypatch):
    peaks = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA GB200": 2.5e15, "NVIDIA A10": None}
    for name, expected in peaks.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert hardware.peak_flops(torch.device("cuda", 0)) == expected
    assert hardware.peak_flops(torch.device("cpu")) is None


def test_what_counts_as_memory_that_has_run_out():
    texts = ("can't allocate memory: you tried", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when")
    assert all(map(hardware.is_out_of_memory, [torch.OutOfMemoryError("x"), MemoryError(), *map(RuntimeError, texts)]))
    assert not hardware.is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


GROUPS = {  # {/proc/self/cgroup: {file: what it says}}, each of which limits to 2 GiB and to 1.5 CPUs
    "0::/user/job": {  # the limits are those of a parent
        "user/memory.max": 2**31, "user/job/memory.max": "max", "user/cpu.max": "150000 100000",
        "user/job/cpu.max": "max 100000", "user/memory.current": 2**30, "user/job/memory.current": 2**20,
        "user/memory.stat": f"anon 5\nactive_file {2**28}\ninactive_file {2**27}", "user/job/memory.stat":
        "active_file 0\ninactive_file 0",
    },
    "0::/": {  # as a container sees it
        "memory.max": 2**31, "memory.current": 2**30, "memory.stat": f"active_file {2**28}\ninactive_file {2**27}",
        "cpu.max": "150000 100000",
    },
    "9:name=systemd:/a\n4:memory:/docker/1\n2:cpu,cpuacct:/docker/1\n0::/": {  # the container sees no /docker/1
        "memory/memory.limit_in_bytes": 2**31, "memory/memory.usage_in_bytes": 2**30, "memory/memory.stat":
        f"active_file 0\ninactive_file 0\ntotal_active_file {2**28}\ntotal_inactive_file {2**27}",
        "cpu/cpu.cfs_quota_us": 150000, "cpu/cpu.cfs_period_us": 100000,
    },
}  # fmt: skip


def fake_root(folder, membership, files):
    for name, text in {
        "proc/self/cgroup": membership,
        **{f"sys/fs/cgroup/{name}": files[name] for name in files},
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{text}\n")
    return folder


@pytest.mark.parametrize(("membership", "files"), GROUPS.items(), ids=["version 2", "container", "version 1"])
def test_the_limits_of_control_groups_are_those_of_the_machine(tmp_path, monkeypatch, membership, files):
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda process: range(64), raising=False)
    monkeypatch.setattr(hardware.os, "sysconf", lambda name: 2**20)
    monkeypatch.setattr(hardware, "_proc_value", lambda path, field: "8388608 kB")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    root, device = fake_root(tmp_path, membership, files), torch.device("cpu")
    assert (hardware.cpu_cores(root), hardware.memory_bytes(device, root)) == (2, 2**31)
    assert hardware.free_memory_bytes(device, root) == (2**30 + 2**28 + 2**27) // 2  # cached files count as free
    for path in root.glob("sys/**/*.stat"):
        path.write_text("odd\nactive_file")
    assert hardware.free_memory_bytes(device, root) == 2**30 // 2
    (root / "proc/self/cgroup").write_bytes(membership.encode() + b"\n\n0::/\xff\n")
    for path in root.glob("sys/**/*.*[xs]"):
        limit = {"memory.max": "max", "cpu.max": "max 100000", "memory.limit_in_bytes": 2**63 - 4096}
        limit["cpu.cfs_quota_us"] = -1
        path.write_text(str(limit.get(path.name, path.read_text())))
    assert (hardware.cpu_cores(root), hardware.memory_bytes(device, root)) == (64, 2**40)
    for path in root.glob("sys/**/c*.*"):
        path.write_text("odd")
    assert hardware.cpu_cores(root) == 64
    assert hardware.free_memory_bytes(device, root) == 2**32


def test_torch_has_no_more_threads_than_the_cores_that_it_may_use(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(hardware, "cpu_cores", lambda: 1)
    for number, chosen in ((3, "3"), (1, "")):  # what OMP_NUM_THREADS says counts
        torch.set_num_threads(3)
        monkeypatch.setenv("OMP_NUM_THREADS", chosen) if chosen else monkeypatch.delenv("OMP_NUM_THREADS")
        hardware.configure(torch.device("cpu"))
        assert torch.get_num_threads() == number
    torch.set_num_threads(threads)


# ---- this machine ----


def test_the_code_is_known_by_its_files_and_by_a_commit_only_in_its_own_clone(tmp_path, monkeypatch):
    def git(*arguments):
        command = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    package = tmp_path / "nanotrain"
    package.mkdir()
    (package / "gpt.py").write_text("A = 1")
    without = hardware.code(package)
    assert (without["commit"], without["changed"]) == (None, None)
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "first")
    clean = hardware.code(package)
    assert clean == {**without, "commit": git("rev-parse", "HEAD"), "changed": False}
    (package / "gpt.py").write_text("A = 2")
    (package / ".#gpt.py").symlink_to("the lock of an editor")
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    edited = hardware.code(package)
    assert edited["changed"]
    assert edited["code_sha256"] != clean["code_sha256"]
    inner = package / "nanotrain"  # a copy within another repository
    inner.mkdir()
    (inner / "gpt.py").write_text("A = 1")
    assert hardware.code(inner) == without


def test_the_machine_describes_itself():
    device = torch.device("cpu")
    hardware.configure(device)
    found = json.loads(json.dumps(hardware.environment(device, torch.bfloat16, 3)))
    assert found["packages"]["torch"] == torch.__version__
    expected = {"device": "cpu", "dtype": "bfloat16", "world_size": 3, "deterministic": True}
    assert expected.items() <= found.items()
    assert 2**20 < hardware.peak_memory_bytes(device) < hardware.memory_bytes(device)
    block = torch.ones(2**26)  # 256 MiB
    assert hardware.peak_memory_bytes(device) >= block.nbytes
    assert hardware.device_name(device)


@pytest.mark.slow
def test_the_command_describes_this_machine(run_script):
    done = run_script("nanotrain.hardware")
    assert (done.returncode, done.stderr) == (0, "")
    lines = dict(line.split(None, 1) for line in done.stdout.splitlines())
    assert set(lines) == {"python", "device", "GPUs", "precision", "compiler", "matmul", "training", "memory"}
    assert torch.__version__ in lines["python"]
    assert int(lines["GPUs"]) == torch.cuda.device_count()
    assert re.fullmatch(r"(bfloat16|float16|float32) \(.+\)", lines["precision"])
    rates = re.findall(r"matmul +([\d,]+) GFLOP/s in (\w+)", done.stdout)
    assert [dtype for _, dtype in rates] == ["float32", "bfloat16"]
    assert all(int(rate.replace(",", "")) > 0 for rate, _ in rates)
