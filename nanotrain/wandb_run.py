"""What wandb is told of a run, and how a run that was logged there is loaded again.

wandb is never in the way. One thread of its own makes all calls in order, from a queue; training only puts something
there. So neither a server that does not answer nor an error of wandb reaches the run, and where wandb cannot go online
it goes on offline: `wandb sync` sends what it has kept.
"""

import contextlib
import json
import queue
import random
import re
import string
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from nanotrain import dataset, paths
from nanotrain.errors import CheckpointError, UserError, first_line

PREFIX = "wandb:"
START_SECONDS = 20.0  # for wandb to answer, before it goes offline
FINISH_SECONDS = 120.0  # for wandb to send the rest; `wandb sync` sends what is then left
FLUSH_SECONDS = 1.0  # between writes of wandb's file
MAX_CALLS = 100_000  # that wait, so that memory is bounded
MAX_FAILURES = 3  # calls that failed, after which wandb is left alone
GROUPS = ("train", "val", "core", "system")  # of metrics, each drawn against the optimizer step
HARDEST_TOKENS = 5  # of a text, in the table of the worst


def new_id(name: str) -> str:
    """A run id that begins with `name` and the time, as in d4-stdlib-20260101-1200-x7k2."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:40].strip("-")
    ending = "".join(random.SystemRandom().choices(string.ascii_lowercase + string.digits, k=4))
    return f"{name}-{time.strftime('%Y%m%d-%H%M')}-{ending}"


def options(project: str, tags: str, notes: str, record: dict) -> dict:
    """Of `wandb.init`: project, tags as in "baseline,cpu", notes, and what the run's config.json holds (`record`)."""
    described = {name: record[name] for name in ("model_config", "plan", "environment", "tokenizer_sha256")}
    settings = {name.lower(): value for name, value in record["settings"].items()}
    return {
        "project": project,
        "tags": [tag.strip() for tag in tags.split(",") if tag.strip()],
        "notes": notes or None,
        "config": {**settings, **described, "data_sha256": dataset.hash_of(record["data"])},
    }


def name_of(run_id: str) -> str:
    """The name of the run with an id of `new_id`: without its random ending."""
    return run_id.rpartition("-")[0] or run_id


def begin(
    run_dir: Path, mode: str, run_id: str | None, record: dict, say: Callable[[str], None], **described: str
) -> "WandbRun":
    """Start a run in wandb, or go on with the one of `run_id`, and log what it is made from. record: what config.json
    holds. described: project, tags and notes, for `options`. say: takes a line for people.
    """
    data_name = Path(record["data_dir"]).name
    run_id = run_id or new_id(f"d{record['model_config']['num_layers']}-{data_name}")
    run = WandbRun(run_dir, mode, run_id, options(record=record, **described), say)
    run.sources(run_dir, record, data_name)
    return run


