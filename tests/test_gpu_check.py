"""dev/gpu_check.sh: all of it at tiny sizes on a CPU, and what it makes of steps that fail."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "dev" / "gpu_check.py")
gpu_check = sys.modules["gpu_check"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu_check)

SPEED = ["batch size", "first step s", "step ms", "tokens/s", "of matmul", "peak GiB", "measured / planned"]
NUMBERS = {  # the positive numbers of the rows of each step
    "tests": ["passed"],
    "speed 12": SPEED,
    "speed 20": SPEED,
    "data": ["bytes"],
    "bench optimizer": ["ms", "MiB"],
    "train": ["steps", "seconds of steps", "tokens/s", "first loss", "last loss", "first bpb", "last bpb"],
    "resume": ["steps", "killed after"],
    "memory": ["peak GiB", "planned GiB", "measured / planned"],
}
# Stands in for dev/gpu_check.py, with steps that end in every way there is; one leaves a process that outlives it.
STEPS_THAT_FAIL = f"""
import subprocess, sys, time
sys.path.insert(0, {str(ROOT / "dev")!r})
import gpu_check

def hangs():
    gpu_check.tell(number=1)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print("child", child.pid, flush=True)
    time.sleep(600)

def fails():
    print("the reason")
    raise ValueError("not as it should be")

def dies():
    gpu_check.os.kill(gpu_check.os.getpid(), 9)

works = [("hangs", 1, 1, hangs), ("fails", 1, 30, fails), ("dies", 2, 30, dies),
         ("works", 2, 30, lambda: gpu_check.tell(number=12345))]
gpu_check.STEPS = {{name: gpu_check.Step(*rest) for name, *rest in works}}
gpu_check.PROGRAM = __file__
gpu_check.run()
"""


def report(folder):
    """({name: step of the JSON}, the Markdown)."""
    steps = json.loads((folder / "gpu_check.json").read_text(encoding="utf-8"))["steps"]
    return {step["name"]: step for step in steps}, (folder / "gpu_check.md").read_text(encoding="utf-8")


def shell(*arguments, **options):
    """`bash dev/gpu_check.sh` with these tests' Python as the python3 on PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", str(ROOT / "dev" / "gpu_check.sh"), *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True, **options)


@pytest.mark.slow
def test_all_steps_succeed_at_tiny_sizes_and_both_files_hold_the_numbers(tmp_path, base_dir):
    done = shell("--smoke", "out", cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    steps, markdown = report(tmp_path / "out")
    assert {name: step["result"] for name, step in steps.items()} == dict.fromkeys(gpu_check.STEPS, "ok")
    for name, columns in NUMBERS.items():
        for row in steps[name]["rows"]:
            assert min(row[column] for column in columns) > 0, (name, row)
    for step in steps.values():
        assert step["rows"]
        for row in step["rows"]:
            assert f"| {' | '.join(map(gpu_check.cell, row.values()))} |" in markdown
    rates = {row["kernel"].split(" (")[0]: row["rate"] for row in steps["kernels"]["rows"]}
    assert min(rates[name] for name in ("matmul torch.float32", "copy, read and written", "attention default")) > 0
    assert steps["train"]["rows"][0]["last loss"] < steps["train"]["rows"][0]["first loss"]
    assert [row["same"] for row in steps["resume"]["rows"]] == [True] * 4
    assert 0 < steps["resume"]["rows"][0]["killed after"] < steps["resume"]["rows"][0]["steps"]
    assert steps["bench step"]["rows"][0]["part"] == "step"
    assert not base_dir.exists()


@pytest.mark.slow
def test_a_step_that_fails_or_runs_out_of_time_leaves_the_others_running_and_is_named(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(STEPS_THAT_FAIL, encoding="utf-8")
    command = [sys.executable, str(program), "--smoke", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "hangs (timed out), fails (failed), dies (failed)" in done.stderr
    steps, markdown = report(tmp_path / "out")
    assert [step["result"] for step in steps.values()] == ["timed out", "failed", "failed", "ok"]
    assert "\n| hangs | 1 | timed out | " in markdown
    assert all(line in markdown for line in ("\n    the reason\n", "\n    ValueError: not as ", "\n| 12,345 |\n"))
    assert steps["hangs"]["rows"] == [{"number": 1}], "what it found before"
    (line,) = (line for line in steps["hangs"]["output"] if line.startswith("child"))
    assert ended(int(line.split()[1])), "what a step has started ends with it"


def ended(number):
    """Whether a process ends within ten seconds; one that nobody has waited for counts."""
    status = Path(f"/proc/{number}/stat")
    for _ in range(1000):
        if not status.exists() or status.read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--smoke"], "one folder"), (["--smoke", "--part=3", "out"], "--part=3")]
)
def test_wrong_arguments_are_refused(tmp_path, arguments, message):
    done = shell(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []
