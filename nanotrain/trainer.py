"""A run of training: its state, its optimizer step, and the number of steps that end in time."""

import math
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

CORRECTIONS = 20  # of the number of steps of a timed run, evenly over its progress; the last one is left out
STEP_PER_PASSES = 1.25  # until steps have been timed: seconds of a step, in forward and backward passes
SLOWER_LATER, LAST_SAVE_SECONDS = 1.1, 1.0  # what a timed run allows for its last evaluations and its last save
STEP_SECONDS, SLOW_STEP_FACTOR = 120.0, 20.0  # a step may take the longer of this and so many median steps


@dataclass
class TrainState:
    """What changes during a run. A checkpoint keeps all of it."""

    num_steps: int = 0
    horizon_fixed: bool = False  # False while a timed run may correct num_steps
    step: int = 0  # finished optimizer steps
    corrected_step: int = 0  # where num_steps was last corrected
    corrected_progress: float = 0.0  # progress there, in [0, 1]
    seconds: float = 0.0  # spent by earlier processes
    skipped_steps: int = 0
    skipped_recently: list[int] = field(default_factory=list)
    recent_losses: list[float] = field(default_factory=list)  # of steps with an update
    val_bpb: float | None = None  # of the last evaluation
    evaluated_step: int = -1  # step of that evaluation
    evals_step: int = -1  # last step after which everything due was evaluated: loss, tasks, samples
    evaluation_seconds: float = 0.0
    core_seconds: float = 0.0
    best_bpb: float | None = None
    best_step: int = -1
    goal_bpb: float | None = None  # what the next evaluation must beat, for early stopping
    stale_evaluations: int = 0  # consecutive ones that did not
    wandb_id: str | None = None

    @property
    def is_finished(self) -> bool:
        return self.step >= self.num_steps

    def progress(self, step: int) -> float:
        return progress_at_step(step, self.num_steps, self.corrected_step, self.corrected_progress)

    def set_horizon(self, horizon: Horizon, plan: Plan, tokens: int, batch_ramp: bool) -> None:
        """Begin with a horizon, or change to it after `tokens`: what is left of its plan is left to do."""
        progress = horizon.progress_after(self.step, self.seconds, tokens, plan, batch_ramp)
        steps_left = max(round((1 - progress) * plan.num_steps), int(horizon.is_timed))
        self.correct(self.step + steps_left, progress)
        self.horizon_fixed = not horizon.is_timed

    def correct(self, num_steps: int, progress: float) -> None:
        """Set the number of steps, and spread the remaining progress over the remaining steps."""
        self.num_steps, self.corrected_step, self.corrected_progress = num_steps, self.step, progress

    def advance(self, result: "StepResult") -> float:
        """Count a finished step. Returns how many deviations its loss is above the recent ones, NaN if skipped."""
        self.step += 1
        if not result.skipped:
            deviations = guard.deviations(self.recent_losses, result.loss)
            self.recent_losses = [*self.recent_losses, result.loss][-guard.LOSS_WINDOW :]
            return deviations
        self.skipped_steps += 1
        if not result.scale_overflow:  # float16 begins with a few of them, until the scale is found
            self.skipped_recently = [*self.skipped_recently, self.step][-guard.NON_FINITE_NEARBY :]
        return math.nan

    def raise_if_too_many_skipped(self, result: "StepResult", matrix_lr: float) -> None:
        if result.skipped and not result.scale_overflow and guard.too_many_skipped(self.skipped_recently, self.step):
            found = f"{result.skipped}; no updates at steps {', '.join(map(str, self.skipped_recently))}"
            fix = f"lower the rates (--matrix-lr={matrix_lr / 2:g}) or use --dtype=float32"
            raise NonFiniteError(f"step {self.step}: {found}. The last checkpoint is intact: {fix}")


