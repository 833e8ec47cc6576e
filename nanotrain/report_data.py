"""What the folder of a run tells. Any of its files may be missing, cut, or still be written to."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nanotrain import paths
from nanotrain.errors import UserError
from nanotrain.store import FORMAT

COLUMNS = ("loss", "lr", "grad_norm", "tok_per_sec", "mfu", "epoch", "seconds", "loader_seconds", "optimizer_seconds")
SHOWN_STEPS = 8  # of evaluations, at most


@dataclass
class Run:
    """A run as its folder has it; what is missing is empty."""

    name: str
    folder: Path
    steps: np.ndarray  # (n,) int64, rising: the steps that were recorded
    columns: dict[str, np.ndarray]  # {name of COLUMNS: (n,) float64}, NaN where nothing finite was recorded
    val_bpb: dict[int, float] = field(default_factory=dict)  # {step: bits per byte} during training
    core_metric: dict[int, float] = field(default_factory=dict)  # {step: metric} during training
    config: dict = field(default_factory=dict)  # config.json
    evaluation: dict = field(default_factory=dict)  # evaluation.json
    details: list[dict] = field(default_factory=list)  # evaluation/step_*.json by step; only the last has its documents
    complaints: list[str] = field(default_factory=list)  # what could not be read

    def part(self, *names: str) -> dict:
        """config[name][name]... if that is an object, else an empty one."""
        return _object(dig(self.config, *names))

    @property
    def batch_tokens(self) -> float:
        """Tokens of a whole batch; NaN where the plan is missing."""
        return number(self.part("plan").get("total_batch_size"))

    def step_seconds(self) -> np.ndarray:
        """(n,) float64: how long each step took, from the speed where it was not recorded; NaN where unknown."""
        with np.errstate(divide="ignore", invalid="ignore"):
            seconds = self.batch_tokens / self.columns["tok_per_sec"]
        seconds = np.where(np.isfinite(self.columns["seconds"]), self.columns["seconds"], seconds)
        return np.where(np.isfinite(seconds), seconds, np.nan)

    def elapsed(self) -> np.ndarray:
        """(n,) float64: seconds of training after each step, without evaluations and saves; NaN where unknown."""
        seconds = self.step_seconds()
        known = np.isfinite(seconds)
        return np.cumsum(np.where(known, seconds, np.median(seconds[known]) if known.any() else np.nan))

    def tokens(self) -> np.ndarray:
        """(n,) float64: tokens after each step; a step whose seconds are missing counts as a whole batch."""
        measured = np.rint(self.columns["tok_per_sec"] * self.columns["seconds"])
        return np.cumsum(np.where(np.isfinite(measured), measured, self.batch_tokens))

    def at(self, steps: int | Sequence[int], reached: np.ndarray) -> np.ndarray:
        """What was reached after any `steps`, from what was `reached` after each recorded one; 0 before training."""
        return np.interp(steps, np.concatenate([[0], self.steps]), np.concatenate([[0.0], reached]))

    def parts_of_a_step(self) -> dict[str, np.ndarray]:
        """{part: (n,) seconds}: waiting for data, the optimizer, and first the rest; {} where not recorded."""
        names = {"waiting for data": "loader_seconds", "optimizer": "optimizer_seconds"}
        parts = {part: self.columns[name] for part, name in names.items() if np.isfinite(self.columns[name]).any()}
        if not parts or not np.isfinite(self.columns["seconds"]).any():
            return {}
        rest = self.columns["seconds"] - sum(np.nan_to_num(seconds) for seconds in parts.values())
        return {"forward and backward": rest, **parts}


@dataclass(frozen=True)
class Task:
    """The score on one task; `error` is the standard error of the accuracy."""

    label: str
    accuracy: float
    error: float
    baseline: float
    centered: float
    items: float

    @property
    def error_of_centered(self) -> float:
        """The standard error of the centred score; NaN where guessing is always right."""
        return self.error / (1 - self.baseline) if self.baseline < 1 else math.nan


@dataclass(frozen=True)
class Core:
    """The scores on all tasks after a step. name: "CORE", or "tasks" for those of another bundle."""

    step: int
    name: str
    metric: float
    error: float
    tasks: list[Task]


def read_run(folder: str | Path) -> Run:
    """The run in `folder`. Raises UserError if it holds nothing of one."""
    folder, complaints = Path(folder), []
    if not any((folder / name).exists() for name in ("metrics.jsonl", "config.json", "evaluation.json")):
        known = sorted(path.parent.name for path in paths.base_dir().glob("runs/*/config.json"))
        listed = f"runs in {paths.base_dir() / 'runs'}: {', '.join(known)}" if known else "train one first"
        raise UserError(f"{folder}: no run is there, neither metrics.jsonl nor config.json; {listed}")
    run = Run(folder.name, folder, *_read_metrics(folder / "metrics.jsonl", complaints), complaints=complaints)
    run.config = _read_json(folder / "config.json", complaints)
    if run.config and run.config.get("format") != FORMAT:
        complaints.append(
            f"config.json has format {run.config.get('format', 1)}, not {FORMAT}: its settings are left out"
        )
        run.config = {}
    run.evaluation = _read_json(folder / "evaluation.json", complaints)
    last = run.steps[-1] if len(run.steps) else math.inf
    found = {int(path.stem[5:]): path for path in folder.glob("evaluation/step_*.json") if path.stem[5:].isdecimal()}
    for step in sorted(found):
        if step <= last:  # not what a resume from before it has taken back
            detail = {**_read_json(found[step], complaints), "step": step}
            if detail.get("documents"):
                for earlier in run.details:
                    earlier.pop("documents", None)  # they are large
            run.details.append(detail)
    return run


def _read_json(path, complaints):
    """The object in a JSON file; an empty one where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        value = error
    if not isinstance(value, dict):
        complaints.append(f"{path.name} could not be read: {value if isinstance(value, Exception) else 'no object'}")
    return _object(value)


