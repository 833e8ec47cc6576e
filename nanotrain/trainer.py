"""Parts of the training loop: its state, its optimizer step, and the number of steps that fit into the time."""

import bisect
import itertools
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.parallel import DistributedDataParallel

from nanotrain import guard, hardware, optim
from nanotrain.dataloader import Prefetcher
from nanotrain.dist import DistContext
from nanotrain.errors import NonFiniteError
from nanotrain.gpt import GPT
from nanotrain.optim import ShardedOptimizer
from nanotrain.recipe import Horizon, Plan, StepSchedule, progress_at_step

CORRECTIONS = 20  # intervals of progress after which a timed run corrects its number of steps; the last has none
STEP_PER_PASSES = 1.25  # estimate before any step is timed: step time over that of its forward and backward passes
SLOWER_LATER, LAST_SAVE_SECONDS = 1.1, 1.0  # kept free in a timed run: last evaluations (factor), last save
STEP_SECONDS, SLOW_STEP_FACTOR = 120.0, 20.0  # time limit of a step: the longer of this and this many typical steps


@dataclass
class TrainState:
    """Everything that changes during a run besides tensors and loader state. Saved in every checkpoint."""

    num_steps: int = 0
    horizon_fixed: bool = False  # False while a timed run may still correct num_steps
    step: int = 0  # finished optimizer steps
    corrected_step: int = 0  # step of the last correction of num_steps
    corrected_progress: float = 0.0  # progress at that step, in [0, 1]
    seconds: float = 0.0  # run time of earlier processes
    skipped_steps: int = 0
    skipped_recently: list[int] = field(default_factory=list)
    recent_losses: list[float] = field(default_factory=list)  # of steps with an update
    val_bpb: float | None = None  # result of the last evaluation
    evaluated_step: int = -1  # step of the last evaluation
    evals_step: int = -1  # last step at which all due evaluations were done: loss, tasks, samples
    evaluation_seconds: float = 0.0
    core_seconds: float = 0.0
    best_bpb: float | None = None
    best_step: int = -1
    goal_bpb: float | None = None  # for early stopping: bits per byte that an evaluation must beat
    stale_evaluations: int = 0  # consecutive evaluations that did not beat it
    wandb_id: str | None = None

    @property
    def is_finished(self) -> bool:
        return self.step >= self.num_steps

    def progress(self, step: int) -> float:
        """Progress in (0, 1) in the middle of a step to come."""
        return progress_at_step(step, self.num_steps, self.corrected_step, self.corrected_progress)

    def set_horizon(self, horizon: Horizon, plan: Plan, tokens: int, batch_ramp: bool) -> None:
        """Set the horizon of a new run, or a new horizon after `tokens`: the rest of its `plan` remains to be done."""
        progress = horizon.progress_after(self.step, self.seconds, tokens, plan, batch_ramp)
        steps_left = max(round((1 - progress) * plan.num_steps), int(horizon.is_timed))
        self.correct(self.step + steps_left, progress)
        self.horizon_fixed = not horizon.is_timed

    def correct(self, num_steps: int, progress: float) -> None:
        """Set the number of steps and spread the remaining progress evenly over the remaining ones."""
        self.num_steps, self.corrected_step, self.corrected_progress = num_steps, self.step, progress

    def advance(self, result: "StepResult") -> float:
        """Count a finished step. Returns the standard deviations of its loss above recent ones, NaN if skipped."""
        self.step += 1
        if not result.skipped:
            deviations = guard.deviations(self.recent_losses, result.loss)
            self.recent_losses = [*self.recent_losses, result.loss][-guard.LOSS_WINDOW :]
            return deviations
        self.skipped_steps += 1
        if not result.scale_overflow:  # float16 starts with a few overflows, until its scale is found
            self.skipped_recently = [*self.skipped_recently, self.step][-guard.NON_FINITE_NEARBY :]
        return math.nan

    def raise_if_too_many_skipped(self, result: "StepResult", matrix_lr: float) -> None:
        """Raise NonFiniteError after too many steps without an update; see `guard.too_many_skipped`."""
        if result.skipped and not result.scale_overflow and guard.too_many_skipped(self.skipped_recently, self.step):
            found = f"{result.skipped}; no updates at steps {', '.join(map(str, self.skipped_recently))}"
            fix = f"lower the learning rates (--matrix-lr={matrix_lr / 2:g}) or use --dtype=float32"
            raise NonFiniteError(f"step {self.step}: {found}. The last checkpoint is intact: {fix}")


@dataclass(frozen=True)
class StepResult:
    """Outcome of an optimizer step. Everything but times and memory is equal on all ranks."""

    loss: float  # nats per token, mean over micro-steps and ranks
    grad_norm: float
    data_hash: int  # sum of the sequence hashes mod 2^64
    tokens: int
    epoch: int
    stop_requested: bool  # on any rank
    data_failed: bool = False  # on any rank; the step made no update and does not count
    skipped: str = ""  # reason, if there was no update
    scale_overflow: bool = False  # a float16 overflow at a loss scale that can still be lowered
    seconds: float = 0.0
    loader_seconds: float = 0.0  # waiting for data
    optimizer_seconds: float | None = None  # None if the device only queues the update
    peak_memory_bytes: int = 0