@dataclass(frozen=True)
class StepResult:
    """What happened in an optimizer step. Everything but times and memory is the same on all ranks."""

    loss: float  # nats per token, mean over micro-steps and ranks
    grad_norm: float
    data_hash: int  # sum of the sequence hashes mod 2^64
    tokens: int
    epoch: int
    stop_requested: bool  # on any rank
    data_failed: bool = False  # on any rank; there was no update and the step does not count
    skipped: str = ""  # why there was no update
    scale_overflow: bool = False  # of float16, at a scale that can still be lowered
    seconds: float = 0.0
    loader_seconds: float = 0.0
    optimizer_seconds: float | None = None  # None where the device only queues the work
    peak_memory_bytes: int = 0


class TrainStep:
    """One optimizer step over all ranks: micro-steps, one reduction of the status, and the update."""

    def __init__(
        self,
        model: GPT,
        optimizers: Sequence[ShardedOptimizer],
        dist: DistContext,
        plan: Plan,
        grad_clip: float = 0.0,
        saved: dict | None = None,
    ):
        """grad_clip: largest gradient norm; 0: off. saved: the `state` that a resumed run goes on from."""
        self.model, self.optimizers, self.dist, self.grad_clip = model, optimizers, dist, grad_clip
        self.tokens_per_micro_step = plan.total_batch_size // plan.grad_accum_steps
        self.parameters = list(model.parameters())
        self.scaler = torch.amp.GradScaler(dist.device.type, enabled=dist.dtype == torch.float16)
        self.wrapped_model = model  # in DistributedDataParallel where there are several ranks
        if dist.world_size > 1:
            ignored = list(model.parameters_by_role().get("bigram_embedding", {}))  # its sparse gradient: optim
            ignored += [name for name, _ in model.named_buffers()]  # constants that every rank has computed
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
            self.wrapped_model = DistributedDataParallel(model, gradient_as_bucket_view=True, init_sync=False)
        if saved:
            for optimizer in optimizers:
                optimizer.updates = saved["updates"]
            if saved["scaler"]:
                self.scaler.load_state_dict(saved["scaler"])  # does nothing unless enabled

    def state(self) -> dict:
        """What a resume needs beside weights and optimizer tensors."""
        return {"updates": self.optimizers[0].updates, "scaler": self.scaler.state_dict()}

    def __call__(self, batches: Prefetcher, schedule: StepSchedule, stop: guard.StopRequest) -> StepResult:
        """Take the next batches and update the weights, unless loss or gradients are not finite on any rank."""
        begin, first_batch = time.monotonic(), batches.next
        optim.set_schedule(self.optimizers, schedule.lr_factor, schedule.momentum, schedule.weight_decay)
        loss, data_hash, epoch, loader_seconds = self._backward(batches, schedule.micro_steps)
        gradients = optim.collect_gradients(self.parameters, self.dist)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)  # after the reduction, so that every rank sees the same overflow
        norm = torch.nn.utils.get_total_norm(gradients)

        # What all ranks must know: one reduction, one read. float64 adds the 32-bit halves of the hashes exactly.
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
            batches.next = first_batch  # this step does not count
            return StepResult(**found, data_failed=True)

        update_begin = time.perf_counter()
        if math.isfinite(mean_loss) and math.isfinite(grad_norm):
            if self.grad_clip:
                torch._foreach_mul_(gradients, (self.grad_clip / (norm + 1e-6)).clamp(max=1.0))
            optim.step(self.optimizers)  # not through the scaler, which would check again what the norm has shown
        else:
            found["skipped"] = self._why_skipped(loss)
            found["scale_overflow"] = self.scaler.is_enabled() and self.scaler.get_scale() > 1
        self.scaler.update()  # does nothing unless enabled
        for parameter in self.parameters:
            if self.dist.world_size == 1 or parameter.grad.is_sparse:
                parameter.grad = None
            else:
                parameter.grad.zero_()  # a view of DDP's bucket, which must stay
        # A GPU still works on the update, which counts in the next step: waiting for it would leave the GPU idle.
        return StepResult(
            **found,
            seconds=time.monotonic() - begin,
            loader_seconds=loader_seconds,
            optimizer_seconds=time.perf_counter() - update_begin if self.dist.device.type == "cpu" else None,
            peak_memory_bytes=hardware.peak_memory_bytes(self.dist.device),
        )

    def _backward(self, batches, micro_steps):
        """(mean loss () on the device, data hash, epoch, seconds waited for data) of this rank's micro-steps."""
        loss_sum, data_hash, waited = torch.zeros((), device=self.dist.device), 0, 0.0
        for micro_step in range(micro_steps):
            asked = time.perf_counter()
            batch = batches.take()
            waited += time.perf_counter() - asked
            data_hash += batch.sequence_hash
            # Before the forward pass, where DDP decides whether this backward pass will average over the ranks.
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
        return f"loss {', '.join(map(str, losses))} on the ranks, first parameter with a bad gradient: {bad}"


