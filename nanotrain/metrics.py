"""The metrics of a run: progress bar, files in the run's folder, and optionally wandb. Only rank 0 writes.

metrics.jsonl                     numbers, one JSON object per line; `step` counts finished optimizer steps
evaluation/step_00001000.json     other results of an evaluation: samples, tasks, the best and worst texts
"""

import contextlib
import json
import math
import queue
import secrets
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from nanotrain import dataset, guard, hardware
from nanotrain.errors import UserError, first_line
from nanotrain.files import atomic_file
from nanotrain.terminal import progress_bar
from nanotrain.trainer import StepResult, TrainState

BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
PLAIN_SECONDS = 10.0  # interval of plain lines, printed where no bar can be shown
START_SECONDS = 20.0  # time limit for the wandb server to answer before wandb goes offline
FINISH_SECONDS = 120.0  # time limit for wandb to upload the rest at the end; `wandb sync` uploads what is left then


class MetricLogger(contextlib.AbstractContextManager):
    """Logger for one run, used as a context manager that always closes the bar, the file and wandb."""

    def __init__(
        self, run_dir: Path, num_steps: int, first_step: int = 0, enabled: bool = True, peak_speed: float = 0.0
    ):
        """enabled: True on rank 0 only. peak_speed: tokens per second at the devices' peak FLOP/s; 0: unknown."""
        self.enabled, self._run_dir, self._peak_speed, self._loss = enabled, Path(run_dir), peak_speed, math.nan
        self._wandb, self._wandb_every, self._evaluation, self._write_failed = None, 1, {}, False
        self._last_line = -math.inf
        self.bar = progress_bar(None, "", num_steps, enabled, initial=first_step, bar_format=BAR)
        if enabled:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            _cut_back(self._run_dir, first_step)
            self._file = open(self._run_dir / "metrics.jsonl", "a", encoding="utf-8")

    def start_wandb(self, mode: str, labels: dict, record: dict, run_id: str | None, every: int) -> None:
        """Also log evaluations and every `every`-th step to wandb, unless `mode` is off; see `WandbRun`."""
        if self.enabled and mode != "off":
            self._wandb_every = every
            self._wandb = WandbRun(self._run_dir, mode, labels, record, run_id, self.event)

    @property
    def wandb_id(self) -> str | None:
        """Id of the run in wandb (a sweep may have chosen it), or None without wandb."""
        return self._wandb.id if self._wandb else None

    def log_step(self, state: TrainState, result: StepResult, deviations: float, lr: float, eta: float) -> None:
        """Log the last step of `state`. deviations: from `TrainState.advance`. lr: the matrices'. eta: seconds left."""
        step, last, speed = state.step, state.num_steps, result.tokens / result.seconds
        mfu, self._loss = speed / self._peak_speed if self._peak_speed else None, result.loss
        metrics = {
            "train/loss": result.loss,
            "train/lr": lr,
            "train/grad_norm": result.grad_norm,
            "train/tok_per_sec": speed,
            "train/epoch": result.epoch,
            "train/loss_deviations": deviations,
            "train/seconds": result.seconds,
            "train/loader_seconds": result.loader_seconds,
            "train/optimizer_seconds": result.optimizer_seconds,
            "train/mfu": mfu,
            "system/skipped_steps": state.skipped_steps,
            "system/peak_memory_bytes": result.peak_memory_bytes,
            "data_hash": f"{result.data_hash:016x}",
        }
        metrics = {name: value for name, value in metrics.items() if value is not None}
        self.record(step, metrics, to_wandb=step % self._wandb_every == 0 or step == last)

        line = f"loss {result.loss:.4f}, lr {lr:.3g}, {speed:,.0f} tok/s, {tqdm.format_interval(eta)} left"
        line += f", mfu {mfu:.1%}" if mfu else ""
        self.bar.total = last
        self.bar.set_postfix_str(line, refresh=False)
        self.bar.update(1)
        now = time.monotonic()
        if self.enabled and self.bar.disable and (now >= self._last_line + PLAIN_SECONDS or step == last):
            self._last_line = now
            print(f"step {step}/{last}: {line}", flush=True)
        if result.skipped:
            self.event(f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}: update skipped")
        if deviations > guard.SPIKE_DEVIATIONS:
            self.event(f"step {step}: loss {result.loss:.4f} is {deviations:.1f} sigma above the mean of recent steps")

    def record(self, step: int, metrics: dict, to_wandb: bool = True) -> None:
        """Write a row of metrics. NaN and infinity become null because JSON has neither."""
        if self.enabled:
            row = json.loads(json.dumps({"step": step, **metrics}), parse_constant=lambda constant: None)
            with self._tolerate_full_disk("metrics.jsonl"):
                self._file.write(json.dumps(row) + "\n")
                self._file.flush()
            if self._wandb and to_wandb:
                known = {name: value for name, value in row.items() if value is not None}
                self._wandb.calls.put(lambda run: run.log(known))

    def evaluation(self, step: int, **parts: object) -> None:
        """Add results (samples, documents and so on) to the evaluation file of this step."""
        if self.enabled:
            earlier = self._evaluation if self._evaluation.get("step") == step else {"step": step}
            self._evaluation = earlier | parts
            path = self._run_dir / "evaluation" / f"step_{step:08d}.json"
            with self._tolerate_full_disk("an evaluation"), atomic_file(path) as temporary:
                temporary.write_text(json.dumps(self._evaluation, allow_nan=False) + "\n", encoding="utf-8")

    def finish(self, state: TrainState, peak_memory_bytes: int) -> None:
        """Print how the run ended, and log its best checkpoint (without evaluations the last) to wandb."""
        if not state.is_finished:
            place = f"step {state.step} of {state.num_steps}"
            return self.event(f"stopped and saved at {place} (--resume continues)")
        evaluated = state.evaluated_step == state.step and state.val_bpb is not None
        result = f"val bpb {state.val_bpb:.4f}" if evaluated else f"loss {self._loss:.4f}"
        used = f"{hardware.seconds_since_start():.0f} s, {peak_memory_bytes / 2**30:.1f} GiB"
        self.event(f"done in {used}: {result} after {state.num_steps} steps")
        if self._wandb:
            self._wandb.log_checkpoint(*((state.best_step, "best") if state.best_step >= 0 else (state.step, "last")))

    @contextlib.contextmanager
    def _tolerate_full_disk(self, what):
        try:
            yield
        except OSError as error:
            if not self._write_failed:
                self.event(f"{what} could not be written ({error.strerror}); training continues")
            self._write_failed = True

    def event(self, text: str) -> None:
        """Print a line with the time of day."""
        if self.enabled:
            tqdm.write(f"{time.strftime('%H:%M:%S')} {text}")
            sys.stdout.flush()

    def __exit__(self, kind, *error):
        self.bar.close()
        if self.enabled:
            with contextlib.suppress(OSError):
                self._file.close()
        if self._wandb:
            self._wandb.close(failed=kind is not None)


