"""Distributed runs: rank and device of this process, its process group, collectives on tensors and small objects."""

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as torch_dist

from nanotrain import config, hardware
from nanotrain.errors import MemoryLimitError, RunError, UserError, file_error, first_line

JOIN_SECONDS = 600.0  # time limit for all ranks to start
ANSWER_SECONDS = 30.0  # time limit for MASTER_ADDR to resolve and answer
SMALL_BYTES = 2**20  # tensors below this size are copied into one message


@dataclass(frozen=True)
class DistContext:
    """One process of a run: its rank, its device, and the dtype of its matrix products."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype
    dtype_reason: str

    @property
    def is_rank0(self) -> bool:
        """Whether this is rank 0, the only rank that prints, logs and writes files."""
        return self.rank == 0

    def print0(self, text: str) -> None:
        """Print on rank 0 only."""
        if self.is_rank0:
            print(text, flush=True)

    def autocast(self) -> torch.autocast:
        """Context manager that runs matrix products in `dtype`; does nothing for float32."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def all_reduce_sum(self, values: list) -> list[float]:
        """Sum a list of numbers or () tensors over all ranks in float64, with a single device-to-host copy."""
        device = self.device if self.device.type == "cuda" else "cpu"  # MPS has no float64
        numbers = [0.0 if isinstance(value, torch.Tensor) else value for value in values]
        total = torch.tensor(numbers, dtype=torch.float64).to(device, non_blocking=True)  # one copy instead of many
        for place, value in zip(total, values, strict=True):
            if isinstance(value, torch.Tensor):
                place.copy_(value)
        if self.world_size > 1:
            torch_dist.all_reduce(total)
        return total.tolist()

    def broadcast_object(self, value: Any) -> Any:
        """Return rank 0's `value` (any JSON-like object) on every rank."""
        box = [value]
        if self.world_size > 1:
            torch_dist.broadcast_object_list(box, src=0)  # over gloo: NCCL would not wait for rank 0
        return box[0]

    def all_gather_objects(self, value: Any) -> list:
        """Return the list of every rank's `value` (any JSON-like object) on every rank."""
        boxes = [value]
        if self.world_size > 1:
            boxes = [None] * self.world_size
            torch_dist.all_gather_object(boxes, value)
        return boxes

    def all_gather_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """Concatenate the tensors of all ranks, in rank order, along the first dimension, which may differ in size."""
        if self.world_size == 1:
            return tensor
        sizes = torch.empty(self.world_size, dtype=torch.int64, device=tensor.device)
        torch_dist.all_gather(list(sizes.split(1)), torch.tensor([len(tensor)], device=tensor.device))
        sizes = sizes.tolist()
        padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        joined = tensor.new_empty((self.world_size, *padded.shape))
        torch_dist.all_gather(list(joined.unbind()), padded)
        return torch.cat([part[:size] for part, size in zip(joined, sizes, strict=True)])

    def broadcast_owned(self, owned: list[list[torch.Tensor]]) -> Callable[[], None]:
        """Start broadcasting the tensors that each rank owns; return a function that waits for them.
        owned: one list per rank of 1-D contiguous tensors of one dtype, overwritten on the other ranks.
        """
        sent, joined = [], []
        for rank, tensors in enumerate(owned if self.world_size > 1 else ()):
            small = [tensor for tensor in tensors if tensor.nbytes < SMALL_BYTES]
            messages = [tensor for tensor in tensors if tensor.nbytes >= SMALL_BYTES]
            if small:
                messages.append(torch.cat(small))
                joined.append((small, messages[-1]))
            sent += [torch_dist.broadcast(message, rank, async_op=True) for message in messages]

        def wait():
            for work in sent:
                work.wait()
            for small, message in joined:
                torch._foreach_copy_(small, message.split([len(tensor) for tensor in small]))

        return wait

    def gather_to_rank0(self, part: torch.Tensor, sizes: list[int]) -> torch.Tensor | None:
        """Concatenate the 1-D tensors of all ranks, of these `sizes`, on rank 0's CPU; return None on other ranks."""
        if self.world_size == 1:
            return part
        if not self.is_rank0:
            if sizes[self.rank]:
                torch_dist.send(part.cpu(), 0)
            return None
        joined = torch.empty(sum(sizes), dtype=part.dtype)
        for rank, place in enumerate(joined.split(sizes)):
            if rank == self.rank:
                place.copy_(part)
            elif len(place):
                torch_dist.recv(place, rank)
        return joined

    def on_rank0(self, function: Callable[[], Any]) -> Any:
        """Call `function` on rank 0 only; every rank returns its result or raises its UserError or OSError."""
        result, error = self.broadcast_object(_try(function) if self.is_rank0 else None)
        if error:
            raise error
        return result

    def on_all_ranks(self, function: Callable[[], Any]) -> Any:
        """Call `function` on every rank and return the local result; a UserError or OSError on any is raised on all."""
        result, error = _try(function)
        for found in self.all_gather_objects(error):
            if found:
                raise found
        return result

    def close(self) -> None:
        """Destroy the process group."""
        if self.world_size > 1:
            torch_dist.destroy_process_group()


