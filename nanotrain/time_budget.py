"""How long steps take, and from that the number of steps of a run that has a number of minutes."""

import math
import statistics
from collections import deque

from nanotrain import guard, hardware
from nanotrain.dist import DistContext
from nanotrain.metrics import MetricLogger
from nanotrain.trainer import StepResult, TrainState

REFIT_PROGRESS = 0.25  # of a timed run, where its number of steps is corrected once
STEP_PER_PASSES = 1.25  # until steps have been timed: seconds of a step, in forward and backward passes
SLOWER_LATER, LAST_SAVE_SECONDS = 1.1, 1.0  # what a timed run allows for its last evaluations and its last save
STEP_SECONDS, SLOW_STEP_FACTOR = 120.0, 20.0  # a step may take the longer of this and so many median steps


class TimeBudget:
    """Times of steps, and what follows from them."""

    def __init__(
        self,
        minutes: float,
        eval_every: int,
        core_every: int,
        evaluations_after: float,
        pass_seconds: float,
        dist: DistContext,
        metrics: MetricLogger,
    ):
        """minutes: from process start to the last save; 0: not timed. eval_every, core_every: steps between
        evaluations; 0: never. evaluations_after: the number of evaluations for which time must be left after the run.
        pass_seconds: of a step's forward and backward passes, measured before the first step.
        """
        self.minutes, self.evaluations_after, self.dist, self.metrics = minutes, evaluations_after, dist, metrics
        self.eval_every, self.core_every = eval_every, core_every
        self.first_step_seconds = STEP_PER_PASSES * pass_seconds
        self.step_seconds: deque[float] = deque(maxlen=200)

    def add(self, result: StepResult, full_batch_tokens: int) -> None:
        """Note the time of a step; of smaller batches only the first counts, in proportion."""
        if result.tokens == full_batch_tokens or not self.step_seconds:
            self.step_seconds.append(result.seconds * full_batch_tokens / result.tokens)

    @property
    def typical_seconds(self) -> float:
        """Median seconds of the last 200 steps with a full batch; infinite before the first."""
        return statistics.median(self.step_seconds) if self.step_seconds else math.inf

    @property
    def step_limit_seconds(self) -> float:
        """Seconds after which a step counts as hung."""
        return min(max(STEP_SECONDS, SLOW_STEP_FACTOR * self.typical_seconds), guard.SLOW_SECONDS)

    def seconds_left(self, state: TrainState) -> float:
        """Seconds of training until the last step."""
        return self.typical_seconds * (state.num_steps - state.step)

    def steps_in_time(self, state: TrainState, step_seconds: float) -> int:
        """The number of steps with which the run ends in time, evaluations and last save included."""
        after = (SLOWER_LATER + self.evaluations_after) * state.evaluation_seconds
        after += SLOWER_LATER * state.core_seconds + LAST_SAVE_SECONDS
        left = self.minutes * 60 - state.seconds - hardware.seconds_since_start() - after
        each = step_seconds + (state.evaluation_seconds / self.eval_every if self.eval_every else 0)
        each += state.core_seconds / self.core_every if self.core_every else 0
        return state.step + max(round(left / each), 1)

    def estimate(self, state: TrainState) -> None:
        """Before the first step of a timed run, once an evaluation has been timed: estimate num_steps."""
        if not state.horizon_fixed and state.step == state.corrected_step and not self.step_seconds:
            state.num_steps = self.dist.broadcast_object(self.steps_in_time(state, self.first_step_seconds))

    def refit(self, state: TrainState) -> None:
        """After a quarter of the steps of a timed run: correct num_steps, for good."""
        begun, planned = state.step - state.corrected_step, state.num_steps - state.corrected_step
        if not state.horizon_fixed and begun >= REFIT_PROGRESS * planned:
            progress = state.progress(state.step)
            state.correct(self.dist.broadcast_object(self.steps_in_time(state, self.typical_seconds)), progress)
            state.horizon_fixed = True
            milliseconds = 1000 * self.typical_seconds
            self.metrics.event(f"{milliseconds:.0f} ms a step: {state.num_steps} steps end in time")
