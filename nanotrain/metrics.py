"""The metrics of a run: progress bar, record in the run's folder, and wandb if asked for. Only rank 0 writes.

metrics.jsonl                     numbers: one JSON object a line, `step` counting finished optimizer steps
evaluation/step_00001000.json     what an evaluation found beside them: samples, tasks, the best and worst text
"""

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from nanotrain import guard, hardware

if TYPE_CHECKING:
    from nanotrain.trainer import StepResult, TrainState
    from nanotrain.wandb_run import WandbRun

# Seconds between lines where there is no terminal: the first, then a share of the time so far, up to the last. So the
# log of a minute can be followed and the log of a day is not a book.
PLAIN_SECONDS, PLAIN_SHARE, MOST_PLAIN_SECONDS = 5.0, 0.02, 60.0


class MetricLogger:
    """The metrics of one run. Use as a context manager: every way out closes the bar, the file and wandb."""

    def __init__(
        self,
        run_dir: Path,
        num_steps: int,
        first_step: int = 0,
        enabled: bool = True,
        peak_tokens_per_second: float | None = None,
    ):
        """first_step: the step resumed from; rows of later ones are removed. enabled: False on all ranks but 0.
        peak_tokens_per_second: at the peak FLOP/s of all devices, for train/mfu; None if that is not known.
        """
        self.enabled, self.num_steps, self._peak_tokens_per_second = enabled, num_steps, peak_tokens_per_second
        self._wandb, self._wandb_every, self._loss = None, 1, math.nan
        self._last_line, self._write_failed, self._evaluation = 0.0, False, {}
        if not enabled:
            return
        self._run_dir = Path(run_dir)
        self._run_dir.mkdir(parents=True, exist_ok=True)
        _cut_back(self._run_dir, first_step)
        self._file = open(self._run_dir / "metrics.jsonl", "a", encoding="utf-8")
        self.is_terminal = sys.stderr.isatty()
        self._begin = time.monotonic()
        self.bar = tqdm(
            total=num_steps,
            initial=first_step,
            disable=not self.is_terminal,
            dynamic_ncols=True,
            bar_format="{n_fmt}/{total_fmt} {bar} {remaining} left{postfix}",
        )

    def use_wandb(self, run: "WandbRun", every: int = 1) -> None:
        """Log to a WandbRun too: every evaluation, and the metrics of every `every`-th step and of the last."""
        self._wandb, self._wandb_every = run, every

    @property
    def wandb_id(self) -> str | None:
        """The run's id in wandb, None without wandb."""
        return self._wandb.id if self._wandb else None

    def set_num_steps(self, num_steps: int) -> None:
        """Set the number of steps, once it is known or corrected."""
        self.num_steps = num_steps
        if self.enabled:
            self.bar.total = num_steps
            self.bar.refresh()

    def log_step(
        self, state: "TrainState", result: "StepResult", deviations: float, lr: float, seconds_left: float
    ) -> None:
        """Record a step that `state` counts already. deviations: what `TrainState.advance` gave. lr: that of the
        matrices. seconds_left: of training.
        """
        self._loss, tokens_per_second = result.loss, result.tokens / result.seconds
        metrics = {
            "train/loss": result.loss,
            "train/lr": lr,
            "train/grad_norm": result.grad_norm,
            "train/tok_per_sec": tokens_per_second,
            "train/epoch": result.epoch,
            "train/loss_deviations": deviations,
            "train/seconds": result.seconds,
            "train/loader_seconds": result.loader_seconds,
            "train/optimizer_seconds": result.optimizer_seconds,
            "system/skipped_steps": state.skipped_steps,
            "system/peak_memory_bytes": result.peak_memory_bytes,
            "data_hash": f"{result.data_hash:016x}",
            "train/mfu": tokens_per_second / self._peak_tokens_per_second if self._peak_tokens_per_second else None,
        }
        if result.skipped:
            values = f"loss {result.loss}, gradient norm {result.grad_norm}"
            self.event(f"step {state.step}: {values}: the update was skipped")
        self.step(state.step, {name: value for name, value in metrics.items() if value is not None}, seconds_left)
        if deviations > guard.SPIKE_DEVIATIONS:
            self.event(f"step {state.step}: loss {result.loss:.4f} is {deviations:.1f} deviations above the last")

    def step(self, step: int, metrics: dict, seconds_left: float) -> None:
        """Record the metrics of a finished step; train/loss, train/lr and train/tok_per_sec must be among them."""
        if not self.enabled:
            return
        row = self._write(step, metrics)
        if self._wandb and (step % self._wandb_every == 0 or step == self.num_steps):
            self._wandb.log(step, row)
        line = (
            f"loss {metrics['train/loss']:.4f}, lr {metrics['train/lr']:.4g}, {metrics['train/tok_per_sec']:,.0f} tok/s"
        )
        if metrics.get("train/mfu"):
            line += f", mfu {metrics['train/mfu']:.1%}"
        if self.is_terminal:
            self.bar.set_postfix_str(line, refresh=False)
            self.bar.update(1)
        elif time.monotonic() - self._last_line > self._plain_seconds() or step == self.num_steps:
            self._last_line = time.monotonic()
            print(f"step {step}/{self.num_steps}: {line}, {seconds_left:.0f} s left", flush=True)

    def _plain_seconds(self):
        return min(max(PLAIN_SECONDS, PLAIN_SHARE * (time.monotonic() - self._begin)), MOST_PLAIN_SECONDS)

    def record(self, step: int, metrics: dict) -> None:
        """Write a row of metrics; NaN and infinity, which JSON does not have, become null."""
        if self.enabled:
            row = self._write(step, metrics)
            if self._wandb:
                self._wandb.log(step, row)

    def _write(self, step, metrics):
        row = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in metrics.items()
        }
        with self._a_full_disk_ends_nothing("metrics.jsonl"):
            self._file.write(json.dumps({"step": step, **row}) + "\n")
            self._file.flush()
        return row

    def evaluation(self, step: int, **parts: object) -> None:
        """Record the results of an evaluation beside its metrics: JSON-like values, added to those of this step so far.

        val_bpb: a number, or None if it was not finite. samples: [{prompt, text}], the text what the model wrote. core:
        see `core_eval.summary`. documents and token_bits: see `loss_eval.TokenLossStats`.
        """
        if not self.enabled:
            return
        if self._evaluation.get("step") != step:
            self._evaluation = {"step": step}
        self._evaluation |= parts
        folder = self._run_dir / "evaluation"
        with self._a_full_disk_ends_nothing("an evaluation"):
            folder.mkdir(exist_ok=True)
            temporary = folder / ".part"
            temporary.write_text(json.dumps(self._evaluation, allow_nan=False) + "\n", encoding="utf-8")
            temporary.replace(folder / f"step_{step:08d}.json")
        if self._wandb:
            self._wandb.evaluation(step, parts)

    def finish(self, state: "TrainState", skipped_documents: int, peak_memory_bytes: int) -> None:
        """Print how the run ended, and give wandb the best checkpoint, or without evaluations the last."""
        if skipped_documents:
            self.event(f"{skipped_documents} documents without text were left out since this start")
        if not state.is_finished:
            where = f"step {state.step} of {state.num_steps}"
            self.event(f"stopped and saved at {where}: the same command with --resume goes on")
            return
        evaluated = state.evaluated_step == state.step and state.val_bpb is not None
        result = f"val bpb {state.val_bpb:.4f}" if evaluated else f"loss {self._loss:.4f}"
        used = f"{hardware.seconds_since_start():.0f} s, {peak_memory_bytes / 2**30:.1f} GiB"
        self.event(f"done in {used}: {result} after {state.num_steps} steps")
        if self.enabled and self._wandb:
            step = state.best_step if state.best_step >= 0 else state.step
            self._wandb.checkpoint(self._run_dir, step, state.best_bpb)

    @contextlib.contextmanager
    def _a_full_disk_ends_nothing(self, what):
        try:
            yield
        except OSError as error:
            if not self._write_failed:
                self.event(f"{what} could not be written ({error.strerror}); training goes on")
            self._write_failed = True

    def event(self, text: str) -> None:
        """Print something that happened, with the time of day."""
        if self.enabled:
            tqdm.write(f"{time.strftime('%H:%M:%S')} {text}")
            sys.stdout.flush()

    @contextlib.contextmanager
    def progress(self, description: str, total: int) -> Iterator[Callable[[int], object] | None]:
        """A nested bar that vanishes; yields the function to call with the number of items done, None without one."""
        if not (self.enabled and self.is_terminal):
            yield None
            return
        with tqdm(total=total, desc=description, leave=False, dynamic_ncols=True) as bar:
            yield bar.update

    def close(self, failed: bool = False) -> None:
        """Close the bar, the file, and wandb; failed: the run ends with an error."""
        if not self.enabled:
            return
        self.bar.close()
        with contextlib.suppress(OSError):
            self._file.close()
        if self._wandb:
            self._wandb.close(failed)

    def __enter__(self):
        return self

    def __exit__(self, kind, *error):
        self.close(failed=kind is not None)


def _cut_back(run_dir, step):
    """Drop what was recorded after `step` (all of it where nothing is resumed), and a last line that was cut by a
    crash.
    """
    for path in (run_dir / "evaluation").glob("step_*.json"):
        number = path.stem.removeprefix("step_")
        if number.isdecimal() and (not step or int(number) > step):
            path.unlink()
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            if step and json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    temporary = path.with_suffix(".part")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)