def init_distributed(
    device: str = "auto", dtype: str = "auto", seed: int = 1337, deterministic: bool = True
) -> DistContext:
    """Set up the device and, under torchrun, the process group. `deterministic` selects deterministic GPU kernels
    (CPU kernels always are). Raises UserError if device or dtype is unavailable, RunError if ranks cannot connect.
    """
    config.choice("DEVICE", device, ("auto", "cuda", "mps", "cpu"))
    config.choice("DTYPE", dtype, ("auto", *hardware.DTYPES))
    rank, local_rank, world_size = _rank_from_environment()
    found = hardware.find_device(device, local_rank)
    if found.type == "cuda":
        torch.cuda.set_device(found)  # before NCCL starts, which uses the current device
    if world_size > 1:
        _join(found, world_size)
    hardware.configure(found, seed, deterministic)
    return DistContext(rank, world_size, found, *hardware.find_dtype(dtype, found))


@contextlib.contextmanager
def faults_as_sentences(when_lost: str | None = "", when_full: str = "") -> Iterator[None]:
    """Convert the loss of another rank (unless when_lost is None) to RunError, and running out of memory to
    MemoryLimitError. when_lost, when_full: suffixes of the messages.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        signs = ("gloo/transport", "Connection closed by peer")
        is_lost = isinstance(error, torch_dist.DistError) or any(sign in str(error) for sign in signs)
        if is_lost and when_lost is not None:
            raise RunError(f"another rank has ended (its own message says why){when_lost}") from None
        if not hardware.is_out_of_memory(error):
            raise
        raise MemoryLimitError(f"out of memory{when_full}") from None


def _try(function):
    """(result, None), or (None, error) for a UserError or OSError, in a form that any rank can raise."""
    try:
        return function(), None
    except OSError as error:
        return None, file_error(error)
    except UserError as error:
        return None, error


def _rank_from_environment():
    """[rank, local rank, world size] from torchrun's environment variables. Raises UserError if they are invalid."""
    defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"):
        if not os.environ.get("RANK") and os.environ.get(name, "1") not in ("", "0", "1"):
            fix = "start one torchrun per machine (docs/gpus.md), or set RANK=0 for independent runs"
            raise UserError(f"{name}={os.environ[name]} without RANK: {fix}")
    given = {name: os.environ.get(name) or default for name, default in defaults.items()}
    place = [int(value) if value.isdecimal() else -1 for value in given.values()]
    if min(place) < 0 or place[0] >= place[2] or not place[3]:
        raise UserError(f"{given}: not a valid rank and world size; start the ranks with torchrun, or unset all four")
    return place[:3]


