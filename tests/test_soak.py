"""A short soak, and that the soak notices what it is there to notice."""

import shutil
from pathlib import Path

import pytest

from nanotrain import checkpoint
from nanotrain.store import Store
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
        return folder, soak.soak(folder)


def test_p1_bit_exact_resume_after_sigkill_inside_and_outside_of_a_save(soaked):
    folder, result = soaked
    assert result.problems == []
    assert (result.kills, result.rejected) == (2, 0)
    assert 0 < result.steps[0] < result.steps[1] < NUM_ITERATIONS  # each process got further than the one before
    for name in ("whole", "killed"):
        losses = soak.recorded(folder / "runs" / name, "train/loss")
        assert [step for step, _ in losses] == list(range(1, NUM_ITERATIONS + 1))
        assert Store(folder / "runs" / name).newest()[0] == NUM_ITERATIONS


def test_p4_a_finished_checkpoint_that_a_kill_has_cost_is_reported(soaked, tmp_path):
    run = Path(shutil.copytree(soaked[0] / "runs" / "killed", tmp_path / "copied"))
    newest, *_ = Store(run).steps()
    printed = "precision  float32\nresume     killed at step 12\n"
    assert soak.after_a_kill(run, newest, 12, printed) == (newest, [])
    assert len(soak.after_a_kill(run, newest, 15, printed)[1]) == 1  # it went on from step 12
    (run / "checkpoints" / f"step_{newest:08d}" / checkpoint.MODEL).write_bytes(b"half")
    step, problems = soak.after_a_kill(run, newest, 12, printed)
    assert (step < newest, len(problems)) == (True, 1)
    for folder in (run / "checkpoints").glob("step_*"):
        (folder / checkpoint.MODEL).write_bytes(b"half")
    step, problems = soak.after_a_kill(run, newest, 12, printed)
    assert (step, len(problems)) == (0, 1)