@dataclass
class TimeBudget:
    """Times of steps, and what follows from them."""

    minutes: float  # from process start to the last save; 0: not timed
    eval_every: int  # steps; 0: never
    core_every: int
    evaluations_after: float  # so many evaluations, for which time is left after the run
    pass_seconds: float  # of a step's forward and backward passes, measured before the first step
    dist: DistContext
    chosen: dict[str, int]  # {step: num_steps} of each correction so far, which steps computed again repeat
    keep: Callable[[dict[str, int]], bool]  # writes it, so that it lasts; False if that failed
    step_seconds: deque = field(default_factory=lambda: deque(maxlen=1000))

    def add(self, result: StepResult, full_batch_tokens: int) -> None:
        """Note the time of a step; of smaller batches only the first counts, in proportion."""
        if result.tokens == full_batch_tokens or not self.step_seconds:
            self.step_seconds.append(result.seconds * full_batch_tokens / result.tokens)

    @property
    def typical_seconds(self) -> float:
        """Mean seconds of a step with a full batch, over the last third of the time; infinite before the first."""
        seconds, count, limit = 0.0, 0, sum(self.step_seconds) / 3
        for count, step_seconds in enumerate(reversed(self.step_seconds), 1):  # noqa: B007
            seconds += step_seconds
            if seconds >= limit:
                break
        return seconds / count if count else math.inf

    @property
    def step_limit_seconds(self) -> float:
        """Seconds after which a step counts as hung."""
        return min(max(STEP_SECONDS, SLOW_STEP_FACTOR * self.typical_seconds), guard.SLOW_SECONDS)

    def seconds_left(self, state: TrainState) -> float:
        return self.typical_seconds * (state.num_steps - state.step)

    def steps_in_time(self, state: TrainState, step_seconds: float) -> int:
        """The number of steps with which the run ends in time, evaluations and last save included."""
        after = (SLOWER_LATER + self.evaluations_after) * state.evaluation_seconds
        after += SLOWER_LATER * state.core_seconds + LAST_SAVE_SECONDS
        left = self.minutes * 60 - state.seconds - hardware.seconds_since_start() - after
        each = step_seconds + (state.evaluation_seconds / self.eval_every if self.eval_every else 0)
        each += state.core_seconds / self.core_every if self.core_every else 0
        return state.step + max(round(left / each), 1)

    def correct(self, state: TrainState) -> None:
        """Correct num_steps of a timed run before its first step and from then on, until little is left. What is chosen
        is kept before it takes effect: the same steps, computed again after a crash, have the same learning rates.
        """
        step, before = str(state.step), state.corrected_progress
        progress = before if state.step == state.corrected_step else state.progress(state.step)
        is_due = state.step == state.corrected_step or int(CORRECTIONS * progress) > int(CORRECTIONS * before)
        if state.horizon_fixed or not is_due:
            return
        if step not in self.chosen:
            seconds = self.typical_seconds if self.step_seconds else STEP_PER_PASSES * self.pass_seconds
            chosen = {**self.chosen, step: self.dist.broadcast_object(self.steps_in_time(state, seconds))}
            if not self.dist.on_rank0(lambda: self.keep(chosen)):
                return
            self.chosen = chosen
        state.correct(self.chosen[step], progress)
        state.horizon_fixed = progress >= 1 - 1 / CORRECTIONS
