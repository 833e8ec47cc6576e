"""Scaling series: a table of evaluated runs, their law of loss against compute, and the compute one series saves.

python dev/ladder.py NAME                    the series trained by `bash dev/ladder.sh NAME`
python dev/ladder.py NAME OTHER              also how much compute OTHER saves at the same loss
python dev/ladder.py RUN_FOLDER ...          any runs evaluated with scripts/base_eval, as one series
python dev/ladder.py ... --plot=FILE.png     draw them too (needs matplotlib, extra "report")
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from nanotrain import errors, paths
from nanotrain.errors import UserError


@dataclass(frozen=True)
class Point:
    """One evaluated run."""

    name: str
    depth: int
    width: int
    weights: int  # of matrices and head
    steps: int
    tokens: int
    flops: float
    bpb: float  # bits per byte of whole validation documents


def read(folder):
    """Read a run's Point from its folder. Raises UserError if the run was not evaluated."""
    try:
        evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{error.filename} is missing: evaluate the run with python -m scripts.base_eval --run-name={folder}"
        ) from None
    shape, plan = config["model_config"], config["plan"]
    return Point(
        folder.name,
        shape["num_layers"],
        shape["num_heads"] * shape["head_dim"],
        plan["parameters"]["matrix"] + plan["parameters"]["unembedding"],
        evaluation["step"],
        evaluation["tokens"],
        float(evaluation["tokens"] * plan["flops_per_token"]),
        evaluation["doc_bpb"],
    )


def series_of(names):
    """{name: points sorted by FLOPs} for names of series, or {"runs": points} for folders of runs."""
    if all(Path(name).is_dir() for name in names):
        found = {"runs": [Path(name) for name in names]}
    else:
        runs = sorted((paths.base_dir() / "runs").glob("ladder-*"))
        # split at the last dash: another series may be called NAME-something
        found = {name: [run for run in runs if run.name.rpartition("-")[0] == f"ladder-{name}"] for name in names}
    for name, folders in found.items():
        if not folders:
            raise UserError(f"no run of a series {name!r}: train it with bash dev/ladder.sh {name}")
    return {name: sorted(map(read, folders), key=lambda point: point.flops) for name, folders in found.items()}


def best(points):
    """The points that no other point beats with as few FLOPs."""
    return [
        point for point in points if not any(other.flops <= point.flops and other.bpb < point.bpb for other in points)
    ]


def fit(points):
    """(a, b) of bpb = a * flops ** -b, fitted to the best points by least squares in logarithms."""
    points = best(points)
    if len(points) < 2:
        raise UserError("a law needs at least two runs, the larger with lower loss")
    slope, intercept = np.polyfit(np.log([p.flops for p in points]), np.log([p.bpb for p in points]), 1)
    return float(np.exp(intercept)), float(-slope)


def saved_compute(law, points):
    """For each point, how many times its FLOPs the series of `law` needs for the same loss."""
    a, b = law
    return [(a / point.bpb) ** (1 / b) / point.flops for point in points]


def table(series):
    """Markdown of all points, the laws, and the compute saved by each series relative to the first."""
    lines = [
        "| run | depth | width | weights, M | steps | tokens, M | FLOPs | doc bpb |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for point in (point for points in series.values() for point in points):
        lines.append(
            f"| {point.name} | {point.depth} | {point.width} | {point.weights / 1e6:.2f} | {point.steps:,}"
            f" | {point.tokens / 1e6:.2f} | {point.flops:.2e} | {point.bpb:.4f} |"
        )
    lines.append("")
    laws = {name: fit(points) for name, points in series.items()}
    lines += [f"{name}: bpb = {a:.3g} * FLOPs^-{b:.4f}" for name, (a, b) in laws.items()]
    first, *others = series
    for name in others:
        factors = ", ".join(f"{factor:.2f}" for factor in saved_compute(laws[first], series[name]))
        lines.append(f"{first} needs {factors} times the FLOPs of {name} for the same loss")
    return "\n".join(lines)


def plot(series, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, points in series.items():
        for depth in sorted({point.depth for point in points}):
            same = [point for point in points if point.depth == depth]
            axes.plot([p.flops for p in same], [p.bpb for p in same], "o-", label=f"{name}, depth {depth}")
        a, b = fit(points)
        grid = np.geomspace(points[0].flops, points[-1].flops)
        axes.plot(grid, a * grid**-b, "--", color="gray", linewidth=1)
    axes.set(xscale="log", xlabel="training FLOPs", ylabel="bits per byte of whole validation documents")
    axes.xaxis.set_minor_formatter("")  # minor labels would overlap
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main(names, plot_path):
    series = series_of(names)
    print(table(series))
    if plot_path:
        plot(series, plot_path)


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--plot=")]
    plots = [argument.removeprefix("--plot=") for argument in sys.argv[1:] if argument not in arguments]
    if not arguments or arguments[0].startswith("-"):
        print(__doc__.strip())
        sys.exit(0 if "--help" in arguments else 2)
    errors.run(lambda: main(arguments, plots[-1] if plots else None))
