"""The place of a process among the ranks, one and several; collectives between two processes."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest
import torch
from conftest import ROOT

from nanotrain import dist as ranks
from nanotrain import errors
from nanotrain.dist import init_distributed
from nanotrain.errors import MemoryLimitError, RunError, UserError
from scripts import base_eval, base_train, generate

pytestmark = pytest.mark.usefixtures("own_process_state")


# ---- start ----


def test_one_process_needs_no_environment(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # counts as unset
    dist = init_distributed(device="cpu", dtype="float32", seed=3)
    assert (dist.rank, dist.world_size, dist.is_rank0) == (0, 1, True)
    assert (dist.device, dist.dtype, dist.dtype_reason) == (torch.device("cpu"), torch.float32, "--dtype=float32")
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "--device=gpu: must be one of"),
        ({"dtype": "bf16"}, "--dtype=bf16: must be one of"),
        ({"device": "cuda"}, "--device=cuda"),
        ({"device": "mps"}, "--device=mps"),
    ],
)
def test_a_device_or_dtype_that_cannot_be_is_refused(options, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        init_distributed(**options)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK and MASTER_ADDR and MASTER_PORT"),
        ({"WORLD_SIZE": "two"}, "'two'"),
        ({"RANK": "-1"}, "'-1'"),
        ({"LOCAL_WORLD_SIZE": "0"}, "'LOCAL_WORLD_SIZE': '0'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "'RANK': '2'"),
    ],
)
def test_a_place_that_cannot_be_is_refused_with_its_values(place, message, monkeypatch):
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{message}.* start the ranks with torchrun"):
        init_distributed(device="cpu")
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_tasks_that_a_launcher_starts_without_ranks_are_refused_and_one_task_is_not(name, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "2")  # as a batch script sees it
    for number, rank in (("1", ""), ("2", "0")):
        monkeypatch.setenv(name, number)
        monkeypatch.setenv("RANK", rank)
        assert init_distributed(device="cpu").world_size == 1
    monkeypatch.delenv("RANK")
    with pytest.raises(UserError, match=f"{name}=2 without RANK.*torchrun"):
        init_distributed(device="cpu")


def test_a_local_rank_beyond_the_devices_is_refused_with_the_number_that_works(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch, "manual_seed", lambda seed: None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert init_distributed(device="cuda").device == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    for device in ("auto", "cuda"):
        with pytest.raises(UserError, match=r"local rank 2.*--nproc_per_node=2"):
            init_distributed(device=device)


def test_metal_runs_one_process_and_torchrun_on_a_mac_means_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert init_distributed().device == torch.device("mps")
    assert init_distributed().dtype == torch.float32
    monkeypatch.setenv("RANK", "0")
    assert init_distributed().device == torch.device("cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--device=cpu"):
        init_distributed(device="mps")


# ---- joining ----


@pytest.fixture
def join(monkeypatch):
    """join(rank, faulty) joins as that rank of two at a port where we listen, say nothing, and call `faulty` at the
    second caller, who is past finding the address; without it nobody listens.
    """
    monkeypatch.setattr(ranks, "ANSWER_SECONDS", 2.5)
    monkeypatch.setattr(ranks, "JOIN_SECONDS", 2.0)
    threads = set(threading.enumerate())
    server, callers = socket.create_server(("127.0.0.1", 0)), []
    server.settimeout(5)
    port = server.getsockname()[1]

    def listen(at_second):
        with contextlib.suppress(OSError):  # from `hang_up`, or nobody has called for long
            while True:
                callers.append(server.accept()[0])
                if len(callers) == 2:
                    at_second()
        for caller in callers:
            caller.close()

    def hang_up():
        with contextlib.suppress(OSError):  # for the second time
            server.shutdown(socket.SHUT_RDWR)  # `close` would wait for the thread that listens
        server.close()

    def start(function, rank, at_second=None):
        given = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in given.items():
            monkeypatch.setenv(name, str(value))
        if at_second:
            threading.Thread(target=listen, args=[at_second], daemon=True).start()
        else:
            hang_up()
        return function()

    yield start
    hang_up()
    for thread in set(threading.enumerate()) - threads:  # that still try, and must not when Python ends
        thread.join(30)


def test_ranks_that_cannot_join_say_so_in_time_with_the_place_and_the_reason(join, monkeypatch):
    def join_as(rank, at_second=None):
        with pytest.raises(RunError, match=r"MASTER_ADDR=127\.0\.0\.1, MASTER_PORT=") as caught:
            join(lambda: init_distributed(device="cpu"), rank, at_second)
        return str(caught.value)

    assert "another program" in join_as(1, list)
    assert "address already in use" in join_as(0, list)
    assert "Connection refused" in join_as(1)
    with pytest.raises(RunError, match="rank 1 did not start within 2 s"):
        join(lambda: init_distributed(device="cpu"), 0)
    monkeypatch.setattr(ranks, "JOIN_SECONDS", 10.0)
    store = torch.distributed.HashStore()
    store.set("nanotrain/rank1", f"{'0' * 32} of 3")
    with pytest.raises(RunError, match=r"WORLD_SIZE differs: 3 on rank 1, 2 on rank 0"):
        ranks._name_of_attempt(store, 0, 2)
    monkeypatch.setenv("MASTER_PORT", "99999")
    with pytest.raises(UserError, match="MASTER_PORT=99999"):
        init_distributed(device="cpu")
    monkeypatch.setattr(ranks, "_name_of_attempt", lambda *arguments: "attempt")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    assert "GLOO_SOCKET_IFNAME=nosuch0): " in (found := join_as(0))
    assert "Unable to find address for: nosuch0" in found

    def unknown(*arguments):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert "Name or service not known" in join_as(0)
    assert "Name or service not known" in join_as(1)


def test_a_signal_ends_a_rank_that_waits_for_the_others(join, monkeypatch):
    monkeypatch.setattr(ranks, "ANSWER_SECONDS", 20.0)
    monkeypatch.setattr(base_train, "DEVICE", "cpu")
    before = [signal.signal(number, errors._interrupt) for number in (signal.SIGTERM, signal.SIGHUP)]
    try:
        with pytest.raises(errors.Terminated):
            join(base_train.main, 1, lambda: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(3)])
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGHUP), before, strict=True):
            signal.signal(number, handler)


@pytest.mark.parametrize("script", [base_train, base_eval, generate])
def test_in_every_script_a_lost_rank_and_too_little_memory_are_sentences(script, monkeypatch):
    faults = [
        (torch.distributed.DistNetworkError("reset"), RunError, "another rank has ended"),
        (RuntimeError("[/gloo/transport/tcp/pair.cc:534] closed"), RunError, "another rank has ended"),
        (torch.OutOfMemoryError("no memory"), MemoryLimitError, "out of memory.*: try a smaller --"),
        (ZeroDivisionError("a bug"), ZeroDivisionError, "a bug"),
    ]
    for error, kind, message in faults:
        monkeypatch.setattr(script, "init_distributed", lambda *_, error=error, **__: fail(error))
        with pytest.raises(kind, match=message):
            script.main()


# ---- collectives ----


def fail(error):
    raise error


def test_one_rank_is_a_world_of_its_own():
    dist = init_distributed(device="cpu", dtype="float32")
    values = [1, 2.5, True, 2**32 - 1, torch.tensor(3.0), torch.tensor(7)]
    assert dist.all_reduce_sum(values) == [1.0, 2.5, 1.0, 2.0**32 - 1, 3.0, 7.0]
    value = {"a": [1, None, "x"]}
    assert (dist.broadcast_object(value), dist.all_gather_objects(value)) == (value, [value])
    for shared in (dist.on_rank0, dist.on_all_ranks):
        assert shared(lambda: 5) == 5
        with pytest.raises(RunError, match="No space left: /x"):
            shared(lambda: fail(OSError(28, "No space left", "/x")))
        with pytest.raises(ZeroDivisionError):  # what only a programmer can break is not hidden
            shared(lambda: 1 / 0)


RANK_PROGRAM = """
import json, os, sys
from types import SimpleNamespace
import torch
import nanotrain.dist
from nanotrain import warmup
from nanotrain.dist import init_distributed
from nanotrain.errors import DataError, CheckpointError, UserError

