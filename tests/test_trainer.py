"""The parts of the training loop, each without the others: state, step, time, checkpoints, evaluations."""

import contextlib
import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ALONE

from nanotrain import checkpoint, guard, hardware, loss_eval, optim, recipe, trainer
from nanotrain.checkpoint import CheckpointManager, parsed
from nanotrain.errors import CheckpointError, NonFiniteError
from nanotrain.evals import Evals, EvalSettings
from nanotrain.gpt import GPTConfig
from nanotrain.store import Store
from nanotrain.trainer import StepResult, TimeBudget, TrainState, TrainStep

RESULT = StepResult(2.0, 1.0, 7, 64, 0, stop_requested=False, seconds=0.5)
RECIPE = recipe.Recipe(0.04, 0.3, 0.005, 0.05, 0.0, 0.0, "wsd", 0.1, 0.5, 0.0, False, 0.85, 0.95, 0.9, 0.3)
CONFIG = GPTConfig(50, 16, 1, 2, 2, 8)
RATES = {"matrix": 0.02, "embedding": 0.2, "unembedding": 0.004, "scalar": 0.04}


class Events(list):
    """Stands in for a MetricLogger."""

    wandb_id = None

    def event(self, text):
        self.append(text)


# ---- the state ----


def test_a_step_counts_and_one_without_an_update_leaves_its_loss_out():
    state = TrainState(num_steps=9)
    state.advance(RESULT)
    for result in (replace(RESULT, skipped="loss nan"), replace(RESULT, skipped="inf", scale_overflow=True)):
        assert math.isnan(state.advance(result))
    assert (state.step, state.recent_losses, state.skipped_steps, state.skipped_recently) == (3, [2.0], 2, [2])


def test_three_steps_in_a_row_without_an_update_end_the_run_and_float16_may_look_for_its_scale():
    state, skipped = TrainState(num_steps=9), replace(RESULT, skipped="loss nan")
    for result in (*[replace(skipped, scale_overflow=True)] * 3, skipped, skipped):
        state.advance(result)
        state.raise_if_too_many_skipped(result, 0.04)
    state.advance(skipped)
    with pytest.raises(NonFiniteError, match=r"4, 5, 6.*--matrix-lr=0\.02"):
        state.raise_if_too_many_skipped(skipped, 0.04)


def test_a_changed_horizon_keeps_the_fraction_that_is_done():
    plan = SimpleNamespace(num_steps=100, tokens=6400)
    state = TrainState(num_steps=50, step=25)
    state.set_horizon(recipe.Horizon(target_flops=1.0), plan, tokens=1600, batch_ramp=False)
    assert (state.num_steps, state.corrected_progress, state.horizon_fixed) == (100, 0.25, True)
    state.set_horizon(recipe.Horizon(target_minutes=1.0), plan, tokens=1600, batch_ramp=False)
    assert state.horizon_fixed is False


# ---- the step ----


class Batches:
    """Stands in for a Prefetcher: the same batch again and again."""

    def __init__(self, vocab_size, error=None):
        tokens = torch.randint(vocab_size, (4, 17), generator=torch.Generator().manual_seed(1))
        self.batch = SimpleNamespace(inputs=tokens[:, :-1], targets=tokens[:, 1:], sequence_hash=2**63 + 5)
        self.error, self.rewound = error, False

    def begin_step(self):
        self.rewound = False

    def take(self):
        return self.batch

    def epoch(self, batch):
        return 3

    def rewind(self):
        self.rewound = True


@pytest.fixture
def step():
    """A TrainStep of a tiny model, two micro-steps of 64 tokens."""
    model = checkpoint.build_model(GPTConfig(50, 16, 1, 2, 2, 8, bigram_rows=11), "cpu")
    model.init_weights(0)
    optimizers = optim.build_optimizers(model.parameters_by_role(), RATES, 0.0, torch.float32, ALONE)
    return TrainStep(model, optimizers, ALONE, SimpleNamespace(total_batch_size=128, grad_accum_steps=2), grad_clip=1.0)


