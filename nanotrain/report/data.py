"""What the folder of a run holds. Any of its files may be missing, cut short, or still be written to."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanotrain import paths
from nanotrain.errors import UserError
from nanotrain.store import FORMAT


@dataclass
class Run:
    """A run as its folder has it; what is missing is empty."""

    name: str
    folder: Path
    metrics: dict[str, dict[int, float]]  # {name in metrics.jsonl: {step: value}}, NaN for what is no finite number
    config: dict[str, Any]  # config.json
    evaluation: dict[str, Any]  # evaluation.json
    records: list[dict[str, Any]]  # evaluation/step_*.json by step; only the last documents are kept
    complaints: list[str]  # what could not be read

    def part(self, name: str) -> dict[str, Any]:
        """An object in config.json; an empty one where that is missing."""
        return self.config.get(name, {})

    def of(self, name: str) -> dict[int, float]:
        """{step: value} of a metric, by step; empty where it was not recorded."""
        return self.metrics.get(name, {})

    def steps(self) -> list[int]:
        """The n steps that were recorded, rising."""
        return list(self.of("train/loss"))

    def column(self, name: str) -> np.ndarray:
        """(n,) float64: `train/<name>` of each step, NaN where it is missing."""
        values = self.of(f"train/{name}")
        return np.array([values.get(step, math.nan) for step in self.steps()], dtype=np.float64)

    def tokens(self) -> np.ndarray:
        """(n,) float64: tokens after each step."""
        return np.cumsum(np.rint(self.column("tok_per_sec") * self.column("seconds")))

    def minutes(self) -> np.ndarray:
        """(n,) float64: minutes of training after each step, without evaluations and saves."""
        return np.cumsum(self.column("seconds")) / 60

    def at(self, steps: int | list[int], reached: np.ndarray) -> np.ndarray:
        """What was reached after any `steps`, from what was `reached` after each recorded one; 0 before training."""
        return np.interp(steps, [0, *self.steps()], [0.0, *reached])

    def parts_of_a_step(self) -> dict[str, np.ndarray]:
        """{part: (n,) seconds}, which add up to the whole step; a part that was not recorded is in the first."""
        names = {"waiting for data": "loader_seconds", "optimizer": "optimizer_seconds"}
        parts = {part: self.column(name) for part, name in names.items() if f"train/{name}" in self.metrics}
        return {"forward and backward": self.column("seconds") - sum(parts.values()), **parts} if parts else {}

    def core(self) -> dict[str, Any] | None:
        """The newest scores on tasks, as `core_eval.summary` has them, with their name and step."""
        scored = [record for record in (*self.records, self.evaluation) if record.get("core")]
        if not scored:
            return None
        newest = sorted(scored, key=lambda record: record["step"])[-1]  # of the same step: evaluation.json
        name = "CORE" if newest["core"]["is_core"] else "tasks"
        return {**newest["core"], "name": name, "step": newest["step"]}


def read_run(folder: Path) -> Run:
    """The run in `folder`. Raises UserError if it holds nothing of one."""
    if not any((folder / name).exists() for name in ("metrics.jsonl", "config.json", "evaluation.json")):
        known = sorted(path.parent.name for path in paths.base_dir().glob("runs/*/config.json"))
        listed = f"runs in {paths.base_dir() / 'runs'}: {', '.join(known)}" if known else "train one first"
        raise UserError(f"{folder}: no run is there, neither metrics.jsonl nor config.json; {listed}")
    complaints, records = [], []
    metrics = _read_metrics(folder / "metrics.jsonl", complaints)
    config = _read_json(folder / "config.json", complaints)
    if config and config.get("format") != FORMAT:
        found = config.get("format", 1)
        complaints.append(f"config.json has format {found}, not {FORMAT}: its settings are left out")
        config = {}
    last = max(metrics.get("train/loss", ()), default=math.inf)
    for path in sorted(folder.glob("evaluation/step_*.json")):
        record = _read_json(path, complaints)
        if record.get("step", math.inf) <= last:  # later ones are of steps that a resume has taken back
            if "documents" in record:
                for earlier in records:
                    earlier.pop("documents", None)  # they are large
            records.append(record)
    evaluation = _read_json(folder / "evaluation.json", complaints)
    return Run(folder.name, folder, metrics, config, evaluation, records, complaints)


def _read_json(path, complaints):
    """The object in a JSON file; an empty one where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        if isinstance(value, dict):
            return value
        complaints.append(f"{path.name} could not be read: not a JSON object")
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        complaints.append(f"{path.name} could not be read: {error}")
    return {}


def _read_metrics(path, complaints):
    """{name: {step: value}} of metrics.jsonl, by step. The last row of a step counts."""
    metrics, unreadable = {}, 0
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    row = json.loads(line)
                    step = int(row.pop("step"))
                except (AttributeError, KeyError, TypeError, ValueError):
                    unreadable += 1
                    continue
                for name, value in row.items():
                    finite = isinstance(value, (int, float)) and math.isfinite(value)
                    metrics.setdefault(name, {})[step] = float(value) if finite else math.nan
    except OSError as error:
        complaints.append(f"metrics.jsonl could not be read: {error.strerror}")
    if unreadable:
        complaints.append(f"{unreadable} lines of metrics.jsonl could not be read; one being written, or cut by a kill")
    return {name: dict(sorted(values.items())) for name, values in metrics.items()}
