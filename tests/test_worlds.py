"""Training on 1, 2, 3 and 7 ranks is one training: losses, gradients, weights, optimizer state; and that faults are
noticed.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from nanotrain import checkpoint
from nanotrain.store import Store
from tests import soak

STEPS, SAVED, FEW_STEPS = 20, 10, 5
WORLDS = (1, 2, 3, 7)
ROWS, SEQ_LEN = 420, 8  # rows of a step, which all of these can share
SETTINGS = {
    **soak.TINY,
    "DEPTH": 2,
    "ASPECT_RATIO": 16,
    "MAX_SEQ_LEN": SEQ_LEN,
    "EMBEDDING_LR": 0.35 / 8**0.5,  # so that width 32 gets what the recipe gives to 256, its least
    "UNEMBEDDING_LR": 0.005 / 8**0.5,
    "TOTAL_BATCH_SIZE": ROWS * SEQ_LEN,
    "DEVICE_BATCH_SIZE": 140,
    "NUM_ITERATIONS": STEPS,
    "EVAL_EVERY": STEPS,
    "SAVE_EVERY": 0,
    "KEEP_LAST": 9,
}


def planned(name, ranks, fault="none", stop=0, **settings):
    flags = soak.flags(**{**SETTINGS, "RUN_NAME": name, **settings})
    return {"name": name, "ranks": ranks, "stop": stop, "fault": fault, "flags": flags}


def float_plan(ranks, steps=STEPS):
    settings = {"NUM_ITERATIONS": steps, "EVAL_EVERY": steps}
    return planned(f"float{ranks}", ranks, GRAD_CHECKPOINT=ranks == 3, **settings)  # which changes no bit


def all_plans():
    return [
        *(float_plan(ranks) for ranks in WORLDS),
        *(planned(fault, 2, fault, EVAL_EVERY=0) for fault in ("unsent", "unaveraged")),
        planned("evaluated", 1, EVAL_EVERY=SAVED),
        planned("moved", 3, stop=SAVED, EVAL_EVERY=SAVED),
        planned("moved-on", 2, RUN_NAME="moved", RESUME=True, EVAL_EVERY=SAVED),
    ]


class Worlds:
    """What the runs of `plans` left behind in `folder`."""

    def __init__(self, folder, plans):
        self.folder = folder
        soak.make_inputs(folder)
        (folder / "plan.json").write_text(json.dumps(plans), encoding="utf-8")
        environment = {**os.environ, "NANOTRAIN_DIR": str(folder), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.worlds", str(folder)]
        done = subprocess.run(command, cwd=soak.ROOT, env=environment, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stderr
        self.codes = json.loads((folder / "codes.json").read_text(encoding="utf-8"))

    def log(self, name, rank):
        return (self.folder / f"{name}.rank{rank}.log").read_text(encoding="utf-8")

    def column(self, name, key):
        """The values of `key` in the run's metrics, in order of steps."""
        return [value for _, value in soak.recorded(self.folder / "runs" / name, key)]

    def checkpoint(self, name):
        """({name: tensor} of weights and optimizer state, state) of the newest checkpoint."""
        weights, moments, state = checkpoint.unpack(Store(self.folder / "runs" / name).newest()[1])
        return {**weights, **moments}, state

    def gradients(self, name):
        return load_file(self.folder / f"{name}.gradients")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """One rank and two, for a few steps."""
    return Worlds(tmp_path_factory.mktemp("pair"), [float_plan(ranks, FEW_STEPS) for ranks in (1, 2)])


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """All runs."""
    return Worlds(tmp_path_factory.mktemp("worlds"), all_plans())


def pooled(tensors):
    """The tensors, with all scalars (and each of their moments) as one vector, because one of them may be near 0."""
    found, scalars = {}, {}
    for name, tensor in sorted(tensors.items()):
        if name.partition("/")[0].endswith("_scale"):
            scalars.setdefault(name.partition("/")[2], []).append(tensor.view(1))
        else:
            found[name] = tensor
    return {**found, **{f"scalars/{kind}": torch.cat(parts) for kind, parts in scalars.items()}}