class WandbRun:
    """A run in wandb. Every method returns at once, but `close`."""

    def __init__(
        self,
        run_dir: Path,
        mode: str,
        run_id: str,
        options: dict,
        say: Callable[[str], object],
        start_seconds: float = START_SECONDS,
        finish_seconds: float = FINISH_SECONDS,
    ):
        """run_dir: below which wandb keeps its files. mode: online or offline. run_id: of `new_id`; a run that has it
        already goes on. options: more for `wandb.init`. say: takes a line for people.
        """
        self.id, self.name, self._say, self._samples = run_id, name_of(run_id), say, []
        self._options = {"dir": str(run_dir), "name": self.name, "resume": "allow", **options}
        self._start_seconds, self._finish_seconds = start_seconds, finish_seconds
        self._calls, self._full, self._exit_code = queue.SimpleQueue(), False, 0
        self._thread = threading.Thread(target=self._work, args=(mode,), name="nanotrain-wandb", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: dict) -> None:
        """Log the metrics that belong to one of GROUPS."""
        chosen = {name: value for name, value in metrics.items() if value is not None and _group(name) in GROUPS}
        self._later(lambda wandb, run: run.log({"step": step, **chosen}))

    def evaluation(self, step: int, parts: dict) -> None:
        """Log the parts of an evaluation (see `MetricLogger.evaluation`) as tables and a histogram."""

        def log(wandb, run):
            found = {}
            if "samples" in parts:
                self._samples += [[step, sample["prompt"], sample["text"]] for sample in parts["samples"]]
                found["val/samples"] = wandb.Table(columns=["step", "prompt", "text"], data=list(self._samples))
            if "core" in parts:
                columns = ["label", "accuracy", "standard_error", "baseline", "centered", "num_items"]
                rows = [[task[name] for name in columns] for task in parts["core"]["tasks"].values()]
                found["core/tasks"] = wandb.Table(columns=columns, data=rows)
            if "documents" in parts:
                rows = [[text["bpb"], text["text"], _hardest(text["tokens"])] for text in parts["documents"]["worst"]]
                found["val/worst_documents"] = wandb.Table(columns=["bpb", "text", "hardest tokens"], data=rows)
            if "token_bits" in parts:
                bits = parts["token_bits"]
                found["val/token_bits"] = wandb.Histogram(np_histogram=(bits["counts"], bits["edges"]))
            if found:
                run.log({"step": step, **found})

        self._later(log)

    def sources(self, run_dir: Path, record: dict, data_name: str) -> None:
        """Log what the run is made from: its tokenizer, and the names, sizes and hashes of its data."""
        tokenizer = {"sha256": record["tokenizer_sha256"], "vocab_size": record["model_config"]["vocab_size"]}
        data = {"sha256": dataset.hash_of(record["data"]), "name": data_name}
        files = {"tokenizer.json": run_dir / "tokenizer.json"}
        self.artifact(f"tokenizer-{tokenizer['sha256'][:12]}", "tokenizer", tokenizer, files)
        self.artifact(f"data-{data['sha256'][:12]}", "dataset", data, values={"data.json": record["data"]})

    def checkpoint(self, run_dir: Path, step: int, val_bpb: float | None) -> None:
        """Log a checkpoint, the best one or without val_bpb the last, as the folder of a run: `fetch` gives it back."""
        names = (f"checkpoints/step_{step:08d}", "tokenizer.json", "config.json")
        aliases = ("last" if val_bpb is None else "best", f"step-{step}")
        files = {name: run_dir / name for name in names}
        self.artifact(self.name, "model", {"step": step, "val_bpb": val_bpb}, files, aliases=aliases)

    def artifact(
        self,
        name: str,
        kind: str,
        metadata: dict,
        paths: dict[str, Path] | None = None,
        values: dict[str, object] | None = None,
        aliases: Sequence[str] = (),
    ) -> None:
        """Log an artifact. paths: {name in it: file or folder}, which must stay as they are; values: {name in it:
        JSON-like value}.
        """

        def log(wandb, run):
            artifact = wandb.Artifact(name, kind, metadata=metadata)
            for inside, path in (paths or {}).items():
                add = artifact.add_dir if path.is_dir() else artifact.add_file
                add(str(path), name=inside, policy="immutable")  # not copied
            for inside, value in (values or {}).items():
                with artifact.new_file(inside, encoding="utf-8") as file:
                    json.dump(value, file, indent=1)
            run.log_artifact(artifact, aliases=list(aliases))

        self._later(log)

    def close(self, failed: bool = False) -> None:
        """Wait, for a bounded time, until wandb has taken everything, and end the run there. failed: mark it so."""
        self._exit_code = int(failed)
        self._calls.put(None)
        self._thread.join(self._start_seconds + 1.5 * self._finish_seconds)
        if self._thread.is_alive():
            self._say("wandb does not end and is left behind")

    def _later(self, call):
        if self._calls.qsize() < MAX_CALLS:
            self._calls.put(call)
        elif not self._full:
            self._full = True
            self._say("wandb does not keep up: some of what follows is only in metrics.jsonl")

    def _work(self, mode):
        """The thread: start wandb, then one call after another until None."""
        wandb, run = self._start(mode)
        failures = 0 if run else MAX_FAILURES
        while (call := self._calls.get()) is not None:
            if failures < MAX_FAILURES:
                try:
                    call(wandb, run)
                except Exception as error:
                    failures += 1
                    what = "is off from here" if failures == MAX_FAILURES else "did not take something"
                    self._say(f"wandb {what}: {_named(error)}")
        if run is not None:
            try:
                run.finish(exit_code=self._exit_code)
            except Exception as error:
                self._say(f"wandb did not end well: {_named(error)}")

    def _start(self, mode):
        """(wandb, run), online if it can be and offline if not; (None, None) if it does not work at all."""
        try:
            import wandb  # slow to import, and off by default
        except Exception as error:  # missing, or broken by another package
            self._say(f"wandb is off: {error}")
            return None, None
        for attempt in dict.fromkeys((mode, "offline")):
            try:
                # console: what wandb copies of the output would go through it before it is printed
                own = {"silent": True, "console": "off", "init_timeout": self._start_seconds}
                settings = wandb.Settings(**own, finish_timeout=self._finish_seconds)
                with contextlib.suppress(Exception):  # not in every version; a kill costs what was not flushed
                    settings.x_transaction_log_flush_interval = FLUSH_SECONDS
                wandb.setup(settings=wandb.Settings(silent=True, mode=attempt))  # its own telemetry obeys only this
                if attempt == "online" and not wandb.login(prompt=False, verify=False):
                    raise UserError("no key is known: `wandb login`, or set WANDB_API_KEY")
                run = wandb.init(**self._options, id=self.id, mode=attempt, settings=settings)
                self.id = run.id  # a sweep has chosen another
                run.define_metric("step", hidden=True)
                for group in GROUPS:
                    run.define_metric(f"{group}/*", step_metric="step")
                where = run.url if attempt == "online" else f"offline, to be sent by wandb sync {Path(run.dir).parent}"
                self._say(f"wandb: {where}")
                return wandb, run
            except Exception as error:
                self._say(f"wandb {attempt} does not work: {_named(error)}")
                with contextlib.suppress(Exception):
                    wandb.teardown()  # which still holds the id
        return None, None


