"""Errors a user can cause, and how a program ends on one: a sentence and an exit code, never a traceback.

The message says what is wrong, the value, and the command that fixes it. What only a programmer can break is an
`assert`.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable

HANG_EXIT_CODE = 8  # of a process that its watchdog ended


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
    """SIGTERM: it ends a program as Ctrl-C does, which takes its temporary files along."""


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, at most 160 characters; the name of its type if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def file_error(error: OSError) -> RunError:
    """The sentence of an error of the operating system."""
    return RunError(": ".join(str(part) for part in (error.strerror, error.filename) if part) or str(error))


def run(*functions: Callable[[], object]) -> None:
    """Call `functions` in turn, and end the process as every nanotrain program ends."""
    signal.signal(signal.SIGTERM, _interrupt)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a test's replacement
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character gets a question mark
    try:
        for function in functions:
            function()
        sys.stdout.flush()  # here, where a reader that went away is caught
    except UserError as error:
        _end(error.exit_code, f"error: {error}")
    except KeyboardInterrupt:
        _end(130, "stopped")
    except BrokenPipeError:  # the reader of our output went away (`... | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # an unwritable folder, a full disk
        if not error.strerror:
            raise
        _end(1, f"error: {file_error(error)}")
    _end(0)


def _interrupt(number, frame):
    raise Terminated


def _end(exit_code, message=""):
    rank = os.environ.get("RANK") or "0"
    if message:
        print(f"[rank {rank}] {message}" if rank != "0" else message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        os._exit(exit_code)  # threads of torch.distributed sometimes abort an interpreter that takes itself down
    if exit_code:
        sys.exit(exit_code)
