"""Programs outlive their output, their terminal and their reader."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINES = 2000  # more than a pipe takes whose reader has stopped
WRITER = f"""
import sys
from nanotrain import errors

def work():
    for number in range({LINES}):
        print("x" * 99, flush=True)
    print("said", file=sys.stderr)
    open(sys.argv[1], "w").write("saved")
    raise errors.DataError("bad")

errors.OUTPUT_SECONDS = 0.2
errors.run(work, for_its_output=len(sys.argv) > 2)
"""
SLEEPER = """
import sys, time
from nanotrain import errors

def work():
    print("ready", flush=True)
    time.sleep(0.5)

errors.run(work)
"""
HANGS = """
import sys, time
from nanotrain import errors, guard

def work():
    print("x" * 70000, file=sys.stderr)
    with guard.Watchdog(0.1):
        time.sleep(60)

errors.OUTPUT_SECONDS = 0.2
errors.run(work)
"""


def python(code, *arguments, **options):
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, **options)


OUTPUTS = (
    "full",
    "closed",
    "without a reader",
    "pipe that nobody reads",
    "terminal that nobody reads",
    "terminal gone",
)


@pytest.mark.parametrize("output", OUTPUTS)
def test_output_that_cannot_be_written_changes_neither_the_work_nor_the_exit_code(output, tmp_path):
    saved = tmp_path / "saved"
    if output == "closed":
        shell = ["bash", "-c", '"$@" <&- >&- 2>&-', "-", sys.executable, "-c", WRITER, str(saved)]
        assert subprocess.run(shell, cwd=ROOT, timeout=60).returncode == 6
    else:
        if output == "full":
            reader, writer = os.open("/dev/null", os.O_RDONLY), os.open("/dev/full", os.O_WRONLY)
        else:
            reader, writer = pty.openpty() if output.startswith("terminal") else os.pipe()
        if not output.endswith("that nobody reads"):
            os.close(reader)
        process = python(WRITER, saved, stdout=writer, stderr=writer)
        assert process.wait(timeout=60) == 6
        os.close(writer)
        if output.endswith("that nobody reads"):
            os.close(reader)
    assert saved.read_text() == "saved"  # and nothing that was meant for a closed descriptor


def test_a_program_that_runs_for_its_output_ends_with_its_reader(tmp_path):
    with python(WRITER, tmp_path / "saved", "output", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_is_a_request_to_stop_unless_it_was_to_be_ignored(ignored):
    handler = signal.SIG_IGN if ignored else signal.SIG_DFL
    with python(SLEEPER, stdout=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGHUP, handler)) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGHUP)
    assert process.returncode == (0 if ignored else 130)


def test_p7_a_watchdog_whose_output_nobody_reads_ends_the_process_all_the_same():
    reader, writer = os.pipe()
    assert python(HANGS, stderr=writer).wait(timeout=60) == 8
    os.close(reader)
    os.close(writer)
