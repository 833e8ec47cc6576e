"""Errors a user can cause, and how a program ends on one: a sentence and an exit code, never a traceback.

The message says what is wrong, the value, and the command that fixes it. What only a programmer can break is an
`assert`.
"""

import contextlib
import io
import os
import select
import signal
import sys
from collections.abc import Callable

HANG_EXIT_CODE = 8  # of a process that its watchdog ended
OUTPUT_SECONDS = 5.0  # that a reader who has stopped reading may hold a program up


class UserError(Exception):
    """Wrong usage or settings."""

    exit_code = 2


class CheckpointError(UserError):
    """There is no checkpoint that can be used."""

    exit_code = 3


class MemoryLimitError(UserError):
    """The device has too little memory for these settings."""

    exit_code = 5


class DataError(UserError):
    """Data is missing, corrupt, or does not fit the rest of the run."""

    exit_code = 6


class RunError(UserError):
    """A program cannot go on, through no fault of its settings: a file, another rank, another process on the run."""

    exit_code = 1


class NonFiniteError(UserError):
    """Loss or gradients were NaN or infinite several steps in a row."""

    exit_code = 7


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP: it ends a program as Ctrl-C does, which takes its temporary files along."""


class Output(io.FileIO):
    """Standard output or error. What cannot be written is dropped: the terminal or the reader is gone, the disk is
    full, or nobody has read for OUTPUT_SECONDS.
    """

    def __init__(self, descriptor: int):
        self._descriptor, self._dropping = descriptor, False
        if os.isatty(descriptor):  # with some room it is ready, but a blocking write would wait until all has room
            with contextlib.suppress(OSError):
                descriptor = os.open(f"/dev/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        super().__init__(descriptor, "w", closefd=False)

    def fileno(self) -> int:
        """The number of the stream itself."""
        return self._descriptor

    def write(self, data: bytes) -> int:
        """Write at most PIPE_BUF bytes, which a pipe with any room takes without blocking; returns how many."""
        with contextlib.suppress(OSError):
            if select.select([], [self], [], 0.0 if self._dropping else OUTPUT_SECONDS)[1]:
                written = super().write(data[: select.PIPE_BUF])
                self._dropping = written is None
                return written or len(data)
        self._dropping = True
        return len(data)


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, at most 160 characters; the name of its type if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def file_error(error: OSError) -> RunError:
    """The sentence of an error of the operating system."""
    return RunError(": ".join(str(part) for part in (error.strerror, error.filename) if part) or str(error))


def stop_signals() -> list[int]:
    """The signals that ask a program to stop, Ctrl-C's aside; a closed terminal's only if nobody said to ignore it."""
    hang_up = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGTERM, *hang_up]


def run(*functions: Callable[[], object], for_its_output: bool = False) -> None:
    """Call `functions` in turn, and end the process as every nanotrain program ends. Output that cannot be written
    neither ends nor changes anything, except for programs that run for_its_output: they end with their reader.
    """
    _open_standard_streams(for_its_output)
    for number in stop_signals():
        signal.signal(number, _interrupt)
    try:
        for function in functions:
            function()
        sys.stdout.flush()
    except UserError as error:
        _end(error.exit_code, f"error: {error}")
    except KeyboardInterrupt:
        _end(130, "stopped")
    except OSError as error:  # an unwritable folder, a full disk
        if not error.strerror:
            raise
        has_no_reader = for_its_output and isinstance(error, BrokenPipeError)  # `... | head`
        _end(1, "" if has_no_reader else f"error: {file_error(error)}")
    _end(0)


def _open_standard_streams(for_its_output):
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # one that was closed (`>&-`), whose number the next file would get
    os.close(descriptor)
    sys.stdin = sys.stdin or open(0, closefd=False)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name) or open(descriptor, "w", closefd=False)
        with contextlib.suppress(OSError, AttributeError):  # a test's replacement has no descriptor
            if stream.fileno() == descriptor and not (name == "stdout" and for_its_output):
                buffer = io.BufferedWriter(Output(descriptor))
                stream = io.TextIOWrapper(buffer, stream.encoding, line_buffering=stream.line_buffering)
        setattr(sys, name, stream)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character gets a question mark


def _interrupt(number, frame):
    for other in stop_signals():
        signal.signal(other, signal.SIG_IGN)  # a second one must not end the cleaning up
    raise Terminated


def _end(exit_code, message=""):
    rank = os.environ.get("RANK") or "0"
    if message:
        print(f"[rank {rank}] {message}" if rank != "0" else message, file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would flush once more, and say so
    if os.environ.get("WORLD_SIZE", "1") != "1":
        os._exit(exit_code)  # threads of torch.distributed sometimes abort an interpreter that takes itself down
    if exit_code:
        sys.exit(exit_code)