class TrainStep:
    """An optimizer step over all ranks: micro-steps, one reduction of the status, update."""

    def __init__(
        self,
        model: GPT,
        optimizers: Sequence[ShardedOptimizer],
        dist: DistContext,
        plan: Plan,
        grad_clip: float = 0.0,
        saved: dict | None = None,
    ):
        """grad_clip: largest gradient norm; 0: off. saved: `state()` in the checkpoint of a resumed run."""
        self.model, self.optimizers, self.dist, self.grad_clip = model, optimizers, dist, grad_clip
        self.tokens_per_micro_step = plan.total_batch_size // plan.grad_accum_steps
        self.parameters = list(model.parameters())
        self.scaler = torch.amp.GradScaler(dist.device.type, enabled=dist.dtype == torch.float16)
        self.wrapped_model = model
        if dist.world_size > 1:
            ignored = list(model.parameters_by_role().get("bigram_embedding", {}))  # sparse: `optim.collect_gradients`
            ignored += [name for name, _ in model.named_buffers()]  # constants, computed on every rank
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
            self.wrapped_model = DistributedDataParallel(model, gradient_as_bucket_view=True, init_sync=False)
        if saved:
            for optimizer in optimizers:
                optimizer.updates = saved["updates"]
            if saved["scaler"]:
                self.scaler.load_state_dict(saved["scaler"])

    def state(self) -> dict:
        """State for resuming, besides weights and optimizer tensors."""
        return {"updates": self.optimizers[0].updates, "scaler": self.scaler.state_dict()}

    def __call__(self, batches: Prefetcher, schedule: StepSchedule, stop: guard.StopRequest) -> StepResult:
        """Train on the next batches. There is no update if loss or gradients are not finite on any rank."""
        begin, first_batch = time.monotonic(), batches.next
        optim.set_schedule(self.optimizers, schedule.lr_factor, schedule.momentum, schedule.weight_decay)
        loss, data_hash, epoch, loader_seconds = self._backward(batches, schedule.micro_steps)
        gradients = optim.collect_gradients(self.parameters, self.dist)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)  # after the reduction, so that all ranks see the same overflow
        norm = torch.nn.utils.get_total_norm(gradients)

        # One reduction and one host read for all status. float64 adds the 32-bit halves of the hashes exactly.
        halves = [data_hash % 2**32, (data_hash >> 32) % 2**32]
        status = self.dist.all_reduce_sum([loss, norm, stop.requested, batches.error is not None, *halves])
        mean_loss, grad_norm = (total / self.dist.world_size for total in status[:2])
        found = {
            "loss": mean_loss,
            "grad_norm": grad_norm,
            "data_hash": (int(status[4]) + (int(status[5]) << 32)) % 2**64,
            "tokens": self.tokens_per_micro_step * schedule.micro_steps,
            "epoch": epoch,
            "stop_requested": status[2] > 0,
        }
        if status[3]:
            batches.next = first_batch  # the step will be repeated
            return StepResult(**found, data_failed=True)
        update_begin = time.perf_counter()
        if math.isfinite(mean_loss) and math.isfinite(grad_norm):
            if self.grad_clip:
                torch._foreach_mul_(gradients, (self.grad_clip / (norm + 1e-6)).clamp(max=1.0))
            optim.step(self.optimizers)  # not through the scaler: its check for overflow would repeat that of the norm
        else:
            found["skipped"] = self._why_skipped(loss)
            found["scale_overflow"] = self.scaler.is_enabled() and self.scaler.get_scale() > 1
        self.scaler.update()  # no-op unless the dtype is float16
        for parameter in self.parameters:
            if self.dist.world_size == 1 or parameter.grad.is_sparse:
                parameter.grad = None
            else:
                parameter.grad.zero_()  # a view of DDP's bucket, which must stay
        # A GPU may still be updating, which counts as time of the next step: waiting here would leave it idle.
        return StepResult(
            **found,
            seconds=time.monotonic() - begin,
            loader_seconds=loader_seconds,
            optimizer_seconds=time.perf_counter() - update_begin if self.dist.device.type == "cpu" else None,
            peak_memory_bytes=hardware.peak_memory_bytes(self.dist.device),
        )

    def _backward(self, batches, micro_steps):
        """(mean loss () on the device, data hash, epoch, seconds spent waiting for data) of this rank's micro-steps."""
        loss_sum, data_hash, waited = torch.zeros((), device=self.dist.device), 0, 0.0
        for micro_step in range(micro_steps):
            begin = time.perf_counter()
            batch = batches.take()
            waited += time.perf_counter() - begin
            data_hash += batch.sequence_hash
            # Set before the forward pass, in which DDP decides whether the backward pass averages over ranks.
            self.wrapped_model.require_backward_grad_sync = micro_step == micro_steps - 1
            with self.dist.autocast():
                loss = self.wrapped_model(batch.inputs, batch.targets) / micro_steps
            self.scaler.scale(loss).backward()
            loss_sum += loss.detach()
        return loss_sum, data_hash, batches.epoch(batch), waited

    def _why_skipped(self, loss):
        losses = self.dist.all_gather_objects(loss.item())
        named = self.model.named_parameters()
        bad = next((name for name, p in named if p.grad is not None and not p.grad.sum().isfinite()), "none")
        return f"loss {', '.join(map(str, losses))} by rank, first parameter with a non-finite gradient: {bad}"