def distances(ours, theirs):
    """{name: Frobenius norm of the difference, relative to that of theirs}."""
    assert ours.keys() == theirs.keys()
    ours, theirs = pooled(ours), pooled(theirs)
    differences = {name: (ours[name].double() - theirs[name].double()).norm() for name in ours}
    return {name: (difference / theirs[name].double().norm()).item() for name, difference in differences.items()}


def gradient_distance(worlds, one, other):
    """The largest of the tensors' distances in the first step; those of scalars, which are zero but for rounding there,
    are relative to the gradient as a whole.
    """
    ours, theirs = worlds.gradients(one), worlds.gradients(other)
    whole = torch.cat([gradient.flatten() for gradient in theirs.values()]).norm()
    scalars = [name for name, gradient in theirs.items() if not gradient.dim()]
    found = [((ours.pop(name) - theirs.pop(name)).abs() / whole).item() for name in scalars]
    return max(*found, *distances(ours, theirs).values())


def relative(ours, theirs):
    """The largest relative difference of two lists of numbers."""
    return max(abs(our / their - 1) for our, their in zip(ours, theirs, strict=True))


def weights_distance(worlds, one, other="float1"):
    """The largest distance of weights and optimizer state."""
    return max(distances(worlds.checkpoint(one)[0], worlds.checkpoint(other)[0]).values())


def assert_trains_as_one_does(worlds, ranks, steps=STEPS):
    one, many = "float1", f"float{ranks}"
    assert worlds.codes[many] == [0] * ranks, worlds.log(many, 0)
    assert worlds.column(many, "data_hash") == worlds.column(one, "data_hash")
    assert len(worlds.column(one, "train/loss")) == steps
    for key, limit in (("train/loss", 1e-6), ("val/bpb", 1e-6), ("train/grad_norm", 1e-4)):
        assert relative(worlds.column(many, key), worlds.column(one, key)) < limit, key
    assert gradient_distance(worlds, many, one) < 1e-6
    assert weights_distance(worlds, many) < 1e-4


def test_p2_two_ranks_train_as_one_does(pair):
    assert_trains_as_one_does(pair, 2, FEW_STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", WORLDS[1:])
def test_p2_any_number_of_ranks_trains_as_one_does(worlds, ranks):
    assert_trains_as_one_does(worlds, ranks)


@pytest.mark.slow
def test_gradients_that_are_not_averaged_are_noticed_though_all_ranks_hold_the_same_weights(worlds):
    assert worlds.codes["unaveraged"] == [0, 0]
    assert relative(worlds.column("unaveraged", "train/loss"), worlds.column("float1", "train/loss")) > 1e-5
    assert gradient_distance(worlds, "unaveraged", "float1") > 1e-3
    assert weights_distance(worlds, "unaveraged") > 1e-3


@pytest.mark.slow
def test_parameters_that_are_not_sent_are_noticed_before_a_save(worlds):
    assert 0 not in worlds.codes["unsent"]
    assert f"step {STEPS}: the weights of rank 1 differ from those of rank 0" in worlds.log("unsent", 0)
    assert Store(worlds.folder / "runs" / "unsent").steps() == []


@pytest.mark.slow
def test_p3_a_run_goes_on_on_another_number_of_ranks(worlds):
    assert worlds.codes["moved"] == [0, 0, 0]
    assert f"stopped and saved at step {SAVED}" in worlds.log("moved", 0)
    assert worlds.codes["moved-on"] == [0, 0], worlds.log("moved-on", 0)
    assert worlds.column("moved", "data_hash") == worlds.column("float1", "data_hash")
    assert relative(worlds.column("moved", "train/loss"), worlds.column("float1", "train/loss")) < 1e-6
    assert weights_distance(worlds, "moved") < 1e-4

    # Ranks make up the evaluation that the stop left out.
    assert worlds.log("moved", 0).count("val bpb") == 1  # of the weights before the first step
    assert f"step {SAVED}: val bpb" in worlds.log("moved-on", 0)
    expected = worlds.column("evaluated", "val/bpb")
    assert len(expected) == 3  # at step 0, at the stop, at the end
    assert relative(worlds.column("moved", "val/bpb"), expected) < 1e-6
