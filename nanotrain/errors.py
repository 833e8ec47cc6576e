"""User errors and process exit: a one-sentence message and an exit code, never a traceback.

The message names the problem, the value and the command that fixes it. Invariants that only a programmer can break are
checked by `assert`.
"""

import contextlib
import gc
import io
import os
import select
import signal
import sys
from collections.abc import Callable

HANG_EXIT_CODE = 8  # exit code when the watchdog ends a process
OUTPUT_SECONDS = 5.0  # how long output waits for a reader that has stopped reading


class UserError(Exception):
    """Invalid usage or settings."""

    exit_code = 2


class CheckpointError(UserError):
    """No usable checkpoint."""

    exit_code = 3


class MemoryLimitError(UserError):
    """The device has too little memory for these settings."""

    exit_code = 5


class DataError(UserError):
    """Data is missing, corrupt, or does not fit the rest of the run."""

    exit_code = 6


class RunError(UserError):
    """Failure that is not due to settings: a file, another rank, another process using the run."""

    exit_code = 1


class NonFiniteError(UserError):
    """NaN or infinite losses, gradients or weights."""

    exit_code = 7


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, handled like Ctrl-C so that temporary files are deleted."""


class Output(io.FileIO):
    """Standard output or error that drops what cannot be written: reader gone, disk full, unread for OUTPUT_SECONDS."""

    def __init__(self, descriptor: int):
        self._descriptor, self._dropping = descriptor, False
        if os.isatty(descriptor):  # select reports any room, but a blocking write waits for enough
            with contextlib.suppress(OSError):
                descriptor = os.open(f"/dev/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        super().__init__(descriptor, "w", closefd=False)

    def fileno(self) -> int:
        """The original descriptor."""
        return self._descriptor

    def write(self, data: bytes) -> int:
        """Write at most PIPE_BUF bytes, which never block on a pipe that select reports ready; return the number."""
        with contextlib.suppress(OSError):
            if select.select([], [self], [], 0.0 if self._dropping else OUTPUT_SECONDS)[1]:
                written = super().write(data[: select.PIPE_BUF])
                self._dropping = written is None
                return written or len(data)
        self._dropping = True
        return len(data)


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, at most 160 characters; its type's name if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def file_error(error: OSError) -> RunError:
    """An OSError as a RunError: the system's reason and the file."""
    return RunError(": ".join(str(part) for part in (error.strerror, error.filename) if part) or str(error))


def stop_signals() -> list[int]:
    """The signals that request a stop, besides SIGINT: SIGTERM, and SIGHUP unless it is ignored (nohup)."""
    hang_up = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGTERM, *hang_up]


def run(*functions: Callable[[], object], for_its_output: bool = False) -> None:
    """Call `functions` in turn and exit; errors become a message and an exit code. Output that cannot be written is
    dropped, unless the program runs for_its_output: then it ends when its reader does.
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
        pass  # open closed streams (`>&-`), or the next files would get their descriptors
    os.close(descriptor)
    sys.stdin = sys.stdin or open(0, closefd=False)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name) or open(descriptor, "w", closefd=False)
        with contextlib.suppress(OSError, AttributeError):  # a stream replaced by a test
            if stream.fileno() == descriptor and not (name == "stdout" and for_its_output):
                buffer = io.BufferedWriter(Output(descriptor))
                by_line = stream.line_buffering or stream.write_through  # the latter with PYTHONUNBUFFERED
                stream = io.TextIOWrapper(buffer, stream.encoding, line_buffering=by_line)
        setattr(sys, name, stream)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # "?" for characters the terminal cannot show


def _interrupt(number, frame):
    for other in stop_signals():
        signal.signal(other, signal.SIG_IGN)  # a second signal must not interrupt the cleanup
    raise Terminated


def _end(exit_code, message=""):
    rank = os.environ.get("RANK") or "0"
    if message:
        print(f"[rank {rank}] {message}" if rank != "0" else message, file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python flushes again and prints an error
    if os.environ.get("WORLD_SIZE", "1") != "1":
        os._exit(exit_code)  # torch.distributed threads sometimes abort a normal exit
    gc.freeze()  # otherwise Python collects all of torch's modules when it ends, which takes 0.3 s
    if exit_code:
        sys.exit(exit_code)
