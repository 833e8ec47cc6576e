"""Curves and bars as PNG images. matplotlib, which is optional, is imported only when something is drawn.

Everything is drawn on white; the page turns the pictures over where it is dark (`report_page.DARK_PICTURES`).
"""

import contextlib
import io
import logging
from dataclasses import dataclass, field

import numpy as np

INK, MUTED, GRID, PAPER = "#1b1f24", "#59636e", "#dfe3e8", "#ffffff"
# told apart also without colours: the dashes differ, and so do lightness and markers
COLOURS = ("#1f5fb4", "#c2410c", "#0f766e", "#8a3ab9", "#946200", "#4a5560", "#be185d", "#3f6212")
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1, 2)))
MARKERS = "osD^vPX*"
POINTS, MARKS = 400, 200  # of a curve, and of the steps that are marked on it, at most
WIDTH_INCHES, PANEL_INCHES, DPI = 5.0, 2.7, 200
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # which comes with matplotlib
    "font.size": 11.5,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlelocation": "left",
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "legend.frameon": True,
    "legend.framealpha": 0.9,
    "legend.edgecolor": GRID,
    "legend.fontsize": 10.5,
}


@dataclass(frozen=True)
class Curve:
    """x, y: float arrays; NaN in y is a gap. low, high: a band around it. lost: the x of steps without a value."""

    label: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    lost: np.ndarray = field(default_factory=lambda: np.zeros(0))


@dataclass(frozen=True)
class Panel:
    """One pair of axes. stacked: the curves, which have the same x, lie on top of each other. log: the y axis is
    logarithmic where the values differ by more than a factor of 20.
    """

    title: str
    x_label: str
    curves: list[Curve]
    stacked: bool = False
    log: bool = False

    def is_log(self) -> bool:
        """Whether the y axis is logarithmic."""
        values = np.concatenate([curve.y for curve in self.curves])
        values = values[np.isfinite(values)]
        return self.log and values.min() > 0 and values.max() > 20 * values.min()

    def in_words(self) -> str:
        """Where each curve begins and ends, its lowest and its highest."""
        told = []
        for curve in self.curves:
            x, y = curve.x[np.isfinite(curve.y)], curve.y[np.isfinite(curve.y)]
            told.append(
                f"{curve.label} from {y[0]:.4g} to {y[-1]:.4g} at {x[-1]:.4g} {self.x_label}, lowest {y.min():.4g}, "
                f"highest {y.max():.4g}{', some steps without a value' if len(curve.lost) else ''}"
            )
        return f"{self.title}: {'; '.join(told)}."


@dataclass(frozen=True)
class Bars:
    """Horizontal bars with errors: for each of `labels` one of each series, (name, values, errors)."""

    title: str
    x_label: str
    labels: list[str]
    series: list[tuple[str, list[float], list[float]]]


def curve_of(label: str, x: np.ndarray, values: np.ndarray) -> Curve:
    """The curve of (n,) values at x, as means of at most POINTS bins of equal size with their lowest and highest; NaN
    is left out of a bin.
    """
    count = len(values)
    edges = np.unique(np.linspace(0, count, min(POINTS, count) + 1).astype(np.int64))
    starts, finite = edges[:-1], np.isfinite(values)
    counts = np.add.reduceat(finite.astype(np.int64), starts)
    means = np.add.reduceat(np.where(finite, values, 0.0), starts) / np.maximum(counts, 1)
    lowest = np.minimum.reduceat(np.where(finite, values, np.inf), starts)
    highest = np.maximum.reduceat(np.where(finite, values, -np.inf), starts)
    means, lowest, highest = (np.where(counts > 0, found, np.nan) for found in (means, lowest, highest))
    lost = x[~finite]
    return Curve(label, x[edges[1:] - 1], means, lowest, highest, lost[:: len(lost) // MARKS + 1])


def png_of(*parts: Panel | Bars) -> bytes:
    """Panels or Bars below each other as the bytes of a PNG. Raises ImportError without matplotlib."""
    with _quiet("matplotlib"):
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        heights = [_height(part) for part in parts]
        with matplotlib.rc_context():
            matplotlib.rcdefaults()  # whatever this user's style is
            matplotlib.rcParams.update(STYLE)
            figure = Figure(figsize=(WIDTH_INCHES, sum(heights)), dpi=DPI, layout="constrained")
            FigureCanvasAgg(figure)
            all_axes = figure.subplots(len(parts), 1, squeeze=False, height_ratios=heights)[:, 0]
            for axes, part in zip(all_axes, parts, strict=True):
                (_draw_bars if isinstance(part, Bars) else _draw_panel)(axes, part)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


@contextlib.contextmanager
def _quiet(name):
    """Without the warnings of a logger, as of a cache of fonts that takes a while or cannot be written."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _height(part):
    if isinstance(part, Bars):
        return 0.9 + len(part.labels) * max(0.3, 0.16 * len(part.series))
    return PANEL_INCHES


def _draw_panel(axes, panel):
    if panel.is_log():
        axes.set_yscale("log")
    if panel.stacked:
        colours = [COLOURS[number % len(COLOURS)] for number in range(len(panel.curves))]
        x, heights = panel.curves[0].x, [np.nan_to_num(curve.y) for curve in panel.curves]
        axes.stackplot(x, heights, labels=[curve.label for curve in panel.curves], colors=colours, alpha=0.8)
    else:
        for number, curve in enumerate(panel.curves):
            _draw_curve(axes, curve, number)
    axes.set_title(panel.title)
    axes.set_xlabel(panel.x_label)
    axes.margins(x=0.02)
    if panel.stacked:
        axes.set_ylim(bottom=0)
    if len(panel.curves) > 1:
        axes.legend(loc="best")


def _draw_curve(axes, curve, number):
    colour = COLOURS[number % len(COLOURS)]
    marker = MARKERS[number % len(MARKERS)] if np.isfinite(curve.y).sum() <= 30 else None
    dashes = DASHES[number % len(DASHES)]
    axes.plot(
        curve.x,
        curve.y,
        color=colour,
        linestyle=dashes,
        marker=marker,
        markersize=3.5,
        linewidth=1.5,
        label=curve.label,
    )
    if curve.low is not None and not np.array_equal(curve.low, curve.high, equal_nan=True):
        axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.2, linewidth=0)
    if len(curve.lost):
        bottom = axes.get_xaxis_transform()  # y from 0 at the bottom of the axes to 1 at the top
        axes.plot(curve.lost, np.full(len(curve.lost), 0.03), "x", color=colour, transform=bottom, clip_on=False)


def _draw_bars(axes, bars):
    places, thickness = np.arange(len(bars.labels))[::-1], 0.8 / len(bars.series)
    for number, (name, values, errors) in enumerate(bars.series):
        offset = (len(bars.series) - 1) / 2 - number
        axes.barh(
            places + offset * thickness,
            values,
            thickness * 0.9,
            xerr=errors,
            label=name,
            color=COLOURS[number % len(COLOURS)],
            error_kw={"ecolor": INK, "elinewidth": 1.2, "capsize": 2.5},
        )
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yticks(places, bars.labels, color=INK)
    axes.set_ylim(-0.6, len(bars.labels) - 0.4)
    axes.grid(visible=False, axis="y")
    axes.set_title(bars.title)
    axes.set_xlabel(bars.x_label)
    if len(bars.series) > 1:
        axes.legend(loc="best")
