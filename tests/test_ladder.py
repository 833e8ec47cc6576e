"""The ladder's law and its comparison of two series, on runs whose law is known."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from nanotrain.errors import UserError

spec = importlib.util.spec_from_file_location("ladder", ROOT / "dev" / "ladder.py")
ladder = sys.modules["ladder"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ladder)


def write_run(folder, steps, bpb, depth=2):
    folder.mkdir(parents=True)
    tokens = 4096 * steps
    evaluation = {"step": steps, "tokens": tokens, "doc_bpb": bpb}
    plan = {"parameters": {"matrix": 1000, "unembedding": 500}, "flops_per_token": 10_000}
    shape = {"num_layers": depth, "num_heads": 2, "head_dim": 8}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "config.json").write_text(json.dumps({"plan": plan, "model_config": shape}))


def write_series(base_dir, name, factor=1.0, steps=(100, 400, 1600)):
    """Runs on the law bpb = 9 * (factor * FLOPs) ** -0.07."""
    for number, count in enumerate(steps):
        bpb = 9 * (factor * 4096e4 * count) ** -0.07
        write_run(base_dir / "runs" / f"ladder-{name}-{number}", count, bpb)


def test_the_law_is_the_one_the_runs_follow_and_the_gain_is_the_compute_saved(base_dir):
    write_series(base_dir, "old")
    write_series(base_dir, "new", factor=1.25)
    series = ladder.series_of(["old", "new"])
    assert [point.steps for point in series["old"]] == [100, 400, 1600]
    a, b = ladder.fit(series["old"])
    assert (a, b) == (pytest.approx(9), pytest.approx(0.07))
    assert ladder.saved_compute((a, b), series["new"]) == pytest.approx([1.25] * 3)
    assert ladder.saved_compute((a, b), series["old"]) == pytest.approx([1.0] * 3)
    text = ladder.table(series)
    assert "old: bpb = 9 * FLOPs^-0.0700" in text
    assert "old would need 1.25, 1.25, 1.25 times the operations of new for the same loss" in text
    assert len([line for line in text.splitlines() if line.startswith("| ladder-")]) == 6


def test_a_series_is_not_taken_for_another_whose_name_it_begins_with(base_dir):
    write_series(base_dir, "base")
    write_series(base_dir, "base-lr2", factor=1.25)
    series = ladder.series_of(["base", "base-lr2"])
    assert [len(points) for points in series.values()] == [3, 3]
    assert ladder.saved_compute(ladder.fit(series["base"]), series["base-lr2"]) == pytest.approx([1.25] * 3)


def test_runs_that_others_beat_do_not_bend_the_law(base_dir):
    write_series(base_dir, "old")
    write_run(base_dir / "runs" / "ladder-old-9", 500, 5.0, depth=4)
    points = ladder.series_of(["old"])["old"]
    assert len(points) == 4
    assert ladder.fit(points)[1] == pytest.approx(0.07)


def test_what_is_missing_is_a_sentence(base_dir):
    with pytest.raises(UserError, match=r"no run of a series 'other': train it with bash dev/ladder.sh other"):
        ladder.series_of(["other"])
    write_series(base_dir, "old", steps=(100,))
    with pytest.raises(UserError, match="two runs of different size"):
        ladder.table(ladder.series_of(["old"]))
    (base_dir / "runs" / "ladder-old-0" / "evaluation.json").unlink()
    with pytest.raises(UserError, match=r"evaluation.json is missing: .*base_eval --run-name="):
        ladder.series_of(["old"])


def test_folders_of_runs_are_one_series(base_dir):
    write_series(base_dir, "old")
    folders = sorted(str(folder) for folder in (base_dir / "runs").iterdir())
    assert [point.steps for point in ladder.series_of(folders)["runs"]] == [100, 400, 1600]


# ---- the script ----

NAMES = ("base_train", "base_eval")
PYTHON = """#!/bin/bash
echo "$2 $3" >> calls
if [ "$2" = "$(cat slow 2> /dev/null)" ]; then
    trap 'exit 0' INT # as a run saves and ends well
    echo waits >> calls
    while :; do sleep 0.02; done
fi
"""


@pytest.fixture
def tree(tmp_path):
    """A copy of the script, and an interpreter that only notes what it is called for."""
    (tmp_path / "dev").mkdir()
    shutil.copy(ROOT / "dev" / "ladder.sh", tmp_path / "dev")
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def begin_series(tree):
    command = ["bash", "dev/ladder.sh", "new"]
    environment = {**os.environ, "PYTHON": "./python"}
    return subprocess.Popen(
        command, cwd=tree, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def calls(tree):
    path = tree / "calls"
    return path.read_text().splitlines() if path.exists() else []


def test_a_series_is_three_runs_each_evaluated(tree):
    assert begin_series(tree).wait(60) == 0
    steps = [f"scripts.{name} --run-name=ladder-new-{flops}" for flops in ("2e13", "8e13", "3.2e14") for name in NAMES]
    assert calls(tree) == [*steps, "new "]


@pytest.mark.parametrize("slow", NAMES)
def test_ctrl_c_ends_a_series_and_evaluates_nothing_half_trained(tree, slow):
    (tree / "slow").write_text(f"scripts.{slow}")
    process = begin_series(tree)
    begin = time.monotonic()
    while "waits" not in calls(tree) and time.monotonic() < begin + 30:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=30)[0] == "stopped; the same command goes on\n"
    assert process.returncode == 0
    assert calls(tree)[-2:] == [f"scripts.{slow} --run-name=ladder-new-2e13", "waits"]
