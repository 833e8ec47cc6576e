"""The place of a process among the ranks, one and several; collectives between two processes."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from nanotrain.dist import init_distributed
from nanotrain.errors import RunError, UserError

pytestmark = pytest.mark.usefixtures("own_process_state")


# ---- start ----


def test_one_process_needs_no_environment(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # counts as unset
    dist = init_distributed(device="cpu", dtype="float32", seed=3)
    assert (dist.rank, dist.world_size, dist.is_rank0) == (0, 1, True)
    assert (dist.device, dist.dtype, dist.dtype_reason) == (torch.device("cpu"), torch.float32, "as asked")
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
        ({"RANK": "2", "WORLD_SIZE": "2"}, "'RANK': '2'"),
    ],
)
def test_a_place_that_cannot_be_is_refused_with_its_values(place, message, monkeypatch):
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{message}.* start the ranks with torchrun"):
        init_distributed(device="cpu")
    assert not torch.distributed.is_initialized()


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
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [tmp_path / "program.py", tmp_path]
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
