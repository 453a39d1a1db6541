"""Lines, bars, points with intervals and heat maps, as SVG and PNG.

A plot is drawn twice: as a separate file (with a white background, a title and a legend), and for a page,
whose style sheet sets colors, font and legend. The same input gives the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

# Colors by role. A page replaces each with a variable of its style sheet, so that dark pages get light lines.
# The values here are those for a light background.
INK, MUTED, RULE = "#24292f", "#6a737d", "#dcdcd8"
PALETTE = ("#1f6fb2", "#c8571b", "#2c8a57", "#8a4fb0", "#b3324f", "#8a6d14", "#0f8b8d", "#56606b")
# Matplotlib's names of the markers, with the outline that a page's legend draws (in a box of 28 × 10).
MARKERS = {
    "o": "M14 1.5a3.5 3.5 0 1 0 0 7a3.5 3.5 0 1 0 0-7z",
    "s": "M11 2h6v6h-6z",
    "^": "M14 1.2l3.9 7.2h-7.8z",
    "D": "M14 .8l4.2 4.2-4.2 4.2-4.2-4.2z",
    "v": "M14 8.8l3.9-7.2h-7.8z",
    "P": "M12.8 1.5h2.4v2.3h2.3v2.4h-2.3v2.3h-2.4v-2.3h-2.3v-2.4h2.3z",
    "X": "M10.8 3.3l1.7-1.7 1.5 1.6 1.5-1.6 1.7 1.7-1.6 1.7 1.6 1.7-1.7 1.7-1.5-1.6-1.5 1.6-1.7-1.7 1.6-1.7z",
    "h": "M14 1l3.5 2v4l-3.5 2-3.5-2v-4z",
}
WIDTH = 4.4  # inches
ROW_LABEL = 28  # longer names of rows are wrapped after this number of characters
NEUTRAL = 7  # the index of gray in the palette
VERDICTS = {
    "best": (0, "best, or not significantly different from the best"),
    "tied": (0, "best, or not significantly different from the best"),
    "worse": (NEUTRAL, "significantly worse than the best"),
}
LEGEND_WIDTH = 62  # characters that fit below a plot
_VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule"} | {c: f"series-{i}" for i, c in enumerate(PALETTE)}

_STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 10.0,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.color": RULE,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0.0,
    "text.parse_math": False,  # names are names, not formulas
}


@dataclass(frozen=True, eq=False)
class Series:
    """One line of a plot.

    Attributes:
        label: the name in the legend.
        colour: an index into the palette.
        x, y: the coordinates of the points.
        half_width: half the width of the interval of each y; nan if it is not known, None if no point has an
            interval.
        dashed: whether to draw a dashed line, to distinguish a second kind of line.
        x_half_width: the same as ``half_width`` for x.
        shape: a key of ``MARKERS``; by default it depends on ``colour``.
    """

    label: str
    colour: int
    x: np.ndarray
    y: np.ndarray
    half_width: np.ndarray | None = None
    dashed: bool = False
    x_half_width: np.ndarray | None = None
    shape: str = ""

    @property
    def palette(self) -> int:
        return self.colour % len(PALETTE)

    @property
    def ink(self) -> str:
        return PALETTE[self.palette]

    @property
    def marker(self) -> str:
        # when the palette is used a second time, the markers have other shapes
        return self.shape or list(MARKERS)[(self.colour + self.colour // len(PALETTE)) % len(MARKERS)]

    @property
    def marker_path(self) -> str:
        return MARKERS[self.marker]


@dataclass(frozen=True, eq=False)
class Plot:
    """A titled set of lines.

    Attributes:
        name: the file name without its extension.
        title: the heading of the plot.
        description: a text for readers who cannot see the plot.
        series: the lines.
        x_label, y_label: the labels of the axes.
        ticks: positions on the x axis and their labels. If empty, x is a quantity like y.
        points: whether to draw a marker with its interval at each point, and to shift lines slightly so that
            they do not cover each other. Otherwise plain lines are drawn.
        connected: whether to draw lines between the points.
        logarithmic: whether the y axis is logarithmic if the values span a factor of ten or more.
        boundaries: the x positions of thin vertical lines.
        bars: whether to draw a bar from 0 to each point instead of a marker.
    """

    name: str
    title: str
    description: str
    series: Sequence[Series]
    x_label: str
    ticks: Sequence[tuple[float, str]]
    points: bool = True
    connected: bool = True
    logarithmic: bool = False
    boundaries: Sequence[float] = ()
    y_label: str = ""
    bars: bool = False

    @property
    def legend(self) -> list[Series]:
        """One series for each label, in order."""
        return list({series.label: series for series in reversed(self.series)}.values())[::-1]


@dataclass(frozen=True, eq=False)
class HeatMap:
    """A matrix as colored cells with numbers. Cells that are nan are empty.

    Attributes:
        name, title, description: see :class:`Plot`.
        values: float (rows, columns).
        rows, columns: the names of the rows and columns.
        row_label, column_label: what the rows and columns are.
        decimals: the number of decimals to show.
        scale: the values with the palest and the darkest color; by default the smallest and the largest value
            of each column.
    """

    name: str
    title: str
    description: str
    values: np.ndarray
    rows: Sequence[str]
    columns: Sequence[str]
    row_label: str
    column_label: str
    decimals: int
    scale: tuple[float, float] | None = None
    points: bool = False

    @property
    def legend(self) -> list[Series]:
        """Empty, because the cells show their numbers."""
        return []


@dataclass(frozen=True, eq=False)
class Ranking:
    """The mean of each system with its interval, one row per system, best first.

    ``half_widths`` is half the width of each interval, nan if it is not known. ``verdicts`` has a key of
    ``VERDICTS`` for each row, which determines its color.
    """

    name: str
    title: str
    description: str
    labels: Sequence[str]
    values: np.ndarray
    half_widths: np.ndarray
    verdicts: Sequence[str]
    points: bool = True

    @property
    def legend(self) -> list[Series]:
        """One entry for each verdict that occurs."""
        none = np.empty(0)
        texts = {VERDICTS[verdict]: None for verdict in self.verdicts if verdict in VERDICTS}
        return [Series(text, color, none, none, shape="o") for color, text in texts]


Drawing = Plot | HeatMap | Ranking


def files(plot: Drawing) -> dict[str, bytes]:
    """The plot as separate files, ``.svg`` and ``.png``, on a white background.

    In the SVG file, text is drawn as outlines, so that it looks the same everywhere. The PNG file has 200
    dots per inch.
    """
    with mpl.rc_context({**_STYLE, "svg.fonttype": "path", "svg.hashsalt": plot.name}):
        figure = _draw(plot, alone=True)
        svg = _print(figure, "svg", metadata={"Date": None})
        return {".svg": svg, ".png": _print(figure, "png", dpi=200)}


def svg_element(plot: Drawing) -> str:
    """The plot as an ``<svg>`` element for a page, without title, legend and background.

    It uses the page's variables ``--ink``, ``--muted``, ``--rule`` and ``--series-0`` … as colors, the page's
    font, and the full width of its container. Ids contain the plot's name, so that a page can have several
    plots.
    """
    with mpl.rc_context({**_STYLE, "svg.fonttype": "none", "svg.hashsalt": plot.name}):
        text = _print(_draw(plot, alone=False), "svg", metadata={"Date": None}).decode()
    text = text[text.index("<svg") :]
    # a style inside the drawing would apply to the whole page
    text = re.sub(r"<metadata>.*?</metadata>\s*|<style .*?</style>\s*", "", text, flags=re.DOTALL)
    text = re.sub(
        r'(<svg [^>]*?)width="[^"]*" height="[^"]*"|(<svg [^>]*?)height="[^"]*" width="[^"]*"', r"\1\2", text
    )
    text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{plot.name}-", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var(--{variable}, {colour})")
    return text.strip()


def _print(figure: Figure, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, **options)
    return buffer.getvalue()


def _draw(plot: Drawing, alone: bool) -> Figure:
    figure = Figure(figsize=(WIDTH, 3.2 if alone else 3.0))
    if not alone:
        figure.patch.set_visible(False)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    if isinstance(plot, HeatMap):
        _cells(axes, plot)
    elif isinstance(plot, Ranking):
        lines = sum(label.count("\n") + 1 for label in map(_wrapped, plot.labels))
        figure.set_figheight(0.75 + 0.2 * lines + 0.04 * len(plot.labels) + 0.2 * alone)
        _rows(axes, plot)
    else:
        _lines(axes, plot)
    if alone:
        axes.set_title(fill(plot.title, LEGEND_WIDTH - 8))
        _legend(figure, plot)
    # once: as the figure's own engine it would run twice for every file, half of the time
    ConstrainedLayoutEngine().execute(figure)
    return figure


def _lines(axes: Axes, plot: Plot) -> None:
    for boundary in plot.boundaries:
        axes.axvline(boundary, color=RULE, linewidth=0.8)
    drawn = [series for series in plot.series if np.isfinite(series.y).any()]
    gap = min(np.diff([place for place, _ in plot.ticks]), default=1.0)
    for number, series in enumerate(drawn):
        # all lines together are shifted by at most half of the distance between two ticks
        step = gap * min(0.05 if plot.connected else 0.11, 0.5 / len(drawn)) if plot.points else 0.0
        if plot.bars:
            step = gap * 0.8 / len(drawn)
        shift = (number - (len(drawn) - 1) / 2) * step if plot.ticks else 0.0
        if plot.bars:
            axes.bar(series.x + shift, series.y, 0.85 * step, color=series.ink, alpha=0.55)
        _line(axes, plot, series, shift)
    _axes(axes, plot)


def _cells(axes: Axes, plot: HeatMap) -> None:
    values, (rows, columns) = plot.values, plot.values.shape
    for row, column in np.ndindex(rows, columns):
        value = values[row, column]
        if np.isfinite(value):
            low, high = plot.scale or (np.nanmin(values[:, column]), np.nanmax(values[:, column]))
            shade = 0.08 + 0.5 * (float((value - low) / (high - low)) if high > low else 0.5)
            axes.add_patch(
                Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=PALETTE[0], alpha=shade, linewidth=0)
            )
            text = f"{value:.{plot.decimals}f}".replace("-", "\N{MINUS SIGN}")
            size = 8 if columns < 8 else 6
            axes.text(column, row, text, color=INK, ha="center", va="center", fontsize=size)
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.grid(False)
    axes.set_xticks(range(columns), plot.columns)
    axes.set_yticks(range(rows), plot.rows)
    axes.set_xlabel(plot.column_label)
    axes.set_ylabel(plot.row_label)


def _rows(axes: Axes, plot: Ranking) -> None:
    for row, (value, half_width) in enumerate(zip(plot.values, plot.half_widths, strict=True)):
        colour = PALETTE[VERDICTS.get(plot.verdicts[row], (NEUTRAL, ""))[0]]
        if np.isfinite(half_width):
            axes.plot([value - half_width, value + half_width], [row, row], color=colour, alpha=0.55)
        axes.plot([value], [row], color=colour, marker="o", markersize=5, markeredgewidth=0.0)
    axes.set_ylim(len(plot.labels) - 0.4, -0.6)
    axes.set_yticks(range(len(plot.labels)), list(map(_wrapped, plot.labels)))
    axes.tick_params(axis="y", labelcolor=INK)
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]))


def _wrapped(label: str) -> str:
    return fill(label, ROW_LABEL)


def _line(axes: Axes, plot: Plot, series: Series, shift: float) -> None:
    style: dict[str, Any] = {"color": series.ink, "linewidth": 1.6 if plot.points else 1.3}
    style["linestyle"] = ("--" if series.dashed else "-") if plot.connected else "none"
    if plot.points:
        if not plot.bars:
            style |= {"marker": series.marker, "markersize": 4.5, "markeredgewidth": 0.0}
        if series.half_width is not None:
            axes.errorbar(
                series.x + shift,
                series.y,
                yerr=series.half_width,
                xerr=series.x_half_width,
                fmt="none",
                ecolor=series.ink,
                elinewidth=1.0,
                alpha=0.55,
            )
    axes.plot(series.x + shift, series.y, **style)


def _axes(axes: Axes, plot: Plot) -> None:
    places = [place for place, _ in plot.ticks]
    axes.set_xlabel(plot.x_label)
    axes.set_ylabel(plot.y_label)
    if places:
        axes.xaxis.set_major_locator(FixedLocator(places))
        axes.set_xticklabels([text for _, text in plot.ticks])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    decades = _decades(plot) if plot.logarithmic else 0.0
    if decades >= 1:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if decades > 2.5 else (1.0, 3.0), numticks=8))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
        if plot.logarithmic:
            axes.set_ylim(bottom=0)  # all values are positive and too similar for a logarithmic scale
    if plot.points and places:
        margin = 0.5 * min(np.diff(places)) if len(places) > 1 else 1.0
        axes.set_xlim(min(places) - margin, max(places) + margin)


def _decades(plot: Plot) -> float:
    """How many powers of ten the positive values span; 0 if there are none."""
    values = np.concatenate([np.empty(0), *(series.y[series.y > 0] for series in plot.series)])
    return float(np.log10(values.max() / values.min())) if len(values) else 0.0


def _legend(figure: Figure, plot: Drawing) -> None:
    """Draw the legend below the axes and make the figure taller to fit it."""
    if len(plot.legend) < 2:
        return
    handles = [
        Line2D(
            [],
            [],
            color=series.ink,
            linestyle="--" if series.dashed else "-",
            marker=series.marker if plot.points else "",
            markersize=4.5,
        )
        for series in plot.legend
    ]
    # matplotlib leaves out labels that begin with an underscore
    labels = [fill(f" {s.label}" if s.label.startswith("_") else s.label, LEGEND_WIDTH) for s in plot.legend]
    columns = max(1, LEGEND_WIDTH // (max(map(len, labels)) + 6))
    lines = sum(
        max(label.count("\n") + 1 for label in labels[row : row + columns])
        for row in range(0, len(labels), columns)
    )
    figure.set_figheight(figure.get_figheight() + 0.19 * lines)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, labelcolor=INK)
