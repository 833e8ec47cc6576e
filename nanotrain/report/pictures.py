"""Curves as SVG that take text and grid colours from the page, so that they work in light and dark."""

import math
from collections.abc import Sequence
from html import escape

import numpy as np

from nanotrain.report.data import Run

TOKENS, MINUTES = "million tokens", "minutes of training"
CURVES = {  # {picture: (title, metric, x axis)}
    "bits_per_byte": ("validation, bits per byte", "val/bpb", TOKENS),
    "loss": ("training loss, nats per token", "train/loss", TOKENS),
    "bits_per_byte_by_time": ("validation, bits per byte", "val/bpb", MINUTES),
    "loss_by_time": ("training loss, nats per token", "train/loss", MINUTES),
    "tasks": ("CORE or tasks, centered accuracy", "core/core_metric", TOKENS),
    "learning_rate": ("learning rate of the hidden matrices", "train/lr", TOKENS),
    "gradient_norm": ("gradient norm", "train/grad_norm", TOKENS),
    "speed": ("tokens per second", "train/tok_per_sec", TOKENS),
}
COLOURS = ["#2f7fd6", "#d9622b", "#1a9c84", "#9c62cf", "#a8831f", "#7a8894", "#d6458a", "#6b9a2e"]  # on white and black
DASHES = ["none", "7 3", "2 2", "7 2 2 2"]  # colour alone must not tell runs apart
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM, LINE = 480, 200, 62, 14, 28, 42, 17  # HEIGHT without TOP and BOTTOM
MAX_POINTS, MAX_DOTS = 400, 30  # points per curve; a curve with at most MAX_DOTS values has a dot for each
QUANTILE = 0.999  # larger values are cut off


def draw(runs: Sequence[Run]) -> dict[str, str]:
    """{name: SVG} of all curves that some run has."""
    drawn = {}
    for name, (title, metric, unit) in CURVES.items():
        curves = [curve(run, metric, unit) for run in runs]
        if any(len(y) for _, y, _ in curves):
            drawn[name] = _picture(title, unit, [run.name for run in runs], curves)
    return drawn


def curve(run: Run, metric: str, unit: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x, y) of the finite values of a metric, and x of the others."""
    steps, y = list(run.metrics[metric]), np.array(list(run.metrics[metric].values()))
    x = run.tokens(steps) / 1e6 if unit == TOKENS else run.minutes(steps)
    finite = np.isfinite(y)
    return x[finite], y[finite], x[~finite]


def running_mean(values: np.ndarray) -> np.ndarray:
    """Means over windows of a hundredth of `values`; the first one is at the end of the first window."""
    width = len(values) // 100 + 1
    return np.convolve(values, np.ones(width) / width, "valid")


def ticks(low: float, high: float) -> list[tuple[float, str]]:
    """About five round numbers from `low` to `high`, with their labels."""
    exponent = math.floor(math.log10((high - low) / 5))
    step = next(factor * 10**exponent for factor in (1, 2, 5, 10) if high - low <= 6 * factor * 10**exponent)
    values = np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step
    return [(value, f"{value:,.{max(-math.floor(math.log10(step)), 0)}f}") for value in values]


def _picture(title, unit, names, curves):
    values, top = np.concatenate([y for _, y, _ in curves]), TOP + LINE * len(names) * (len(names) > 1)
    bottom, last = top + HEIGHT, max(x.max() for x, y, _ in curves if len(y)) or 1
    low, high = values.min(), np.quantile(values, QUANTILE)
    margin = (high - low) / 20 or abs(high) / 2 or 1
    low, high = low - margin, high + margin

    def across(x):
        return LEFT + (WIDTH - LEFT - RIGHT) * x / last

    def down(y):
        return bottom - HEIGHT * (np.clip(y, low, high) - low) / (high - low)

    def text(x, y, anchor, content, colour="currentColor"):
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(content)}</text>'

    def line(x, y, style):
        every = -(len(x) // MAX_POINTS + 1)  # backwards, to include the last point
        points = (f"{a:.1f} {b:.1f}" for a, b in zip(across(x[::every]), down(y[::every]), strict=True))
        return f'<path d="M{"L".join(points)}" fill="none" {style}/>'

    parts = [text(LEFT, 18, "start", title), text(WIDTH - RIGHT, bottom + 36, "end", unit)]
    parts += [text(across(x), bottom + 18, "middle", label) for x, label in ticks(0, last)]
    for y, label in ticks(low, high):
        parts.append(text(LEFT - 6, down(y) + 4, "end", label))
        parts.append(f'<path d="M{LEFT} {down(y):.1f}H{WIDTH - RIGHT}" stroke="currentColor" opacity="0.2"/>')
    for number, (name, (x, y, lost)) in enumerate(zip(names, curves, strict=True)):
        if not len(y):
            continue
        colour, mean = COLOURS[number % len(COLOURS)], running_mean(y)
        style = f'stroke="{colour}" stroke-width="2" stroke-dasharray="{DASHES[number % len(DASHES)]}"'
        if len(names) > 1:
            parts.append(text(LEFT + 34, TOP + LINE * number + 10, "start", name))
            parts.append(f'<path d="M{LEFT} {TOP + LINE * number + 5}h28" {style}/>')
        if len(mean) < len(y):
            parts.append(line(x, y, f'stroke="{colour}" opacity="0.3"'))
        parts.append(line(x[len(y) - len(mean) :], mean, style))
        dots = zip(across(x), down(y), strict=True) if len(y) <= MAX_DOTS else ()
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in dots]
        parts += [text(at, bottom, "middle", "×", colour) for at in across(lost)]
    box = f'viewBox="0 0 {WIDTH} {bottom + BOTTOM}" font-family="system-ui, sans-serif" font-size="14"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{title}" {box}>{"".join(parts)}</svg>'
