"""Curves as PNG images, drawn on white by matplotlib, which is optional and imported only to draw."""

import io
import os
from collections.abc import Sequence

import numpy as np

from nanotrain.report.data import Run

LOSS, BPB = "train loss, nats per token", "validation, bits per byte"
TOKENS, MINUTES = "million tokens", "minutes of training"
CURVES = {  # {picture: (title, metric, what it is drawn against) of the two axes below one another}
    "loss": ((LOSS, "train/loss", TOKENS), (LOSS, "train/loss", MINUTES)),
    "bits_per_byte": ((BPB, "val/bpb", TOKENS), (BPB, "val/bpb", MINUTES)),
    "schedule": (("learning rate of matrices", "train/lr", TOKENS), ("gradient norm", "train/grad_norm", TOKENS)),
    "speed": (("tokens per second", "train/tok_per_sec", TOKENS), ("seconds of a step", "train/seconds", TOKENS)),
}
COLOURS = ["#1f5fb4", "#c2410c", "#0f766e", "#8a3ab9", "#946200", "#4a5560", "#be185d", "#3f6212"]
STYLE = {
    "axes.prop_cycle": f"cycler(color={COLOURS}, linestyle={['-', '--', ':', '-.'] * 2})",  # not by colour alone
    "axes.grid": True,
    "grid.alpha": 0.4,
    "axes.formatter.useoffset": False,
    "text.parse_math": False,  # a dollar sign in a name is one
}


def draw(runs: Sequence[Run]) -> dict[str, bytes]:
    """{name: PNG} of the pictures of some runs. Raises ImportError without matplotlib."""
    os.environ.pop("MPLBACKEND", None)  # matplotlib refuses one that is not installed, such as a notebook's
    from matplotlib import style
    from matplotlib.figure import Figure

    drawn = {}
    with style.context(["default", STYLE]):  # whatever this user's style is
        for name, panels in CURVES.items():
            if any(run.metrics[panels[0][1]] for run in runs):
                figure = Figure(figsize=(5, 5.4), dpi=200, layout="constrained")
                for axes, panel in zip(figure.subplots(2), panels, strict=True):
                    _draw_curves(axes, runs, *panel)
                drawn[name] = _png(figure)
    return drawn


def _png(figure):
    for axes in figure.axes:
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_curves(axes, runs, title, metric, unit):
    """Draw each run's values, where they are many also their running mean, and a cross where one is not finite."""
    for run in runs:
        steps, y = list(run.metrics[metric]), np.array(list(run.metrics[metric].values()))
        x = run.tokens(steps) / 1e6 if unit == TOKENS else run.minutes(steps)
        finite = np.isfinite(y)
        if not finite.any():
            continue
        lost, x, y = x[~finite], x[finite], y[finite]
        width = len(y) // 100 + 1
        mean = np.convolve(y, np.ones(width) / width, "valid")
        (line,) = axes.plot(x[width - 1 :], mean, label=run.name, marker="." if len(y) <= 30 else None)
        if width > 1:
            axes.plot(x, y, color=line.get_color(), linestyle="-", linewidth=0.6, alpha=0.3)
        axes.plot(lost, np.full(len(lost), 0.03), "x", color=line.get_color(), transform=axes.get_xaxis_transform())
        if metric == "train/grad_norm" and y.max() > 20 * y.min() > 0:
            axes.set_yscale("log")
    axes.set(title=title, xlabel=unit)
