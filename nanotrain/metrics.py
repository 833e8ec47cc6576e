"""The metrics of a run: progress bar, record in the run's folder, and wandb if asked for. Only rank 0 writes.

metrics.jsonl                     numbers: one JSON object a line, `step` counting finished optimizer steps
evaluation/step_00001000.json     what an evaluation found beside them: samples, tasks, the best and worst text
"""

import contextlib
import json
import math
import queue
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from nanotrain import dataset, guard, hardware, paths
from nanotrain.errors import CheckpointError, UserError, first_line
from nanotrain.files import atomic_file

if TYPE_CHECKING:
    from nanotrain.trainer import StepResult, TrainState

# Seconds between lines where there is no terminal: the first, then a share of the time so far, up to the last.
PLAIN_SECONDS, PLAIN_SHARE, MOST_PLAIN_SECONDS = 5.0, 0.02, 60.0
WANDB_PREFIX = "wandb:"  # of the name of a run that is a wandb artifact
START_SECONDS = 20.0  # for the wandb server to answer, before wandb goes offline
FINISH_SECONDS = 120.0  # for wandb to send the rest; `wandb sync` sends what is then left
MAX_FAILURES = 3  # exceptions, after which wandb is left alone


class MetricLogger:
    """The metrics of one run. Use as a context manager: every way out closes the bar, the file and wandb."""

    def __init__(
        self, run_dir: Path, num_steps: int, first_step: int = 0, enabled: bool = True, peak_speed: float | None = None
    ):
        """first_step: the step resumed from; rows of later ones are removed. enabled: False on all ranks but 0.
        peak_speed: tokens per second at the peak FLOP/s of all devices, for train/mfu; None if that is not known.
        """
        self.enabled, self._run_dir, self._peak_speed, self._loss = enabled, Path(run_dir), peak_speed, math.nan
        self._wandb, self._wandb_every, self._evaluation, self._write_failed = None, 1, {}, False
        self._begin, self._last_line = time.monotonic(), 0.0
        form, disable = "{n_fmt}/{total_fmt} {bar} {remaining} left{postfix}", None if enabled else True
        self.bar = tqdm(total=num_steps, initial=first_step, disable=disable, dynamic_ncols=True, bar_format=form)
        if enabled:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            _cut_back(self._run_dir, first_step)
            self._file = open(self._run_dir / "metrics.jsonl", "a", encoding="utf-8")

    def start_wandb(self, mode: str, labels: dict, record: dict, run_id: str | None, every: int) -> None:
        """Log to wandb too: every evaluation, and the metrics of every `every`-th step and of the last. mode: offline,
        online, or off for not at all. The rest is that of `WandbRun`.
        """
        if self.enabled and mode != "off":
            self._wandb_every = every
            self._wandb = WandbRun(self._run_dir, mode, labels, record, run_id, self.event)

    @property
    def wandb_id(self) -> str | None:
        """The id of the run in wandb, which a sweep may have chosen; None without wandb."""
        return self._wandb.id if self._wandb else None

    def set_num_steps(self, num_steps: int) -> None:
        """Set the number of steps, once it is known or corrected."""
        self.bar.total = num_steps
        self.bar.refresh()

    def log_step(
        self, state: "TrainState", result: "StepResult", deviations: float, lr: float, seconds_left: float
    ) -> None:
        """Record a step that `state` counts already. deviations: what `TrainState.advance` gave. lr: that of the
        matrices. seconds_left: of training.
        """
        step, last, speed = state.step, self.bar.total, result.tokens / result.seconds
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
        line = f"loss {result.loss:.4f}, lr {lr:.4g}, {speed:,.0f} tok/s" + (f", mfu {mfu:.1%}" if mfu else "")
        self.bar.set_postfix_str(line, refresh=False)
        self.bar.update(1)
        now = time.monotonic()
        pause = min(max(PLAIN_SECONDS, PLAIN_SHARE * (now - self._begin)), MOST_PLAIN_SECONDS)
        if self.enabled and self.bar.disable and (now - self._last_line > pause or step == last):
            self._last_line = now
            print(f"step {step}/{last}: {line}, {seconds_left:.0f} s left", flush=True)
        if result.skipped:
            self.event(f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}: the update was skipped")
        if deviations > guard.SPIKE_DEVIATIONS:
            self.event(f"step {step}: loss {result.loss:.4f} is {deviations:.1f} deviations above the last")

    def record(self, step: int, metrics: dict, to_wandb: bool = True) -> None:
        """Write a row of metrics; NaN and infinity, which JSON does not have, become null."""
        if self.enabled:
            row = json.loads(json.dumps({"step": step, **metrics}), parse_constant=lambda constant: None)
            with self._tolerate_full_disk("metrics.jsonl"):
                self._file.write(json.dumps(row) + "\n")
                self._file.flush()
            if self._wandb and to_wandb:
                self._wandb.log(row)

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
        path = self._run_dir / "evaluation" / f"step_{step:08d}.json"
        with self._tolerate_full_disk("an evaluation"), atomic_file(path) as temporary:
            temporary.write_text(json.dumps(self._evaluation, allow_nan=False) + "\n", encoding="utf-8")
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
        if self._wandb:
            step, kind = (state.best_step, "best") if state.best_step >= 0 else (state.step, "last")
            names = (f"checkpoints/step_{step:08d}", "tokenizer.json", "config.json")
            files = {name: self._run_dir / name for name in names}  # the folder of a run, for `fetch_artifact`
            metadata = {"step": step, "val_bpb": state.best_bpb}
            self._wandb.artifact(self._wandb.name, "model", metadata, files, (kind, f"step-{step}"))

    @contextlib.contextmanager
    def _tolerate_full_disk(self, what):
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

    def progress(self, description: str, total: int) -> tqdm:
        """A bar below the other that vanishes at the end of `with`; without a terminal it shows nothing."""
        return tqdm(total=total, desc=description, leave=False, dynamic_ncols=True, disable=self.bar.disable)

    def __enter__(self):
        return self

    def __exit__(self, kind, *error):
        self.bar.close()
        if self.enabled:
            with contextlib.suppress(OSError):
                self._file.close()
        if self._wandb:
            self._wandb.close(failed=kind is not None)