def _join(device, world_size):
    if device.type == "mps":
        raise UserError(f"--device=mps supports one process, not {world_size}: use --device=cpu or one process")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(f"WORLD_SIZE={world_size} without {' and '.join(missing)}: start the ranks with torchrun")
    rank, host, port = int(os.environ["RANK"]), os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not (port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"MASTER_PORT={port}: must be a number from 1 to 65535")
    torchrun_listens = os.environ.get("TORCHELASTIC_USE_AGENT_STORE")  # True, False, or unset without torchrun
    listens = rank == 0 and torchrun_listens != "True"

    def meet():
        own_store = torch_dist.PrefixStore(_name_of_attempt(store, rank, world_size), store)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        torch_dist.init_process_group(backend, store=own_store, rank=rank, world_size=world_size)
        torch_dist.all_reduce(torch.zeros(1, device=device))  # NCCL connects here

    try:
        limit = JOIN_SECONDS if torchrun_listens == "False" else ANSWER_SECONDS  # rank 0 may start late
        _within(limit, "no answer", partial(_wait_for_host, host, port, listens, limit))
        options = {"is_master": listens, "multi_tenant": listens, "timeout": timedelta(seconds=JOIN_SECONDS)}
        fault = "no answer from torch, perhaps another program uses the port"
        connect = partial(torch_dist.TCPStore, host, int(port), wait_for_workers=False, **options)
        store = _within(ANSWER_SECONDS, fault, connect)
        _within(JOIN_SECONDS + ANSWER_SECONDS, "not all ranks connected", meet)
    except (OSError, ValueError, RuntimeError) as error:
        places = ("MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
        given = ", ".join(f"{name}={os.environ[name]}" for name in places if os.environ.get(name))
        fix = "on one machine: torchrun --standalone --local-addr=127.0.0.1; on several: docs/gpus.md"
        raise RunError(f"the ranks cannot connect ({given}): {first_line(error)}; {fix}") from None


def _within(seconds, fault, function):
    """Run a call that may block forever in a thread, so that this one can handle signals, and return its result."""
    outcome = []

    def call():
        try:
            outcome.append((function(), None))
        except BaseException as error:
            outcome.append((None, error))

    threading.Thread(target=call, daemon=True).start()
    end = time.monotonic() + seconds
    while not outcome:  # poll, because a signal may interrupt waiting on a lock
        if time.monotonic() > end:
            raise RuntimeError(f"{fault} (waited {seconds:.0f} s)")
        time.sleep(0.01)
    ((result, error),) = outcome
    if error:
        raise error
    return result


def _wait_for_host(host, port, listens, seconds):
    """Resolve the host and, unless this rank listens there, wait for a listener, for less than `seconds`."""
    begin = time.monotonic()
    while True:
        try:
            return socket.getaddrinfo(host, port) if listens else socket.create_connection((host, port)).close()
        except OSError as error:
            limit = min(seconds, ANSWER_SECONDS) if isinstance(error, socket.gaierror) else seconds
            if time.monotonic() - begin > 0.8 * limit:  # a slow lookup must not exceed the limit
                raise
        time.sleep(0.2)


def _name_of_attempt(store, rank, world_size):
    """A random name, chosen by rank 0, for this start of the ranks: torchrun (2.13) reuses the store of an earlier
    attempt, whose addresses are stale. Every rank asks for it under a key of its own.
    """
    if rank:
        key = f"{uuid.uuid4().hex} of {world_size}"
        store.set(f"nanotrain/rank{rank}", key)
        name = store.get(key).decode()
        store.set(f"{name}/rank{rank}", "here")
        return name
    name, missing = uuid.uuid4().hex, set(range(1, world_size))
    end = time.monotonic() + JOIN_SECONDS
    while missing:
        for other in missing:
            if store.check([f"nanotrain/rank{other}"]):
                key = store.get(f"nanotrain/rank{other}").decode()
                if not key.endswith(f" of {world_size}"):
                    raise RunError(f"WORLD_SIZE differs: {key[36:]} on rank {other}, {world_size} on rank 0")
                store.set(key, name)
        missing = {other for other in missing if not store.check([f"{name}/rank{other}"])}
        if missing and time.monotonic() > end:
            raise RunError(f"rank {', '.join(map(str, sorted(missing)))} did not start within {JOIN_SECONDS:.0f} s")
        time.sleep(0.01)
    return name
