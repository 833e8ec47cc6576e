"""Evaluations during training: bits per byte, tasks, samples, and early stopping."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np

from nanotrain import core_eval, guard, loss_eval, warmup
from nanotrain.core_bundle import Bundle
from nanotrain.dist import DistContext
from nanotrain.engine import samples
from nanotrain.gpt import GPT
from nanotrain.metrics import MetricLogger
from nanotrain.terminal import progress_bar
from nanotrain.tokenizer import BPETokenizer
from nanotrain.trainer import TrainState

SAMPLE_TOKENS = 48  # tokens generated per sample
BATCH_SIZE = 16  # sequences per forward pass, unless --device-batch-size is set


@dataclass(frozen=True)
class Evals:
    """The evaluations of one run. Results go to its TrainState and its metrics."""

    cfg: SimpleNamespace  # settings of scripts.base_train
    model: GPT
    tokenizer: BPETokenizer
    sequences: np.ndarray | None  # (N, T + 1) validation sequences
    bundle: Bundle | None
    dist: DistContext
    metrics: MetricLogger
    beat: Callable[[float], None]  # `Watchdog.beat`

    def run(self, state: TrainState) -> None:
        """Run the evaluations due after this step, once. Early stopping makes this step the last one."""
        if state.evals_step == state.step:
            return
        self.beat(guard.SLOW_SECONDS)
        # Eager, because every new number of sequences or tokens would be compiled separately.
        with warmup.memory_limit(self.batch_size, self.model), self.model.eagerly():
            if self._due(self.cfg.EVAL_EVERY, state):
                self.bits_per_byte(state)
            if self.bundle and self._due(self.cfg.CORE_METRIC_EVERY, state):
                self.core(state)
            if self._due(self.cfg.SAMPLE_EVERY, state) and state.step and self.dist.is_rank0:
                self.sample(state)
        state.evals_step = state.step

    def _due(self, every, state):
        return every > 0 and (state.is_finished or state.step % every == 0)

    @property
    def batch_size(self) -> int:
        return self.cfg.DEVICE_BATCH_SIZE or BATCH_SIZE

    def bits_per_byte(self, state: TrainState) -> None:
        """Measure bits per byte on the validation sequences, and end the run if its patience is exhausted."""
        begin, stats = time.monotonic(), loss_eval.TokenLossStats(self.tokenizer)
        windows, token_bytes = loss_eval.packed_windows(self.sequences), self.tokenizer.token_bytes()
        with self._progress("evaluation", len(windows)) as done:
            arguments = (self.model, windows, token_bytes, self.dist, self.batch_size, done, stats.add)
            val_bpb = loss_eval.bits_per_byte(*arguments)
        is_finite = math.isfinite(val_bpb)
        state.val_bpb = val_bpb if is_finite else None  # checkpoints hold no NaN
        state.evaluated_step = state.step
        self.metrics.record(state.step, {"val/bpb": val_bpb})
        self.metrics.evaluation(state.step, val_bpb=state.val_bpb, **stats.result(self.dist))
        best = ""
        if state.step and is_finite and (state.best_bpb is None or val_bpb < state.best_bpb):  # step 0 is not saved
            state.best_bpb, state.best_step, best = val_bpb, state.step, ", the best so far"
        if is_finite and (state.goal_bpb is None or val_bpb < state.goal_bpb):
            state.goal_bpb, state.stale_evaluations = val_bpb - self.cfg.EARLY_STOP_MIN_DELTA, 0
        else:
            state.stale_evaluations += 1
        self.metrics.event(f"step {state.step}: val bpb {val_bpb:.4f}{best}")
        state.evaluation_seconds, stale = time.monotonic() - begin, state.stale_evaluations
        if not state.is_finished and 0 < self.cfg.EARLY_STOP_PATIENCE <= stale and state.step:
            self.metrics.event(f"step {state.step}: no improvement in {stale} evaluations, stopping early")
            state.num_steps, state.horizon_fixed = state.step, True

    def core(self, state: TrainState) -> None:
        """Score the tasks of the bundle; at step 0 only one item, to check that it works and to estimate the time."""
        begin, bundle, batch_size = time.monotonic(), self.bundle, self.batch_size
        num_items = sum(len(task.items) for task in bundle.tasks)
        if not state.step:
            task = bundle.tasks[0]
            bundle = replace(bundle, tasks=[replace(task, items=task.items[:1], num_shots=0)])
            core_eval.evaluate(self.model, self.tokenizer, bundle, self.dist, batch_size)
            state.core_seconds = (time.monotonic() - begin) * num_items / self.dist.world_size
            return
        with self._progress("tasks", num_items) as done:
            result = core_eval.evaluate(self.model, self.tokenizer, bundle, self.dist, batch_size, done)
        centered = {f"core/{label}": task["centered"] for label, task in result["tasks"].items()}
        self.metrics.record(state.step, {"core/core_metric": result["core_metric"], **centered})
        self.metrics.evaluation(state.step, core=result)
        self.metrics.event(f"step {state.step}: {core_eval.headline(result)}")
        state.core_seconds = time.monotonic() - begin

    def sample(self, state: TrainState) -> None:
        """Print continuations of a few prompts."""
        found = list(samples(self.model, self.tokenizer, SAMPLE_TOKENS))
        for prompt, text in found:
            self.metrics.event(f"sample: {prompt}{text}")
        self.metrics.evaluation(state.step, samples=[{"prompt": prompt, "text": text} for prompt, text in found])

    @contextlib.contextmanager
    def _progress(self, what, count) -> Iterator[Callable[[int], None]]:
        """Show a bar for this rank's share of `count` items; yields a function to call with each number done."""
        with progress_bar(None, what, -(-count // self.dist.world_size), self.dist.is_rank0) as bar:
            yield lambda number: (self.beat(guard.SLOW_SECONDS), bar.update(number))