@dataclass
class TimeBudget:
    """Measured step times, and the number of steps and time limits that follow from them."""

    minutes: float  # from process start to the last save; 0: not timed
    eval_every: int  # steps between evaluations; 0: never
    core_every: int  # steps between evaluations of the tasks; 0: never
    evaluations_after: float  # number of evaluations to leave time for after the run
    pass_seconds: float  # forward and backward passes of a step, measured before the first step
    dist: DistContext
    chosen: dict[str, int]  # {step: num_steps} of each correction so far, repeated when steps are computed again
    keep: Callable[[dict[str, int]], bool]  # saves `chosen` durably; returns False if that failed
    step_seconds: deque = field(default_factory=lambda: deque(maxlen=1000))
    evaluated_step: int = -1  # step of the last evaluation
    evaluation_steps: float = 0.0  # its time, over the time of a step then

    def add(self, result: StepResult, full_batch_tokens: int) -> None:
        """Record the time of a step. Of smaller batches only the first one counts, scaled to a full batch."""
        if result.tokens == full_batch_tokens or not self.step_seconds:
            self.step_seconds.append(result.seconds * full_batch_tokens / result.tokens)

    @property
    def typical_seconds(self) -> float:
        """Mean seconds per step with a full batch, over the last third of the recorded time; infinite without steps."""
        latest = list(itertools.accumulate(reversed(self.step_seconds)))
        place = bisect.bisect_left(latest, sum(self.step_seconds) / 3)
        return latest[place] / (place + 1) if latest else math.inf

    @property
    def step_limit_seconds(self) -> float:
        """Time after which a step counts as hung."""
        return min(max(STEP_SECONDS, SLOW_STEP_FACTOR * self.typical_seconds), guard.SLOW_SECONDS)

    def seconds_left(self, state: TrainState) -> float:
        """Estimated seconds for the remaining steps."""
        return self.typical_seconds * (state.num_steps - state.step)

    def steps_in_time(self, state: TrainState, step_seconds: float, progress: float) -> int:
        """Number of steps that fit into the time, together with evaluations and the last save."""
        # If steps have become faster since the last evaluation, another program slowed that one, too.
        evaluation_seconds = min(state.evaluation_seconds, self.evaluation_steps * step_seconds)
        after = (SLOWER_LATER + self.evaluations_after) * evaluation_seconds
        after += SLOWER_LATER * state.core_seconds + LAST_SAVE_SECONDS
        left = self.minutes * 60 - state.seconds - hardware.seconds_since_start()
        # In the first half, do not let the estimate from a slow first evaluation end the run.
        left -= after if progress >= 0.5 else min(after, left / 2)
        each = step_seconds + (evaluation_seconds / self.eval_every if self.eval_every else 0)
        each += state.core_seconds / self.core_every if self.core_every else 0
        return state.step + max(round(left / each), 0 if self.step_seconds else 1)  # at least one step in all

    def correct(self, state: TrainState) -> None:
        """Correct num_steps of a timed run if due: before its first step and then after each of CORRECTIONS intervals.
        The choice is saved before it takes effect, so that steps repeated after a crash have the same learning rates.
        """
        step, before = str(state.step), state.corrected_progress
        untimed = STEP_PER_PASSES * self.pass_seconds
        if state.evaluated_step != self.evaluated_step:
            latest = list(self.step_seconds)[-9:] or [untimed]
            self.evaluated_step = state.evaluated_step
            self.evaluation_steps = state.evaluation_seconds / statistics.median(latest)
        progress = before if state.step == state.corrected_step else state.progress(state.step)
        is_due = state.step == state.corrected_step or int(CORRECTIONS * progress) > int(CORRECTIONS * before)
        if state.horizon_fixed or not is_due:
            return
        if step not in self.chosen:
            seconds = self.typical_seconds if self.step_seconds else untimed
            chosen = {**self.chosen, step: self.dist.broadcast_object(self.steps_in_time(state, seconds, progress))}
            if not self.dist.on_rank0(lambda: self.keep(chosen)):
                return
            self.chosen = chosen
        state.correct(self.chosen[step], progress)
        state.horizon_fixed = progress >= 1 - 1 / CORRECTIONS
