"""Run safety: stop requests, hangs, non-finite updates, loss spikes, diverging replicas."""

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from traceback import walk_stack

import torch

from nanotrain.dist import DistContext
from nanotrain.errors import HANG_EXIT_CODE, Output, RunError, stop_signals

NON_FINITE_IN_A_ROW = 3  # consecutive skipped steps that end a run
NON_FINITE_NEARBY, NEARBY_STEPS = 10, 1000  # or this many skipped steps among this many
LOSS_WINDOW = 128  # accepted losses to compare a new one with
SPIKE_DEVIATIONS = 6.0  # standard deviations above their mean that make a spike
SLOW_SECONDS = 1800.0  # watchdog limit outside of training steps
CHECK_REPLICAS_EVERY = 500  # steps between checks that all ranks have equal weights


class StopRequest:
    """Flag set by SIGTERM, SIGHUP (closed terminal), SIGUSR1 (Slurm's warning) or Ctrl-C; a second Ctrl-C exits."""

    def __init__(self, prints: bool):
        self.requested, self.since, self.prints = False, 0.0, prints
        for number in (*stop_signals(), signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._handle)

    def _handle(self, number, frame):
        # torchrun forwards the terminal's Ctrl-C, so one keystroke arrives twice
        if self.requested and number == signal.SIGINT and time.monotonic() - self.since > 1:
            os._exit(130)
        if not self.requested:
            self.requested, self.since = True, time.monotonic()
            if self.prints:
                Output(2).write(b"\nstopping after this step (Ctrl-C again: exit at once, without saving)\n")


class Watchdog:
    """Context manager that prints all stacks and exits with code 8 if `beat` is late. Suspended time does not count."""

    TICK_SECONDS = 0.25

    def __init__(self, seconds: float, rank: int = 0):
        self._rank, self._closed = rank, threading.Event()
        self.beat(seconds)
        self._thread = threading.Thread(target=self._watch, name="nanotrain-watchdog", daemon=True)

    def beat(self, seconds: float) -> None:
        """Report progress and allow `seconds` until the next call."""
        self._limit, self._waited = seconds, 0.0

    def _watch(self):
        while not self._closed.wait(self.TICK_SECONDS):
            self._waited += self.TICK_SECONDS
            if self._waited >= self._limit:
                with contextlib.suppress(Exception):
                    self._print_stacks()
                return os._exit(HANG_EXIT_CODE)

    def _print_stacks(self):
        where = f"[rank {self._rank}] " if self._rank else ""
        message = f"no progress for {self._limit:.0f} s: exiting. Stacks of all threads:"
        lines = [f"{where}error: {message}"]
        for innermost in sys._current_frames().values():
            # not traceback.print_stack, which reads source files, perhaps from the file system that hangs
            codes = [(frame.f_code, line) for frame, line in walk_stack(innermost)]
            lines += ["", *(f"  {code.co_filename}:{line} in {code.co_name}" for code, line in codes)]
        print("\n".join(lines), file=sys.stderr, flush=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._closed.set()
        self._thread.join()


def too_many_skipped(skipped: Sequence[int], step: int) -> bool:
    """Whether too many steps were skipped to go on. skipped: the steps without an update, the last one being `step`."""
    in_a_row = skipped[-NON_FINITE_IN_A_ROW:] == list(range(step - NON_FINITE_IN_A_ROW + 1, step + 1))
    return in_a_row or sum(other > step - NEARBY_STEPS for other in skipped) >= NON_FINITE_NEARBY


def deviations(losses: Sequence[float], loss: float) -> float:
    """Standard deviations of `loss` above the mean of the accepted `losses`; 0 while there are too few."""
    if len(losses) < LOSS_WINDOW // 4:
        return 0.0
    mean = math.fsum(losses) / len(losses)
    variance = math.fsum((other - mean) ** 2 for other in losses) / len(losses)
    return (loss - mean) / max(math.sqrt(variance), 1e-9)


@torch.no_grad()
def checksum(tensors: Iterable[torch.Tensor]) -> int:
    """64-bit checksum of float32 tensors; it detects any change of a single value."""
    total = 0
    for tensor in tensors:
        bits = tensor.detach().reshape(-1).view(torch.int32).sum(dtype=torch.int64).item()
        total = (total * 1_000_003 + bits) % 2**64
    return total


def check_replicas(dist: DistContext, tensors: Sequence[torch.Tensor], step: int, every: int = 1) -> None:
    """Raise RunError on all ranks if their float32 `tensors` differ in any bit; checks every `every`-th step only."""
    if dist.world_size == 1 or step % every:
        return
    sums = dist.all_gather_objects(checksum(tensors))
    other = [rank for rank, found in enumerate(sums) if found != sums[0]]
    if other:
        found = f"the weights of rank {', '.join(map(str, other))} differ from those of rank 0"
        raise RunError(f"step {step}: {found}. Nothing was saved; continue from the last checkpoint with --resume")