def fetch(reference: str, folder: Path, api: object = None) -> Path:
    """Load the artifact `wandb:ENTITY/PROJECT/NAME:ALIAS` that a run has logged; returns its folder, below `folder`,
    which is that of a run. api: of wandb, for tests.

    Raises UserError (no such form) or CheckpointError (wandb cannot give it). What is in it is verified where every
    checkpoint is, when it is read.
    """
    place, colon, alias = reference.removeprefix(PREFIX).partition(":")
    parts = place.split("/")
    if len(parts) != 3 or (colon and not alias):
        raise UserError(f"{reference}: write wandb:ENTITY/PROJECT/NAME:ALIAS, as in wandb:me/nanotrain/d4-mine:best")
    for part in parts:
        paths.checked_name(part, f"part of {reference}")
    try:
        artifact = (api or _api()).artifact(f"{place}:{alias or 'latest'}", type="model")
        target = folder.joinpath(*parts[:2], f"{parts[2]}-{paths.checked_name(artifact.version, 'version')}")
        artifact.download(root=str(target), skip_cache=True)
    except UserError:
        raise
    except Exception as error:
        raise CheckpointError(f"{reference}: wandb does not give it: {_named(error)}") from None
    return target


def _api():
    import wandb

    wandb.setup(settings=wandb.Settings(silent=True, mode="online"))
    if not wandb.login(prompt=False, verify=False):
        raise UserError("wandb knows no key here: `wandb login`, or set WANDB_API_KEY")
    return wandb.Api()


def _group(name):
    group, slash, _ = name.partition("/")
    return group if slash else ""


def _hardest(tokens):
    """The most expensive tokens of a text in words, the worst first."""
    worst = sorted(tokens, key=lambda token: -token[1])[:HARDEST_TOKENS]
    return ", ".join(f"{text!r} {bits:.1f}" for text, bits in worst)


def _named(error):
    return f"{type(error).__name__}: {first_line(error)}"
