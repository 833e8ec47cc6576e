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
    return TimeBudget(2.0, 0, 0, 0.0, 1.0, ALONE, {}, lambda chosen: True)


def run_by_minutes(
    monkeypatch, minutes, slower=1, begin=0.0, end=0.0, chosen=None, stop_at=math.inf, keeps=True, evaluation=0.0
):
    """(state, seconds, {step: num_steps}) of a timed run with steps of 0.2 s and evaluations of `evaluation` seconds,
    one before the first step and nine at the end, all `slower` times as long from begin to end.
    """
    now = [20.0]
    monkeypatch.setattr(hardware, "seconds_since_start", lambda: now[0])

    def spend(seconds):
        seconds *= slower if begin <= now[0] < end else 1
        now[0] += seconds
        return seconds

    state = TrainState(num_steps=7, evaluated_step=0, evaluation_seconds=spend(evaluation))
    passes = 0.16 * (slower if begin <= now[0] < end else 1)
    budget = TimeBudget(minutes, 0, 0, 8.0, passes, ALONE, chosen or {}, lambda found: keeps)
    while not state.is_finished and state.step < stop_at:
        if state.step == state.corrected_step:
            budget.correct(state)
        seconds = spend(0.2)
        state.advance(replace(RESULT, seconds=seconds))
        budget.add(replace(RESULT, seconds=seconds), RESULT.tokens)
        budget.correct(state)
    for _ in range(9):
        spend(evaluation)
    return state, now[0] + trainer.LAST_SAVE_SECONDS, budget.chosen


@pytest.mark.parametrize("minutes", [1.0, 1.5, 10.0])
@pytest.mark.parametrize("slower", [1, 2, 3])
@pytest.mark.parametrize("third", [0, 1, 2])
def test_a_timed_run_ends_in_time_whenever_another_program_slows_it_down(monkeypatch, minutes, slower, third):
    length = (60 * minutes - 20) / 3
    begin = 20 + third * length
    for seconds in (10, length):
        _, found, chosen = run_by_minutes(monkeypatch, minutes, slower, begin, begin + seconds)
        assert found == pytest.approx(60 * minutes, rel=0.05)
        assert len(chosen) <= trainer.CORRECTIONS


@pytest.mark.parametrize("minutes", [1.0, 1.5, 10.0])
@pytest.mark.parametrize("slower", [1, 2, 3, 4])
@pytest.mark.parametrize("third", [0, 1])
def test_a_slow_first_evaluation_or_slow_steps_do_not_end_a_timed_run_early(monkeypatch, minutes, slower, third):
    length = (60 * minutes - 20) / 3
    begin = 20 + third * length
    for seconds in (10, length):
        _, found, _ = run_by_minutes(monkeypatch, minutes, slower, begin, begin + seconds, evaluation=1.2)
        assert found == pytest.approx(60 * minutes, rel=0.05)


def test_steps_computed_again_have_the_learning_rates_that_they_had(monkeypatch):
    first, _, chosen = run_by_minutes(monkeypatch, 1.0, 3, 30, 40, stop_at=120)
    again, *_ = run_by_minutes(monkeypatch, 1.0, chosen=chosen, stop_at=120)
    other, *_ = run_by_minutes(monkeypatch, 1.0, stop_at=120)
    assert again == first != other
    assert first.progress(121) > first.progress(120) > first.corrected_progress


def test_a_correction_that_cannot_be_kept_is_not_made(monkeypatch):
    state, *_ = run_by_minutes(monkeypatch, 1.0, keeps=False)
    assert (state.num_steps, state.horizon_fixed) == (7, False)


def test_a_run_that_is_not_timed_keeps_its_steps(budget):
    state = TrainState(num_steps=7, horizon_fixed=True)
    assert budget.step_limit_seconds == guard.SLOW_SECONDS
    budget.correct(state)
    assert state == TrainState(num_steps=7, horizon_fixed=True)


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
