"""A short soak, and that the soak notices what it is there to notice."""

import shutil

import pytest

from nanotrain import checkpoint
from tests import soak

pytestmark = pytest.mark.slow

NUM_ITERATIONS = 90


@pytest.fixture(scope="module")
def soaked(tmp_path_factory):
    """(folder, Result) of a soak with one kill in a save and one between saves."""
    folder = tmp_path_factory.mktemp("soak")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(soak, "KILLS", 2)
        patch.setattr(soak, "NUM_ITERATIONS", NUM_ITERATIONS)
        patch.setitem(soak.TINY, "KEEP_LAST", 3)  # so that `halfway` has two
        return folder, soak.soak(folder)


@pytest.fixture
def halfway(soaked):
    """The folder, with a copy of the killed run in which the last checkpoint is missing, `halfway`."""
    folder, _ = soaked
    run = folder / "runs" / "halfway"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(folder / "runs" / "killed", run)
    shutil.rmtree(run / "checkpoints" / f"step_{NUM_ITERATIONS:08d}")
    return folder


def test_p1_bit_exact_resume_after_sigkill_inside_and_outside_of_a_save(soaked):
    folder, result = soaked
    assert result.problems == []
    assert (result.kills, result.rejected) == (2, 0)
    assert 0 < result.steps[0] < result.steps[1] < NUM_ITERATIONS  # each process got further than the one before
    for name in ("whole", "killed"):
        losses = soak.recorded(folder / "runs" / name, "train/loss")
        assert [step for step, _ in losses] == list(range(1, NUM_ITERATIONS + 1))
        assert checkpoint.newest(folder / "runs" / name)[0] == NUM_ITERATIONS


def test_p1_a_resume_that_forgets_where_it_was_in_the_data_is_reported(halfway):
    trainer = ("tests.faulty", str(halfway), "forget-loader")
    settings = {"NUM_ITERATIONS": NUM_ITERATIONS, "SAVE_EVERY": soak.SAVE_EVERY, "EVAL_EVERY": soak.EVAL_EVERY}
    with soak.Training(halfway, "halfway", settings, trainer) as forgetful:
        assert 0 < forgetful.first_step < NUM_ITERATIONS
        forgetful.finish()
    found = soak.differences(halfway / "runs" / "whole", forgetful.run)
    first = f"(step, value) is ({forgetful.first_step + 1}, "
    assert any(line.startswith(f"metrics.jsonl, data_hash: {first}") for line in found)
    assert any(line.startswith(f"metrics.jsonl, train/loss: {first}") for line in found)
    assert {line.partition(":")[0] for line in found} >= {checkpoint.MODEL, checkpoint.OPTIMIZER, "loader"}


def test_a_step_that_is_recorded_twice_is_reported(soaked, halfway):
    whole, other = (halfway / "runs" / name for name in ("whole", "killed"))
    metrics = other / "metrics.jsonl"
    kept = metrics.read_text(encoding="utf-8")
    lines = kept.splitlines(keepends=True)
    place = next(number for number, line in enumerate(lines) if '"step": 7, "train/loss"' in line)
    try:
        metrics.write_text("".join([*lines[: place + 1], *lines[place:]]), encoding="utf-8")
        found = soak.differences(whole, other)
    finally:
        metrics.write_text(kept, encoding="utf-8")
    assert [line.partition(":")[0] for line in found] == ["metrics.jsonl, train/loss", "metrics.jsonl, data_hash"]
    assert soak.differences(whole, other) == []


def test_p4_a_finished_checkpoint_that_a_kill_has_cost_is_reported(halfway):
    run = halfway / "runs" / "halfway"
    newest = checkpoint.steps(run)[0]
    printed = "precision  float32\nresume     killed at step 12\n"
    assert soak.after_a_kill(run, newest, 12, printed) == (newest, [])
    assert soak.after_a_kill(run, newest, 15, printed) == (newest, ["it went on from step 12 and not from step 15"])
    (run / "checkpoints" / f"step_{newest:08d}" / checkpoint.MODEL).write_bytes(b"half")
    step, problems = soak.after_a_kill(run, newest, 12, printed)
    assert step < newest
    assert problems == [f"step {newest} was saved, but the newest that verifies is step {step}"]
    for folder in (run / "checkpoints").glob("step_*"):
        (folder / checkpoint.MODEL).write_bytes(b"half")
    step, problems = soak.after_a_kill(run, newest, 12, printed)
    assert (step, len(problems)) == (0, 1)