dist = init_distributed(device="cpu", dtype="float32", seed=3)
found = {"place": [dist.rank, dist.world_size, dist.is_rank0]}

def told(shared, function):
    try:
        return ["result", shared(function)]
    except UserError as error:
        return [type(error).__name__, str(error)]

def fail(error):
    raise error

ran = []
found["sum"] = dist.all_reduce_sum([dist.rank + 1, 0.25, dist.rank == 1, torch.tensor(2.0 * dist.rank), 2**32 - 1])
found["broadcast"] = dist.broadcast_object({"from": dist.rank})
found["gather"] = dist.all_gather_objects({"rank": dist.rank})
found["main"] = told(dist.on_rank0, lambda: ran.append("main") or dist.rank)
found["ran"] = ran
found["all"] = told(dist.on_all_ranks, lambda: dist.rank)
found["errors"] = [
    told(dist.on_rank0, lambda: fail(CheckpointError("none here"))),
    told(dist.on_all_ranks, lambda: dist.rank or fail(DataError("rank 0 fails"))),
    told(dist.on_all_ranks, lambda: fail(DataError("rank 1 fails")) if dist.rank else 0),
    told(dist.on_all_ranks, lambda: fail(DataError(f"rank {dist.rank}"))),
]

nanotrain.dist.SMALL_BYTES = 20
owned = [[torch.full((size,), 1.0 + owner if owner == dist.rank else -1.0) for size in (3, 25, 2)] for owner in (0, 1)]
dist.broadcast_owned(owned)()
found["owned"] = [[[len(tensor), *set(tensor.tolist())] for tensor in tensors] for tensors in owned]

def one_pass(dist, model, batch_size):
    tried.append(batch_size)
    if batch_size > (12, 3)[dist.rank]:  # the ranks have unequal memory
        raise torch.OutOfMemoryError("no memory")

tried, warmup.one_pass = [], one_pass
found["fits"] = [warmup.largest_batch_that_fits(dist, SimpleNamespace(zero_grad=list), 40), sorted(set(tried))]
dist.close()
with open(f"{sys.argv[1]}/{dist.rank}.json", "w") as file:
    json.dump(found, file)
os._exit(0)  # as `errors.run` does
"""


@pytest.mark.slow
def test_two_ranks_agree_also_on_errors_and_on_what_fits_all(tmp_path):
    (tmp_path / "program.py").write_text(RANK_PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command += ["--nproc_per_node=2", tmp_path / "program.py", tmp_path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == {
            "place": [rank, 2, rank == 0],
            "sum": [3.0, 0.5, 1.0, 2.0, 2.0**33 - 2],
            "broadcast": {"from": 0},
            "gather": [{"rank": 0}, {"rank": 1}],
            "main": ["result", 0],
            "ran": [] if rank else ["main"],
            "all": ["result", rank],
            "errors": [
                ["CheckpointError", "none here"],
                ["DataError", "rank 0 fails"],
                ["DataError", "rank 1 fails"],
                ["DataError", "rank 0"],
            ],
            "owned": [[[3, owner], [25, owner], [2, owner]] for owner in (1.0, 2.0)],
            "fits": [2, [2, 5, 10, 20, 40]],
        }