def _cut_back(run_dir, step):
    """Drop what was recorded after `step` (all of it where nothing is resumed), and a last line cut by a crash."""
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
    """A run in wandb. A call into wandb blocks while wandb's service does not read, so one thread makes all calls, in
    order, from a queue; an exception becomes a line in the log. Every method returns at once, except `close`.
    """

    def __init__(
        self, run_dir: Path, mode: str, labels: dict, record: dict, run_id: str | None, say: Callable[[str], object]
    ):
        """Start a run in `mode` online or offline, with wandb's files below `run_dir`, or go on with the one of
        `run_id`, and log what it is made from. labels: project, tags as in "baseline,cpu", and notes. record: what
        config.json holds. say: takes a line for people.
        """
        shape, data_name = record["model_config"], Path(record["data_dir"]).name
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"d{shape['num_layers']}-{data_name}")[:40].strip("-")
        self.id = run_id or f"{name}-{time.strftime('%Y%m%d-%H%M')}-{secrets.token_hex(2)}"
        self.name = self.id.rpartition("-")[0] or self.id  # without the random ending
        tokenizer = {"sha256": record["tokenizer_sha256"], "vocab_size": shape["vocab_size"]}
        data = {"sha256": dataset.hash_of(record["data"]), "name": data_name}
        settings = {name.lower(): value for name, value in record["settings"].items()}
        described = {name: record[name] for name in ("model_config", "plan", "environment", "tokenizer_sha256")}
        self._options = {
            **labels,
            "name": self.name,
            "tags": [tag.strip() for tag in labels["tags"].split(",") if tag.strip()],
            "notes": labels["notes"] or None,
            "config": {**settings, **described, "data_sha256": data["sha256"]},
            "dir": str(run_dir),
            "resume": "allow",
        }
        self._calls, self._say, self._samples, self._failures, self._exit_code = queue.SimpleQueue(), say, [], 0, 0
        files = {"tokenizer.json": run_dir / "tokenizer.json"}
        self.artifact(f"tokenizer-{tokenizer['sha256'][:12]}", "tokenizer", tokenizer, files)
        self.artifact(f"data-{data['sha256'][:12]}", "dataset", data, {"data.json": record["data"]})
        self._thread = threading.Thread(target=self._work, args=(mode,), name="wandb calls", daemon=True)
        self._thread.start()

    def log(self, row: dict) -> None:
        """Log the step of a row, and those of its metrics that belong to a group, as train/loss does."""
        chosen = {name: value for name, value in row.items() if value is not None and (name == "step" or "/" in name)}
        self._calls.put(lambda run: run.log(chosen))

    def evaluation(self, step: int, parts: dict) -> None:
        """Log the parts of an evaluation (see `MetricLogger.evaluation`) as tables and a histogram."""
        self._samples += [{"step": step, **sample} for sample in parts.get("samples", [])]
        texts = parts["documents"]["worst"] if "documents" in parts else []
        tables = {
            "val/samples": list(self._samples) if "samples" in parts else [],
            "core/tasks": list(parts["core"]["tasks"].values()) if "core" in parts else [],
            "val/worst_documents": [
                {"bpb": text["bpb"], "text": text["text"], "hardest tokens": _hardest(text["tokens"])} for text in texts
            ],
        }
        bits = parts.get("token_bits")

        def log(run):
            import wandb

            found = {
                name: wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
                for name, rows in tables.items()
                if rows
            }
            if bits:
                found["val/token_bits"] = wandb.Histogram(np_histogram=(bits["counts"], bits["edges"]))
            if found:
                run.log({"step": step, **found})

        self._calls.put(log)

    def artifact(
        self, name: str, kind: str, metadata: dict, contents: dict[str, object], aliases: Sequence[str] = ()
    ) -> None:
        """Log an artifact. contents: {name in it: a file or folder, which must stay as it is, or a JSON-like value}."""

        def log(run):
            import wandb

            artifact = wandb.Artifact(name, kind, metadata=metadata)
            for inside, content in contents.items():
                if isinstance(content, Path):
                    add = artifact.add_dir if content.is_dir() else artifact.add_file
                    add(str(content), name=inside, policy="immutable")  # not copied
                else:
                    with artifact.new_file(inside, encoding="utf-8") as file:
                        json.dump(content, file, indent=1)
            run.log_artifact(artifact, aliases=list(aliases))

        self._calls.put(log)

    def close(self, failed: bool = False) -> None:
        """Wait, for a bounded time, until wandb has taken everything, and end the run there. failed: mark it so."""
        self._exit_code = int(failed)
        self._calls.put(None)
        self._thread.join(START_SECONDS + 1.5 * FINISH_SECONDS)
        if self._thread.is_alive():
            self._say("wandb does not answer and is ended")
            with contextlib.suppress(Exception, SystemExit):  # or wandb waits for its service when Python ends
                sys.modules["wandb"].sdk.wandb_setup._singleton._connection._proc._process.kill()
                self._thread.join(1.0)
                sys.modules["wandb"].teardown()

    def _work(self, mode):
        """The thread: start wandb, online if it can be and offline if not, then one call after another until None."""
        run = self._attempt(self._start, mode)
        if run is None and mode == "online":
            with contextlib.suppress(Exception, SystemExit):
                sys.modules["wandb"].teardown()  # what has failed still holds the id
            run = self._attempt(self._start, "offline")
        while (call := self._calls.get()) is not None:
            if run is not None and self._failures < MAX_FAILURES:
                self._attempt(call, run)
        if run is not None:
            self._attempt(lambda run: run.finish(exit_code=self._exit_code), run)

    def _attempt(self, call, argument):
        try:
            return call(argument)
        except Exception as error:
            self._failures += 1
            end = "; nothing more is logged there" if self._failures == MAX_FAILURES else ""
            self._say(f"wandb: {_named(error)}{end}")

    def _start(self, mode):
        wandb = _ready(mode)
        # console off: or all output would pass through wandb before it is printed
        settings = wandb.Settings(silent=True, console="off", init_timeout=START_SECONDS, finish_timeout=FINISH_SECONDS)
        with contextlib.suppress(Exception):  # not in every version
            settings.x_transaction_log_flush_interval = 1.0  # seconds; a kill costs what was not flushed
        run = wandb.init(**self._options, id=self.id, mode=mode, settings=settings)
        self.id = run.id  # a sweep has chosen another
        run.define_metric("step", hidden=True)
        for group in ("train", "val", "core", "system"):
            run.define_metric(f"{group}/*", step_metric="step")
        self._say(f"wandb: {run.url if mode == 'online' else f'offline; wandb sync {Path(run.dir).parent} sends it'}")
        return run


