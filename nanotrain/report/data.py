"""What the folder of a run holds. Any of its files may be missing, cut short, or still be written to."""

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanotrain.errors import UserError
from nanotrain.store import FORMAT


@dataclass
class Run:
    """A run as its folder has it; what is missing is empty."""

    name: str
    folder: Path
    metrics: dict[str, dict[int, float]]  # {name: {step: value}}, by step; NaN for what is no finite number
    config: dict[str, Any]  # config.json
    evaluation: dict[str, Any]  # evaluation.json
    records: list[dict[str, Any]]  # evaluation/step_*.json by step
    complaints: list[str]  # what could not be read

    def column(self, name: str) -> np.ndarray:
        """(n,) float64: `train/<name>` of each of the n steps, NaN where it is missing."""
        values = self.metrics[f"train/{name}"]
        return np.array([values.get(step, math.nan) for step in self.metrics["train/loss"]], dtype=np.float64)

    def tokens(self, steps: list[int]) -> np.ndarray:
        """Tokens of training after each of `steps`, float64; 0 before the first."""
        of_each_step = np.rint(self.column("tok_per_sec") * self.column("seconds"))
        return np.interp(steps, [0, *self.metrics["train/loss"]], [0.0, *np.cumsum(of_each_step)])

    def minutes(self, steps: list[int]) -> np.ndarray:
        """Minutes of training after each of `steps`, float64, without evaluations and saves."""
        return np.interp(steps, [0, *self.metrics["train/loss"]], [0.0, *np.cumsum(self.column("seconds") / 60)])

    def bits_per_byte(self) -> dict[int, float]:
        """{step: bits per byte on validation sequences} of the evaluations during training."""
        return {step: bpb for step, bpb in self.metrics["val/bpb"].items() if math.isfinite(bpb)}

    def core(self) -> dict[str, Any]:
        """The newest scores on tasks, as `core_eval.summary` has them, with their step; empty without any."""
        scored = [record for record in (self.evaluation, *self.records) if record.get("core")]
        newest = max(scored, key=lambda record: record["step"], default={})  # of the same step: evaluation.json
        return {**newest["core"], "step": newest["step"]} if newest else {}


def read_run(folder: Path) -> Run:
    """The run in `folder`. Raises UserError if it holds nothing of one."""
    if not any((folder / name).exists() for name in ("metrics.jsonl", "config.json", "evaluation.json")):
        raise UserError(f"{folder}: no run is there: give the name or the folder of one, or train it first")
    complaints = []
    metrics = _read_metrics(folder / "metrics.jsonl", complaints)
    config = _read_json(folder / "config.json", complaints)
    if config and config.get("format") != FORMAT:
        complaints.append(f"config.json has format {config.get('format', 1)}, not {FORMAT}: its settings are left out")
        config = {}
    last = max(metrics["train/loss"], default=math.inf)
    records = [_read_json(path, complaints) for path in sorted(folder.glob("evaluation/step_*.json"))]
    records = [record for record in records if record.get("step", math.inf) <= last]  # not what a resume took back
    evaluation = _read_json(folder / "evaluation.json", complaints)
    return Run(folder.name, folder, metrics, config, evaluation, records, complaints)


def _read_json(path, complaints):
    """The object in a JSON file; an empty one where there is none."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8", errors="replace")))
    except FileNotFoundError:
        return {}
    except (OSError, TypeError, ValueError) as error:
        complaints.append(f"{path.name} could not be read: {error}")
        return {}


def _read_metrics(path, complaints):
    """{name: {step: value}} of metrics.jsonl, by step. The last row of a step counts."""
    metrics, unreadable = defaultdict(dict), 0
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for line in lines:
        try:
            row = json.loads(line)
            step = int(row.pop("step"))
        except (AttributeError, KeyError, TypeError, ValueError):
            unreadable += 1
            continue
        for name, value in row.items():
            finite = isinstance(value, (int, float)) and math.isfinite(value)
            metrics[name][step] = float(value) if finite else math.nan
    if unreadable:
        complaints.append(f"{unreadable} lines of metrics.jsonl could not be read; one being written, or cut by a kill")
    return defaultdict(dict, {name: dict(sorted(values.items())) for name, values in metrics.items()})
