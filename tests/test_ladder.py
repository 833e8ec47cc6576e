"""The ladder's law and its comparison of two series, on runs whose law is known."""

import json
import os
import shutil
import signal
import subprocess
import time

import pytest
from conftest import ROOT

from dev import ladder
from nanotrain.errors import UserError


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
    text = ladder.table(series)
    assert "old: bpb = 9 * FLOPs^-0.0700" in text
    assert "1.25, 1.25, 1.25" in text
    assert text.count("| ladder-") == 6


def test_a_series_is_not_taken_for_another_and_runs_that_others_beat_do_not_bend_the_law(base_dir):
    write_series(base_dir, "base")
    write_series(base_dir, "base-lr2", factor=1.25)
    write_run(base_dir / "runs" / "ladder-base-9", 500, 5.0, depth=4)
    series = ladder.series_of(["base", "base-lr2"])
    assert [len(points) for points in series.values()] == [4, 3]
    assert ladder.saved_compute(ladder.fit(series["base"]), series["base-lr2"]) == pytest.approx([1.25] * 3)
    folders = sorted(str(folder) for folder in (base_dir / "runs").glob("ladder-base-lr2-*"))
    assert ladder.series_of(folders)["runs"] == series["base-lr2"]


def test_what_is_missing_is_a_sentence(base_dir):
    with pytest.raises(UserError, match=r"no run of a series 'other'.* bash dev/ladder.sh other"):
        ladder.series_of(["other"])
    write_series(base_dir, "old", steps=(100,))
    with pytest.raises(UserError, match="two runs"):
        ladder.table(ladder.series_of(["old"]))
    (base_dir / "runs" / "ladder-old-0" / "evaluation.json").unlink()
    with pytest.raises(UserError, match=r"evaluation.json is missing: .*base_eval --run-name="):
        ladder.series_of(["old"])


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
    (tmp_path / "calls").touch()
    return tmp_path


def begin_series(tree):
    options = {"cwd": tree, "env": {**os.environ, "PYTHON": "./python"}, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(["bash", "dev/ladder.sh", "new"], **options, start_new_session=True)


def calls(tree):
    return (tree / "calls").read_text().splitlines()


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
