"""Reading a run's folder. Any file may be missing, truncated or still being written."""

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
    """The contents of a run's folder; missing parts are empty."""

    name: str
    folder: Path
    metrics: dict[str, dict[int, float]]  # {name: {step: value}}, sorted by step; NaN if not a finite number
    config: dict[str, Any]  # config.json
    evaluation: dict[str, Any]  # evaluation.json
    records: list[dict[str, Any]]  # evaluation/step_*.json by step
    problems: list[str]  # what could not be read

    def column(self, name: str) -> np.ndarray:
        """`train/<name>` at every training step, (n,) float64; NaN where missing."""
        values = self.metrics[f"train/{name}"]
        return np.array([values.get(step, math.nan) for step in self.metrics["train/loss"]], dtype=np.float64)

    def tokens(self, steps: list[int]) -> np.ndarray:
        """Number of training tokens up to each of `steps`, float64."""
        return self._total(steps, np.rint(self.column("tok_per_sec") * self.column("seconds")))

    def minutes(self, steps: list[int]) -> np.ndarray:
        """Minutes of training up to each of `steps`, float64, without evaluations and checkpoints."""
        return self._total(steps, self.column("seconds") / 60)

    def _total(self, steps, per_step):
        return np.interp(steps, [0, *self.metrics["train/loss"]], [0.0, *np.cumsum(per_step)])

    def bits_per_byte(self) -> dict[int, float]:
        """{step: bits per byte on validation sequences} of the evaluations during training."""
        return {step: bpb for step, bpb in self.metrics["val/bpb"].items() if math.isfinite(bpb)}

    def core(self) -> dict[str, Any]:
        """The newest `core_eval.summary` with its step; {} if there is none."""
        scored = [record for record in (self.evaluation, *self.records) if record.get("core")]
        newest = max(scored, key=lambda record: record["step"], default={})  # evaluation.json wins ties
        return {**newest["core"], "step": newest["step"]} if newest else {}


def read_run(folder: Path) -> Run:
    """Read the run in `folder`. Raises UserError if there is none."""
    if not any((folder / name).exists() for name in ("metrics.jsonl", "config.json", "evaluation.json")):
        raise UserError(f"{folder}: no run is there: give the name or the folder of one, or train it first")
    problems = []
    metrics, config = _read_metrics(folder / "metrics.jsonl", problems), _read_json(folder / "config.json", problems)
    if config and config.get("format") != FORMAT:
        problems.append(f"config.json has format {config.get('format', 1)}, not {FORMAT}: its settings are not shown")
        config = {}
    last, evaluation = max(metrics["train/loss"], default=math.inf), _read_json(folder / "evaluation.json", problems)
    records = [_read_json(path, problems) for path in sorted(folder.glob("evaluation/step_*.json"))]
    records = [record for record in records if record.get("step", math.inf) <= last]  # drops steps undone by a resume
    return Run(folder.name, folder, metrics, config, evaluation, records, problems)


def _read_json(path, problems):
    """The object in a JSON file, or {}."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8", errors="replace"))) if path.exists() else {}
    except (OSError, TypeError, ValueError) as error:
        problems.append(f"{path.name} could not be read: {error}")
        return {}


def _read_metrics(path, problems):
    """{name: {step: value}} of metrics.jsonl, sorted by step. A step's last row counts."""
    metrics, unreadable = defaultdict(dict), 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
            step = int(row.pop("step"))
        except (AttributeError, KeyError, TypeError, ValueError):
            unreadable += 1
            continue
        for name, value in row.items():
            metrics[name][step] = float(value) if isinstance(value, (int, float)) and math.isfinite(value) else math.nan
    if unreadable:
        problems.append(f"{unreadable} lines of metrics.jsonl could not be read: being written, or cut off by a kill")
    return defaultdict(dict, {name: dict(sorted(values.items())) for name, values in metrics.items()})
