"""What a run tells: the progress bar, `metrics.jsonl`, and wandb if asked for. Only rank 0 says anything.

`metrics.jsonl` is the record: one JSON object a line, `step` counting finished optimizer steps.
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

    def __init__(
        self, run_dir, run_name, config, num_steps, first_step=0, wandb_mode="off", wandb_id=None, enabled=True
    ):
        """first_step: the step resumed from; later rows of `metrics.jsonl` are cut off. enabled: False on all ranks
        but 0.
        """
        self.enabled, self.num_steps, self.wandb, self.wandb_id = enabled, num_steps, None, wandb_id
        self._last_line, self._write_failed = 0.0, False
        if not enabled:
            return
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        path = Path(run_dir) / "metrics.jsonl"
        _cut_back(path, first_step)
        self._file = open(path, "a", encoding="utf-8")
        self.is_terminal = sys.stderr.isatty()
        self._begin = time.monotonic()
        self.bar = tqdm(
            total=num_steps,
            initial=first_step,
            disable=not self.is_terminal,
            dynamic_ncols=True,
            bar_format="{n_fmt}/{total_fmt} {bar} {remaining} left{postfix}",
        )
        if wandb_mode != "off":
            self._start_wandb(run_dir, run_name, config, wandb_mode)

    def _start_wandb(self, run_dir, run_name, config, mode):
        try:
            import wandb  # slow to import, and off by default
        except Exception as error:  # missing, or broken by another package
            self.event(f"wandb is off: {error}")
            return
        options = {"project": "nanotrain", "name": run_name, "id": self.wandb_id, "config": config, "dir": str(run_dir)}
        for attempt in dict.fromkeys((mode, "offline")):
            try:
                settings = wandb.Settings(init_timeout=30, silent=True)
                self.wandb = wandb.init(**options, mode=attempt, resume="allow", settings=settings)
                self.wandb_id = self.wandb.id
                return
            except Exception as error:  # a tracker must never end a run
                self.event(f"wandb {attempt} does not work: {type(error).__name__}: {error}")

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
        self.record(step, metrics)
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
        if not self.enabled:
            return
        row = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in metrics.items()
        }
        try:
            self._file.write(json.dumps({"step": step, **row}) + "\n")
            self._file.flush()
        except OSError as error:  # a full disk must not end a run
            if not self._write_failed:
                self.event(f"metrics.jsonl could not be written ({error.strerror}); training goes on")
            self._write_failed = True
        if self.wandb:
            try:
                self.wandb.log({"step": step, **row})
            except Exception as error:
                self.wandb = None
                self.event(f"wandb is off from here: {type(error).__name__}: {error}")

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

    def close(self):
        """Close the bar, the file, and wandb."""
        if not self.enabled:
            return
        self.bar.close()
        with contextlib.suppress(OSError):
            self._file.close()
        if self.wandb:
            with contextlib.suppress(Exception):
                self.wandb.finish()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def _cut_back(path, step):
    """Drop the rows after `step` (all of them where nothing is resumed), and a last line that was cut by a crash."""
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
