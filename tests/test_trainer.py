"""The parts of the training loop, each without the others: state, step, time, checkpoints."""

import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ALONE

from nanotrain import checkpoint, guard, hardware, optim, recipe, trainer
from nanotrain.checkpoint import CheckpointManager, parsed
from nanotrain.errors import CheckpointError, NonFiniteError
from nanotrain.gpt import GPTConfig
from nanotrain.trainer import StepResult, TimeBudget, TrainState, TrainStep

RESULT = StepResult(2.0, 1.0, 7, 64, 0, stop_requested=False, seconds=0.5)
RECIPE = recipe.Recipe(0.04, 0.3, 0.005, 0.05, 0.0, 0.0, "wsd", 0.1, 0.5, 0.0, False, 0.85, 0.95, 0.9, 0.3)
CONFIG = GPTConfig(50, 16, 1, 2, 2, 8)
RATES = {"matrix": 0.02, "embedding": 0.2, "unembedding": 0.004, "scalar": 0.04}


# ---- the state ----


def test_three_steps_in_a_row_without_an_update_end_the_run_and_float16_may_look_for_its_scale():
    state, skipped = TrainState(num_steps=9), replace(RESULT, skipped="loss nan")
    for result in (*[replace(skipped, scale_overflow=True)] * 3, skipped, skipped):
        state.advance(result)
        state.raise_if_too_many_skipped(result, 0.04)
    state.advance(skipped)
    with pytest.raises(NonFiniteError, match=r"4, 5, 6.*--matrix-lr=0\.02"):
        state.raise_if_too_many_skipped(skipped, 0.04)


# ---- the step ----


class Batches:
    """Stands in for a Prefetcher: the same batch again and again."""

    error = next = None

    def __init__(self, vocab_size):
        tokens = torch.randint(vocab_size, (4, 17), generator=torch.Generator().manual_seed(1))
        self.batch = SimpleNamespace(inputs=tokens[:, :-1], targets=tokens[:, 1:], sequence_hash=2**63 + 5)

    def take(self):
        return self.batch

    def epoch(self, batch):
        return 3


@pytest.fixture
def step():
    """A TrainStep of a tiny model, two micro-steps of 64 tokens."""
    model = checkpoint.build_model(GPTConfig(50, 16, 1, 2, 2, 8, bigram_rows=11), "cpu")
    model.init_weights(0)
    optimizers = optim.build_optimizers(model.parameters_by_role(), RATES, 0.0, torch.float32, ALONE)
    return TrainStep(model, optimizers, ALONE, SimpleNamespace(total_batch_size=128, grad_accum_steps=2), grad_clip=1.0)


SCHEDULE = RECIPE.at(0.3, 2)
RUNNING = SimpleNamespace(requested=False)


def test_a_step_reports_what_its_batches_were_and_lowers_their_loss(step):
    batches = Batches(50)
    first = step(batches, SCHEDULE, RUNNING)
    with torch.no_grad():
        expected = step.model(batches.batch.inputs, batches.batch.targets).item()
    second = step(batches, SCHEDULE, SimpleNamespace(requested=True))
    assert (first.tokens, first.epoch, first.data_hash) == (128, 3, 2 * (2**63 + 5) % 2**64)
    assert (first.stop_requested, second.stop_requested) == (False, True)
    assert second.loss == pytest.approx(expected, rel=1e-6)
    assert second.loss < first.loss
    assert all(parameter.grad is None for parameter in step.parameters)
    assert step.state()["updates"] == 2


# ---- time ----


@pytest.fixture
def budget(monkeypatch):
    monkeypatch.setattr(hardware, "seconds_since_start", lambda: 19.0)
    return TimeBudget(2.0, 0, 0, 0.0, 1.0, ALONE, [].append)


def test_a_timed_run_is_estimated_before_its_first_step_and_corrected_once_after_a_quarter(budget):
    state = TrainState(num_steps=7)
    assert budget.typical_seconds == math.inf
    assert budget.step_limit_seconds == guard.SLOW_SECONDS
    budget.estimate(state)
    assert state.num_steps == 80  # 100 s of 1.25 s each
    for _ in range(20):
        budget.refit(state)
        assert not state.horizon_fixed
        state.advance(RESULT)
        budget.add(RESULT, 64)
        budget.estimate(state)
    budget.refit(state)
    assert (state.num_steps, state.horizon_fixed) == (220, True)  # 100 s of 0.5 s each, from step 20
    assert state.progress(21) == pytest.approx((19.5 + 0.75 / 200 * 80 * 0.5 + 0.125) / 80, abs=0.01)
    budget.refit(replace(state, step=100))
    assert len(budget.say.__self__) == 1

    not_timed = TrainState(num_steps=7, horizon_fixed=True)
    budget.refit(not_timed)
    assert not_timed == TrainState(num_steps=7, horizon_fixed=True)


def test_smaller_batches_count_only_until_there_is_a_full_one(budget):
    for tokens in (16, 64, 16):
        budget.add(replace(RESULT, tokens=tokens), 64)
    assert list(budget.step_seconds) == [2.0, 0.5]
    assert budget.step_limit_seconds == trainer.STEP_SECONDS


# ---- checkpoints ----


@pytest.mark.parametrize(
    ("step", "evals_step", "best_step", "final", "due"),
    [
        (0, 0, -1, False, False),  # before the first step there is nothing to save
        (5, 5, -1, False, True),  # scheduled
        (4, 4, 4, False, True),  # the best
        (4, 0, -1, True, True),  # the last, or a stop
        (3, 3, -1, True, False),  # saved already
        (3, 2, -1, False, True),  # evaluations that a stop had left out were made up
    ],
)
def test_when_a_checkpoint_is_due(tmp_path, step, evals_step, best_step, final, due):
    manager = CheckpointManager(tmp_path, ALONE, save_every=5)
    manager.saved = TrainState() if step == 0 else TrainState(step=3, evals_step=3)
    state = TrainState(num_steps=9, step=step, evals_step=evals_step, best_step=best_step)
    assert manager.due(state, final) is due


@pytest.mark.parametrize(
    ("honest", "wrong"),
    [
        (TrainState(), {"step": True}),
        (TrainState(), {"seconds": math.inf}),
        (TrainState(), {"other": 1}),
        (RECIPE, {"final_lr_frac": -9.0}),
        (RECIPE, {"schedule": "none"}),
        (CONFIG, {"softcap": 500.0}),
        (CONFIG, {"rope_base": -5.0}),
        (CONFIG, {"num_layers": 0}),
        (CONFIG, {"plain": True, "bigram_rows": 9}),
    ],
    ids=str,
)
def test_what_a_checkpoint_holds_is_read_only_with_the_types_and_ranges_it_should_have(honest, wrong):
    kind = type(honest)
    assert parsed(kind, asdict(honest)) == honest
    for value in ({**asdict(honest), **wrong}, None):
        with pytest.raises(CheckpointError, match=f"no valid {kind.__name__}"):
            parsed(kind, value)
