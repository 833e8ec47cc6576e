"""Curves and bars as PNG images, drawn on white by matplotlib, which is optional and imported only to draw."""

import io
import logging
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
NAMES = (*CURVES, "tasks")
COLOURS = ["#1f5fb4", "#c2410c", "#0f766e", "#8a3ab9", "#946200", "#4a5560", "#be185d", "#3f6212"]
STYLE = {
    "axes.prop_cycle": f"cycler(color={COLOURS}, linestyle={['-', '--', ':', '-.'] * 2})",  # not by colour alone
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dfe3e8",
    "axes.formatter.useoffset": False,
    "axes.titlelocation": "left",
    "font.size": 11.5,
    "text.parse_math": False,  # a dollar sign in a name is one
}


def draw(runs: Sequence[Run]) -> dict[str, tuple[bytes, str]]:
    """{name: (PNG, what it shows in words)} of the pictures of some runs. Raises ImportError without matplotlib."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it would speak of a cache of fonts that it makes first
    from matplotlib import style
    from matplotlib.figure import Figure

    drawn, cores = {}, {run.name: core for run in runs if (core := run.core())}
    with style.context(["default", STYLE]):  # whatever this user's style is
        for name, panels in CURVES.items():
            if any(panels[0][1] in run.metrics for run in runs):
                figure = Figure(figsize=(5, 5.4), dpi=200, layout="constrained")
                pairs = zip(figure.subplots(2), panels, strict=True)
                drawn[name] = _finished(figure, [_draw_curves(axes, runs, *panel) for axes, panel in pairs])
        if cores:
            labels = sorted({label for core in cores.values() for label in core["tasks"]})
            height = 0.9 + len(labels) * max(0.3, 0.16 * len(cores))
            figure = Figure(figsize=(5, height), dpi=200, layout="constrained")
            drawn["tasks"] = _finished(figure, [_draw_bars(figure.subplots(), labels, cores)])
    return drawn


def _finished(figure, words):
    for axes in figure.axes:
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue(), " ".join(words)


def _draw_curves(axes, runs, title, metric, unit):
    """Draw a metric of each run: its values, where they are many also their running mean, and a cross at the bottom for
    a value that is not finite. Returns in words what that shows.
    """
    told = []
    for run in runs:
        values = run.of(metric)
        x = run.at(list(values), run.tokens() / 1e6 if unit == TOKENS else run.minutes())
        y = np.array(list(values.values()))
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
            axes.yaxis.set_major_formatter("{x:g}")
        told.append(f"{run.name} from {y[0]:.4g} to {y[-1]:.4g} at {x[-1]:.4g} {unit}")
        told[-1] += f", lowest {y.min():.4g}, highest {y.max():.4g}{', some not finite' if len(lost) else ''}"
    axes.set(title=title, xlabel=unit)
    return f"{title}: {'; '.join(told)}."


def _draw_bars(axes, labels, cores):
    """Draw the centred score of each task, {run: `Run.core`}. Returns it in words."""
    told, thickness = [], 0.8 / len(cores)
    for number, (name, core) in enumerate(cores.items()):
        tasks = core["tasks"]
        places = [labels.index(label) + (number - (len(cores) - 1) / 2) * thickness for label in tasks]
        scores = [task["centered"] for task in tasks.values()]
        errors = [task["standard_error"] / (1 - task["baseline"]) for task in tasks.values()]
        axes.barh(places, scores, 0.9 * thickness, xerr=errors, label=name, error_kw={"capsize": 2.5})
        told.append(f"{name}: {', '.join(f'{label} {score:.3f}' for label, score in zip(tasks, scores, strict=True))}")
    axes.axvline(0, color="black", linestyle="-", linewidth=1)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set(title="centred score of each task", xlabel="0: guessing, 1: all right; with standard errors")
    return f"Centred score of each task: {'; '.join(told)}."
