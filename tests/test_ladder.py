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
    write_series(base_dir, "new-lr2", factor=2)  # another series
    write_run(base_dir / "runs" / "ladder-old-9", 500, 5.0, depth=4)  # others beat it: it does not bend the law
    series = ladder.series_of(["old", "new"])
    assert sorted(point.steps for point in series["old"]) == [100, 400, 500, 1600]
    a, b = ladder.fit(series["old"])
    assert (a, b) == (pytest.approx(9), pytest.approx(0.07))
    assert ladder.saved_compute((a, b), series["new"]) == pytest.approx([1.25] * 3)
    text = ladder.table(series)
    assert "old: bpb = 9 * FLOPs^-0.0700" in text
    assert "1.25, 1.25, 1.25" in text
    assert text.count("| ladder-") == 7


def test_what_is_missing_is_a_sentence(base_dir):
    with pytest.raises(UserError, match=r"no run of a series 'other'.* bash dev/ladder.sh other"):
        ladder.series_of(["other"])
    write_series(base_dir, "old", steps=(100,))
    with pytest.raises(UserError, match="two runs"):
        ladder.table(ladder.series_of(["old"]))
    (base_dir / "runs" / "ladder-old-0" / "evaluation.json").unlink()
    with pytest.raises(UserError, match=r"evaluation.json is missing: .*base_eval --run-name="):
        ladder.series_of(["old"])


PYTHON = """#!/bin/bash
echo "$2 $3" >> calls
if [ -e slow ]; then
    trap 'exit 0' INT # as a run saves and ends well
    echo waits >> calls
    while :; do sleep 0.02; done
fi
"""


@pytest.mark.parametrize("stopped", [False, True])
def test_a_series_is_three_runs_each_evaluated_and_ctrl_c_ends_it(tmp_path, stopped):
    """On a copy of the script with an interpreter that only notes what it is called for."""
    (tmp_path / "dev").mkdir()
    shutil.copy(ROOT / "dev" / "ladder.sh", tmp_path / "dev")
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    calls = tmp_path / "calls"
    calls.touch()
    steps = [
        f"scripts.{name} --run-name=ladder-new-{flops}"
        for flops in ("2e13", "8e13", "3.2e14")
        for name in ("base_train", "base_eval")
    ]
    if stopped:
        (tmp_path / "slow").touch()
    environment = {**os.environ, "PYTHON": "./python"}
    command = ["bash", "dev/ladder.sh", "new"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True) as process:
        deadline = time.monotonic() + 30
        while stopped and "waits" not in calls.read_text() and time.monotonic() < deadline:
            time.sleep(0.02)
        if stopped:
            os.killpg(process.pid, signal.SIGINT)
        assert process.wait(30) == 0
    assert calls.read_text().splitlines() == ([steps[0], "waits"] if stopped else [*steps, "new "])
