"""speedrun.sh with a stand-in for the interpreter: which stages it calls, how it stops, and how it goes on."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = ["nanotrain.dataset", "scripts.tok_train", "scripts.base_train", "scripts.base_eval"]
EVALUATION = """{"val_bpb": 1.2345, "train_bpb": 1.1, "doc_bpb": 1.3, "step": 900, "tokens": 3686400, "core": {
"is_core": false, "core_metric": 0.0813, "standard_error": 0.0165, "accuracy": 0.361, "baseline": 0.317},
"compared_bpb": {"xz -9": 1.9}}"""
PYTHON = f"""#!/bin/bash
case $1 in
    -) exec {sys.executable} "$@" ;;
esac
echo "$2 $*" >> calls
if [ "$2" = nanotrain.hardware ]; then printf 'device     cpu\\nGPUs       0\\n'; fi
for argument; do case $argument in --run-name=*) run=$NANOTRAIN_DIR/runs/${{argument#*=}} ;; esac; done
if [ "$2" = scripts.base_train ]; then
    mkdir -p "$run/checkpoints/step_00000900"
    echo '{{"settings": {{"TARGET_MINUTES": 1.5}}}}' > "$run/config.json"
fi
if [ "$2" = "$(cat slow 2> /dev/null)" ]; then
    trap 'exit 0' TERM HUP
    echo waits >> calls
    while :; do sleep 0.02; done
fi
if [ "$2" = scripts.base_eval ]; then cp evaluation.json "$run/"; fi
"""


@pytest.fixture
def tree(tmp_path):
    """A clone with a finished environment whose interpreter only notes what it is called with."""
    folder = tmp_path / "clone"
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / "dev").mkdir()
    for name in ("speedrun.sh", "dev/environment.sh", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copy(ROOT / "pyproject.toml", folder / ".venv" / ".installed")
    (folder / ".venv" / "bin" / "python").write_text(PYTHON)
    (folder / ".venv" / "bin" / "python").chmod(0o755)
    (folder / "evaluation.json").write_text(EVALUATION)
    return folder


def start(tree, command="MINUTES=2 bash speedrun.sh"):
    choices = re.findall(r"^  ([A-Z_]+)  ", (ROOT / "speedrun.sh").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"DATASET", "MINUTES"} <= set(choices)
    environment = {name: value for name, value in os.environ.items() if name not in choices}
    environment["NANOTRAIN_DIR"] = str(tree.parent / "base[a-b]")
    (tree / "calls").write_text("")
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen(["bash", "-c", f"exec env {command}"], cwd=tree, env=environment, **options)


def speedrun(tree, command="MINUTES=2 bash speedrun.sh", code=0):
    """(stdout, stderr) of a run that ends with `code`."""
    process = start(tree, command)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    return out, err


def called(tree):
    """[(module, its arguments)] in the order of the calls, without the look at the machine."""
    lines = [line.split(" ") for line in (tree / "calls").read_text().splitlines() if line != "waits"]
    return [(module, arguments) for module, *arguments in lines if module != "nanotrain.hardware"]


def interrupt_in(tree, stage, command="MINUTES=2 bash speedrun.sh", number=signal.SIGINT):
    """(process, stdout, stderr) of a run that gets a signal, as from a terminal, in `stage`."""
    (tree / "slow").write_text(stage)
    process = start(tree, command)
    deadline = time.monotonic() + 60
    while "waits" not in (tree / "calls").read_text():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, number)  # SIGINT is ignored by the stage: bash starts it in the background
    out, err = process.communicate(timeout=60)
    (tree / "slow").unlink()
    return process, out, err


@pytest.mark.parametrize("stage", STAGES[1:3])
def test_stopped_in_a_stage_and_called_as_it_says_it_goes_on(tree, stage):
    process, out, err = interrupt_in(tree, stage)
    assert (process.returncode, err) == (0, "")
    assert [module for module, _ in called(tree)] == STAGES[: STAGES.index(stage) + 1]
    command = re.search(r"stopped. To go on, run the same command again:\n\n    (.*)\n$", out)[1]
    assert "MINUTES=2" in command
    out, _ = speedrun(tree, command)
    training = dict(called(tree))["scripts.base_train"]
    assert {"--resume", "--run-name=stdlib-2min"} <= set(training)
    run = tree.parent / "base[a-b]" / "runs" / "stdlib-2min"
    assert f"--tokenizer-dir={run}" in training
    if STAGES.index(stage) < STAGES.index("scripts.base_train"):
        assert [module for module, _ in called(tree)] == STAGES
    else:  # with the tokenizer and the time that the run began with
        assert [module for module, _ in called(tree)] == [name for name in STAGES if name != "scripts.tok_train"]
        assert "--target-minutes=1.5" in training
    summary = out[out.index("== summary") :]
    assert re.search(r"^time +\d+ s: environment \d+ s, data \d+ s,\s", summary, re.MULTILINE)
    assert f"\nreport          {run}/report/report.html\n" in summary


def test_a_closed_terminal_stops_it_too_and_no_output_that_cannot_be_written_does(tree):
    process, out, _ = interrupt_in(tree, "scripts.base_train", number=signal.SIGHUP)
    assert (process.returncode, "stopped. To go on" in out) == (0, True)
    for output in ("> /dev/full 2>&1", ">&- 2>&-", "> >(exit) 2>&1"):
        speedrun(tree, f"bash -c 'MINUTES=2 bash speedrun.sh {output}'")
        assert [module for module, _ in called(tree)][-1] == STAGES[-1]
    speedrun(tree, "bash -c 'MINUTES=two bash speedrun.sh > /dev/full 2>&1'", code=2)


@pytest.mark.parametrize("choice", ["RUN_NAME='a b'", "MINUTES=0.0", "NPROC=two"])
def test_a_choice_that_cannot_be_is_refused_before_anything_else(tree, choice):
    out, err = speedrun(tree, f"{choice} bash speedrun.sh", code=2)
    assert (out, called(tree)) == ("", [])
    assert f"error: {choice.replace(chr(39), '')}: " in err


def test_a_folder_that_cannot_be_written_is_refused_before_anything_else(tree):
    out, err = speedrun(tree, "HOME=/dev/null NANOTRAIN_DIR= bash speedrun.sh", code=2)
    assert (out, called(tree)) == ("", [])
    assert "error: /dev/null/.cache/nanotrain cannot be written: set NANOTRAIN_DIR" in err


def test_what_the_caller_set_for_another_python_does_not_reach_the_stages(tree):
    python, names = tree / ".venv" / "bin" / "python", ("PYTHONHOME", "PYTHONPATH", "PYTHONSAFEPATH")
    python.write_text(PYTHON.replace('echo "$2', 'env > environment\necho "$2'))
    speedrun(tree, " ".join(f"{name}=/nowhere" for name in names) + " bash speedrun.sh")
    environment = (tree / "environment").read_text().splitlines()
    assert not [line for line in environment if line.startswith(names)]


def test_an_environment_that_does_not_hold_what_pip_was_to_install_is_not_used(tree):
    python, stamp = tree / ".venv" / "bin" / "python", tree / ".venv" / ".installed"
    stamp.unlink()
    python.write_text('#!/bin/bash\nenv > environment\nif [ "$1" = -c ]; then echo "no module torch"; exit 1; fi\n')
    _, err = speedrun(tree, f"PIP_TARGET=/x PIP_USER=1 BASE_PYTHON={sys.executable} bash speedrun.sh", code=1)
    assert (err.startswith("no module torch\nerror: "), stamp.exists()) == (True, False)
    assert not re.search("^PIP_(TARGET|USER)=", (tree / "environment").read_text(), re.MULTILINE)


@pytest.mark.parametrize(("gpus", "dataset", "depth"), [(0, "stdlib", 0), (2, "fineweb-edu", 20)])
def test_the_machine_that_it_shows_decides_between_the_small_run_and_the_large_one(tree, gpus, dataset, depth):
    (tree / ".venv" / "bin" / "python").write_text(PYTHON.replace("GPUs       0", f"GPUs       {gpus}"))
    out, _ = speedrun(tree, "NPROC=1 bash speedrun.sh")
    assert f"\nGPUs       {gpus}\n" in out
    calls = dict(called(tree))
    assert f"--dataset={dataset}" in calls["nanotrain.dataset"]
    assert f"--depth={depth}" in calls["scripts.base_train"]


def test_a_stage_that_fails_or_a_stop_whose_save_fails_ends_it_with_its_code(tree):
    python = tree / ".venv" / "bin" / "python"
    python.write_text(PYTHON.replace("trap 'exit 0' TERM", "trap 'exit 3' TERM"))
    process, out, _ = interrupt_in(tree, "scripts.base_train")
    assert (process.returncode, "stopped" in out) == (3, False)
    python.write_text(PYTHON.replace("for argument;", '[ "$2" != scripts.base_eval ] || exit 6\nfor argument;'))
    _, err = speedrun(tree, code=6)
    assert err == 'error: stage "evaluation" failed with exit code 6\n'


def test_runs_of_other_data_have_their_own_tokenizer(tree):
    """Also one that begins anew in the folder of a run which was stopped before its first checkpoint."""
    for folder in ("x/mine", "y/theirs"):
        speedrun(tree, f"MINUTES=2 DATA_DIR=/{folder} bash speedrun.sh")
        calls = dict(called(tree))
        run = tree.parent / "base[a-b]" / "runs" / f"{Path(folder).name}-2min"
        for stage in ("scripts.tok_train", "scripts.base_train"):
            assert {f"--tokenizer-dir={run}", f"--data-dir=/{folder}"} <= set(calls[stage])
        (run / "tokenizer.json").touch()
        shutil.rmtree(run / "checkpoints")
    speedrun(tree, "RUN_NAME=mine-2min DATA_DIR=/y/mine bash speedrun.sh")
    assert "--data-dir=/y/mine" in dict(called(tree))["scripts.tok_train"]


def test_hosted_shards_come_as_the_depth_needs_while_the_tokenizer_trains(tree):
    speedrun(tree, "DATASET=fineweb-edu DEPTH=4 SEED=5 bash speedrun.sh")
    calls = called(tree)
    shards = [arguments[-1] for module, arguments in calls if module == "nanotrain.dataset"]
    assert (shards[0], shards[-1]) == ("1", "--for-depth=4"), "and between them the one that runs beside"
    modules = [module for module, _ in calls]
    assert modules.index("scripts.tok_train") < len(modules) - 1 - modules[::-1].index("nanotrain.dataset")
    training = dict(calls)["scripts.base_train"]
    assert {"--seed=5", "--depth=4", "--run-name=fineweb-edu-3min-d4-s5"} <= set(training)
    assert not any(argument.startswith(("--matrix", "--weight", "--batch", "--max-seq")) for argument in training)


def test_a_stage_that_fails_takes_the_download_beside_it_along(tree):
    python = tree / ".venv" / "bin" / "python"
    fails = "case $2-$* in *tok_train*) sleep 0.5; exit 3 ;; *for-depth*) trap 'echo ended >> calls; exit' TERM; "
    fails += "while :; do sleep 0.02; done ;; esac\n"
    python.write_text(python.read_text().replace("for argument; do", fails + "for argument; do", 1))
    speedrun(tree, "DATASET=fineweb-edu DEPTH=4 bash speedrun.sh", code=3)
    deadline = time.monotonic() + 10
    while "ended" not in (tree / "calls").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