def weights(step):
    return {name: tensor.clone() for name, tensor in step.model.state_dict().items()}


def equal(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


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


def test_a_step_with_a_data_error_updates_nothing_and_goes_back_to_its_first_batch(step):
    before, batches = weights(step), Batches(50, error=OSError())
    result = step(batches, SCHEDULE, RUNNING)
    assert (result.data_failed, batches.rewound) == (True, True)
    assert equal(before, weights(step))


def test_a_step_that_is_not_finite_updates_nothing_and_names_the_parameter(step):
    with torch.no_grad():
        step.model.lm_head.weight[0, 0] = math.nan
    before = {name: tensor for name, tensor in weights(step).items() if name != "lm_head.weight"}
    result = step(Batches(50), SCHEDULE, RUNNING)
    assert result.skipped.partition("bad gradient: ")[2] in before
    assert equal(before, weights(step))
    assert step.state()["updates"] == 0


# ---- time ----


@pytest.fixture
def budget(monkeypatch):
    monkeypatch.setattr(hardware, "seconds_since_start", lambda: 19.0)
    return TimeBudget(2.0, 0, 0, 0.0, 1.0, ALONE, Events().append)


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


def test_a_save_that_failed_is_made_up_before_a_data_error(tmp_path, monkeypatch, step):
    class Loader(Batches):
        def state(self, dist):
            return {"next_sequence": 8, "streams": {}}

        def raise_error(self):
            raise CheckpointError("the data")

    full, save = [True], checkpoint.save

    def saving(*arguments):
        if full:
            raise OSError(28, "No space left on device")
        return save(*arguments)

    monkeypatch.setattr(checkpoint, "save", saving)
    state, manager, events = TrainState(num_steps=9, step=5), CheckpointManager(tmp_path, ALONE, save_every=5), Events()
    manager.begin(TrainState(), {"recipe": asdict(RECIPE)}, events, lambda seconds: None)
    manager.owner = None
    manager.save(state, step, Loader(50))
    assert Store(tmp_path).steps() == []
    full.clear()
    with pytest.raises(CheckpointError, match="the data"):
        manager.save_then_raise(state, step, Loader(50))
    assert Store(tmp_path).steps() == [5]
    assert ["could not be written" in event for event in events] == [True, False]


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


# ---- evaluations ----


def test_evaluations_run_once_when_due_and_their_patience_ends_the_run(monkeypatch):
    measured = iter([3.0, 2.0, 2.5, 2.25])
    monkeypatch.setattr(loss_eval, "bits_per_byte", lambda *arguments: next(measured))
    stats = SimpleNamespace(add=None, result=lambda dist: {})
    monkeypatch.setattr(loss_eval, "TokenLossStats", lambda tokenizer: stats)
    metrics, rows, beats = Events(), [], []
    metrics.record = lambda step, row: rows.append((step, row["val/bpb"]))
    metrics.evaluation = lambda step, **parts: None
    metrics.progress = lambda what, total: contextlib.nullcontext()
    tokenizer = SimpleNamespace(token_bytes=lambda: None)
    settings = EvalSettings(2, 0, 0, batch_size=4, patience=2, min_delta=0.0)
    model = SimpleNamespace(recompute_blocks=False)
    evals = Evals(settings, model, tokenizer, [None] * 4, None, ALONE, metrics, beats.append)
    state = TrainState(num_steps=10)
    for step in (0, 1, 2, 2, 3, 4, 6):
        state.step = step
        evals.run(state)
    assert rows == [(0, 3.0), (2, 2.0), (4, 2.5), (6, 2.25)]
    assert (state.best_step, state.best_bpb, state.val_bpb) == (2, 2.0, 2.25)
    assert (state.is_finished, state.num_steps, state.evals_step) == (True, 6, 6)
    assert beats