def fetch_artifact(reference: str, folder: Path) -> Path:
    """Load the artifact `wandb:ENTITY/PROJECT/NAME:ALIAS` that a run has logged; returns its folder, below `folder`,
    which is that of a run.

    Raises UserError (no such form) or CheckpointError (wandb cannot give it). What is in it is verified where every
    checkpoint is, when it is read.
    """
    place, colon, alias = reference.removeprefix(WANDB_PREFIX).partition(":")
    parts = place.split("/")
    if len(parts) != 3 or (colon and not alias):
        raise UserError(f"{reference}: write wandb:ENTITY/PROJECT/NAME:ALIAS, as in wandb:me/nanotrain/d4-mine:best")
    for part in parts:
        paths.checked_name(part, f"part of {reference}")
    try:
        artifact = _ready("online").Api().artifact(f"{place}:{alias or 'latest'}", type="model")
        target = folder.joinpath(*parts[:2], f"{parts[2]}-{paths.checked_name(artifact.version, 'version')}")
        artifact.download(root=str(target), skip_cache=True)
    except UserError:
        raise
    except Exception as error:
        raise CheckpointError(f"{reference}: wandb does not give it: {_named(error)}") from None
    return target


def _ready(mode):
    """The module wandb, ready for a mode. Online needs a key, for which nobody is asked."""
    import wandb  # slow to import, and off by default

    wandb.setup(settings=wandb.Settings(silent=True, mode=mode))  # wandb's own telemetry obeys only this
    if mode == "online" and not wandb.login(prompt=False, verify=False):
        raise UserError("no key is known here: `wandb login`, or set WANDB_API_KEY")
    return wandb


def _hardest(tokens):
    """The five most expensive tokens of a text in words, the worst first."""
    worst = sorted(tokens, key=lambda token: -token[1])[:5]
    return ", ".join(f"{text!r} {bits:.1f}" for text, bits in worst)


def _named(error):
    return f"{type(error).__name__}: {first_line(error)}"