def _cut_back(run_dir, step):
    """Drop what was recorded after `step` (everything for step 0) and a last line truncated by a crash."""
    for path in (run_dir / "evaluation").glob("step_*.json"):
        if not step or path.name > f"step_{step:08d}.json":
            path.unlink()
    path, kept = run_dir / "metrics.jsonl", ""
    path.touch()
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            if step and json.loads(line)["step"] <= step:
                kept += line + "\n"
    with atomic_file(path) as temporary:
        temporary.write_text(kept, encoding="utf-8")


class WandbRun:
    """A run in wandb. Calls block while wandb's service does not read, so a thread makes them, from a queue; only
    `close` waits. The first exception is printed and ends logging to wandb, but not the run.
    """

    def __init__(self, run_dir: Path, mode: str, labels: dict, record: dict, run_id: str | None, say: Callable):
        """labels: project, tags (comma-separated) and notes. record: contents of config.json. say: prints a line."""
        self.id = run_id or secrets.token_hex(4)
        config = {name.lower(): value for name, value in record["settings"].items()}
        config |= {name: record[name] for name in ("model_config", "plan", "environment", "tokenizer_sha256")}
        config["data_sha256"] = dataset.hash_of(record["data"])
        self._options = dict(labels, name=run_dir.name, config=config, dir=str(run_dir), resume="allow")
        self._options["tags"] = [tag.strip() for tag in labels["tags"].split(",") if tag.strip()]
        self._run_dir, self._say = run_dir, say
        self.calls = queue.SimpleQueue()  # functions to call with the wandb run; last, its exit code
        self._thread = threading.Thread(target=self._work, args=(mode,), name="wandb calls", daemon=True)
        self._thread.start()

    def log_checkpoint(self, step: int, alias: str) -> None:
        """Log a checkpoint with tokenizer and config.json as an artifact. The files must not change afterwards."""

        def log(run):
            artifact = sys.modules["wandb"].Artifact(self._run_dir.name, "model")
            for name in (f"checkpoints/step_{step:08d}", "tokenizer.json", "config.json"):
                path = self._run_dir / name
                add = artifact.add_dir if path.is_dir() else artifact.add_file
                add(str(path), name=name, policy="immutable")  # uploaded without a copy
            run.log_artifact(artifact, aliases=[alias, f"step-{step}"])

        self.calls.put(log)

    def close(self, failed: bool = False) -> None:
        """End the run in wandb and wait, for a bounded time, until everything is sent. failed: mark it as failed."""
        self.calls.put(int(failed))
        self._thread.join(START_SECONDS + 1.5 * FINISH_SECONDS)
        if self._thread.is_alive():
            self._say("wandb does not answer: its service is killed")
            with contextlib.suppress(Exception, SystemExit):  # otherwise wandb waits for its service when Python exits
                sys.modules["wandb"].sdk.wandb_setup._singleton._connection._proc._process.kill()
                self._thread.join(1.0)
                sys.modules["wandb"].teardown()

    def _work(self, mode):
        try:
            run = self._start(mode)
            while callable(call := self.calls.get()):
                call(run)
            run.finish(exit_code=call)
        except Exception as error:
            self._say(f"wandb: {first_line(error)}; nothing more is logged to it")

    def _start(self, mode):
        """Start wandb, offline if online fails."""
        # console off: otherwise all output would pass through wandb before it is printed
        settings = {"silent": True, "console": "off", "init_timeout": START_SECONDS, "finish_timeout": FINISH_SECONDS}
        try:
            import wandb  # slow to import, and off by default

            wandb.setup(settings=wandb.Settings(silent=True, mode=mode))  # wandb's telemetry obeys only this
            if mode == "online" and not wandb.login(prompt=False, verify=False):
                raise UserError("no API key: run `wandb login` or set WANDB_API_KEY")
            run = wandb.init(**self._options, id=self.id, mode=mode, settings=wandb.Settings(**settings))
        except Exception as error:
            if mode == "offline":
                raise
            self._say(f"wandb: {first_line(error)}")
            sys.modules["wandb"].teardown()  # the failed run still holds the id
            return self._start("offline")
        self.id = run.id  # differs if a sweep has chosen it
        run.define_metric("*", step_metric="step")
        self._say(f"wandb: {run.url if mode == 'online' else f'offline; wandb sync {Path(run.dir).parent} uploads it'}")
        return run