def _read_metrics(path, complaints):
    """(steps, columns, {step: val bpb}, {step: core metric}) of `metrics.jsonl`. The last row of a step counts."""
    names = [f"train/{name}" for name in COLUMNS]
    steps, rows, val_bpb, core_metric, unreadable = [], [], {}, {}, 0
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                row = _row(line)
                unreadable += row is None
                if row is None:
                    continue
                if "train/loss" in row:
                    steps.append(row["step"])
                    rows.append([number(row.get(name)) for name in names])
                if "val/bpb" in row:
                    val_bpb[row["step"]] = number(row["val/bpb"])
                if "core/core_metric" in row:
                    core_metric[row["step"]] = number(row["core/core_metric"])
    except OSError as error:
        complaints.append(f"metrics.jsonl could not be read: {error.strerror}")
    if unreadable:
        complaints.append(f"{unreadable} lines of metrics.jsonl could not be read; one being written, or cut by a kill")
    steps = np.array(steps, dtype=np.int64)
    table = np.array(rows, dtype=np.float64).reshape(len(steps), len(COLUMNS))
    unique, last = np.unique(steps[::-1], return_index=True)
    columns = dict(zip(COLUMNS, table[::-1][last].T, strict=True))
    return unique, columns, dict(sorted(val_bpb.items())), dict(sorted(core_metric.items()))


def _row(line):
    """The object in a line of `metrics.jsonl`; None where there is none with a step."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return row if isinstance(step, int) and 0 <= step < 2**53 else None


def core_of(run: Run) -> Core | None:
    """The newest scores of a run, or None; that of `evaluation.json` where both are of the same step."""
    found = []
    for step, evaluation in [
        *((detail["step"], detail) for detail in run.details),
        (evaluated_step(run), run.evaluation),
    ]:
        core = _object(evaluation.get("core"))
        tasks = [_task(label, _object(task)) for label, task in _object(core.get("tasks")).items()]
        name = "CORE" if core.get("is_core") else "tasks"
        found.append(Core(step, name, number(core.get("core_metric")), number(core.get("standard_error")), tasks))
    found = [core for core in found if core.tasks]
    return sorted(found, key=lambda core: core.step)[-1] if found else None


def _task(label, task):
    names = ("accuracy", "standard_error", "baseline", "centered", "num_items")
    return Task(label, *(number(task.get(name)) for name in names))


def evaluated_step(run: Run) -> int:
    """The step of `evaluation.json`."""
    step = number(run.evaluation.get("step"))
    return 0 if math.isnan(step) else int(step)


# ---- values that may be anything ----


def number(value: Any) -> float:
    """`value` as a float; NaN if it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1e300 < value < 1e300:
        return math.nan
    return float(value)


def dig(value: Any, *names: str) -> Any:
    """value[name][name]...; None where something is missing on the way."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _object(value):
    return value if isinstance(value, dict) else {}


def objects(value: Any) -> list[dict]:
    """The objects in a list; none where there is no list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def spread(items: Sequence, most: int = SHOWN_STEPS) -> list:
    """At most `most` of `items`, evenly, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(place)] for place in np.linspace(0, len(items) - 1, most)]
