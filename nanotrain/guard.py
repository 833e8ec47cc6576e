"""What a run must notice: requests to stop, hangs, non-finite updates, spikes of the loss, ranks that drift apart."""

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

NON_FINITE_IN_A_ROW = 3  # steps that end a run
NON_FINITE_NEARBY, NEARBY_STEPS = 10, 1000  # so many within so many steps end it too
LOSS_WINDOW = 128  # accepted losses that a new one is compared with
SPIKE_DEVIATIONS = 6.0  # standard deviations above their mean
SLOW_SECONDS = 1800.0  # without progress after which a rank counts as hung, outside of steps
CHECK_REPLICAS_EVERY = 500  # steps


class StopRequest:
    """SIGTERM, SIGHUP (a closed terminal), SIGUSR1 (Slurm's warning) and Ctrl-C set a flag; a second Ctrl-C ends the
    process at once.
    """

    def __init__(self, prints: bool):
        self.requested, self.since, self.prints = False, 0.0, prints
        for number in (*stop_signals(), signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._handle)

    def _handle(self, number, frame):
        # torchrun passes the terminal's Ctrl-C on, so that one keystroke arrives twice
        if self.requested and number == signal.SIGINT and time.monotonic() - self.since > 1:
            os._exit(130)
        if not self.requested:
            self.requested, self.since = True, time.monotonic()
            if self.prints:
                Output(2).write(b"\nstopping after this step (Ctrl-C again: at once, without saving)\n")


class Watchdog:
    """Ends the process with exit code 8, and the stacks of all its threads on standard error, when `beat` is not called
    in time. To be used with `with`. The seconds of a suspended process (Ctrl-Z, a closed laptop) do not count.
    """

    TICK_SECONDS = 0.25

    def __init__(self, seconds: float, rank: int = 0):
        self._rank, self._closed = rank, threading.Event()
        self.beat(seconds)
        self._thread = threading.Thread(target=self._watch, name="nanotrain-watchdog", daemon=True)

    def beat(self, seconds: float) -> None:
        """All is well; the next beat comes within `seconds`."""
        self._limit, self._waited = seconds, 0.0

    def _watch(self):
        while not self._closed.wait(self.TICK_SECONDS):
            self._waited += self.TICK_SECONDS
            if self._waited >= self._limit:
                with contextlib.suppress(Exception):
                    self._say_where_threads_are()
                return os._exit(HANG_EXIT_CODE)

    def _say_where_threads_are(self):
        where = f"[rank {self._rank}] " if self._rank else ""
        message = f"no progress for {self._limit:.0f} s: this process is ended. Where each of its threads was:"
        lines = [f"{where}error: {message}"]
        for innermost in sys._current_frames().values():
            # not traceback's functions, which read source files, perhaps from the file system that hangs
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
    """Whether a run should end. skipped: the steps without an update, of which `step` is the last."""
    in_a_row = skipped[-NON_FINITE_IN_A_ROW:] == list(range(step - NON_FINITE_IN_A_ROW + 1, step + 1))
    return in_a_row or sum(other > step - NEARBY_STEPS for other in skipped) >= NON_FINITE_NEARBY


def deviations(losses: Sequence[float], loss: float) -> float:
    """How many standard deviations `loss` lies above the mean of the accepted `losses`; 0 while there are few."""
    if len(losses) < LOSS_WINDOW // 4:
        return 0.0
    mean = math.fsum(losses) / len(losses)
    variance = math.fsum((other - mean) ** 2 for other in losses) / len(losses)
    return (loss - mean) / max(math.sqrt(variance), 1e-9)


@torch.no_grad()
def checksum(tensors: Iterable[torch.Tensor]) -> int:
    """A 64-bit sum over the bits of float32 tensors, in order; any single change changes it."""
    total = 0
    for tensor in tensors:
        bits = tensor.detach().reshape(-1).view(torch.int32).sum(dtype=torch.int64).item()
        total = (total * 1_000_003 + bits) % 2**64
    return total


def check_replicas(dist: DistContext, tensors: Sequence[torch.Tensor], step: int, every: int = 1) -> None:
    """Raise RunError on all ranks if their `tensors` differ in any bit. every: only in each so many steps."""
    if dist.world_size == 1 or step % every:
        return
    sums = dist.all_gather_objects(checksum(tensors))
    other = [rank for rank, found in enumerate(sums) if found != sums[0]]
    if other:
        found = f"the weights of rank {', '.join(map(str, other))} are not those of rank 0"
        raise RunError(f"step {step}: {found}. Nothing was saved; --resume goes on from the last checkpoint")
