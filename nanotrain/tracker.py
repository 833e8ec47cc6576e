"""What a run tells: the progress bar, the record in its folder, and wandb if asked for. Only rank 0 says anything.

metrics.jsonl                     numbers: one JSON object a line, `step` counting finished optimizer steps
evaluation/step_00001000.json     what an evaluation found beside them: samples, tasks, the best and worst text
"""

import contextlib
import json
import math
import sys
import time
from pathlib import Path

from tqdm import tqdm

# Seconds between lines where there is no terminal: the first, then a share of the time so far, up to the last. So the
# log of a minute can be followed and the log of a day is not a book.
PLAIN_SECONDS, PLAIN_SHARE, MOST_PLAIN_SECONDS = 5.0, 0.02, 60.0


class Tracker:
    """The voice of one run. Use as a context manager: every way out closes the bar, the file and wandb."""

    def __init__(self, run_dir, num_steps, first_step=0, enabled=True):
        """first_step: the step resumed from; what was recorded of later ones goes. enabled: False on all ranks but
        0.
        """
        self.enabled, self.num_steps = enabled, num_steps
        self._wandb, self._wandb_every = None, 1
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

    def use_wandb(self, run, every=1):
        """Log to a WandbRun too: evaluations, and every so many steps (and at the last) the numbers of a step."""
        self._wandb, self._wandb_every = run, every

    def set_num_steps(self, num_steps):
        """The horizon, once it is known or corrected."""
        self.num_steps = num_steps
        if self.enabled:
            self.bar.total = num_steps
            self.bar.refresh()

    def step(self, step, metrics, seconds_left):
        """Record a finished step; `metrics` must hold train/loss, train/lr and train/tok_per_sec. seconds_left: of
        training, for the line.
        """
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

    def record(self, step, metrics):
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

    def evaluation(self, step, **parts):
        """Record what an evaluation found beside its numbers: JSON-like values, added to those of this step so far.

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

    @contextlib.contextmanager
    def _a_full_disk_ends_nothing(self, what):
        try:
            yield
        except OSError as error:
            if not self._write_failed:
                self.event(f"{what} could not be written ({error.strerror}); training goes on")
            self._write_failed = True

    def event(self, text):
        """Say something that happened, with the time of day."""
        if self.enabled:
            tqdm.write(f"{time.strftime('%H:%M:%S')} {text}")
            sys.stdout.flush()

    @contextlib.contextmanager
    def progress(self, description, total):
        """A nested bar that vanishes; yields the function to call with the number of items done."""
        if not (self.enabled and self.is_terminal):
            yield None
            return
        with tqdm(total=total, desc=description, leave=False, dynamic_ncols=True) as bar:
            yield bar.update

    def close(self, failed=False):
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
