"""Section: a metric against the value of an option."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import numpy as np

from peso.evaluation.comparison import Comparison
from peso.evaluation.metrics import Metric
from peso.evaluation.report.plots import Plot, Series
from peso.evaluation.report.sections.section import Section, file_name, section
from peso.evaluation.run_summary import System

FEWEST = 3  # an option needs at least this number of values for a curve
Curve = list[tuple[float, System]]


@section(place=70)
def sweep(comparison: Comparison) -> Section | None:
    """A metric against the value of an option, one curve for each setting of the others."""
    plots = []
    for key in _numeric_options(comparison):
        curves = _curves(comparison, key)
        if curves:
            plots += [_plot(comparison, key, curves, metric) for metric in comparison.headline]
    if not plots:
        return None
    return Section(
        "sweep",
        "Options",
        [
            "The mean over stages and seeds against the value of one option. Dashed lines are systems "
            "without this option. The best point of a curve is selected on these test cases, so it is "
            "optimistic."
        ],
        plots=plots,
    )


def _numeric_options(comparison: Comparison) -> list[str]:
    keys = dict.fromkeys(key for system in comparison.systems for key in system.first.options)
    return [key for key in keys if any(_number(system, key) is not None for system in comparison.systems)]


def _number(system: System, key: str) -> float | None:
    value = system.first.options.get(key)
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else None


def _curves(comparison: Comparison, key: str) -> dict[str, Curve]:
    """One curve for each setting of the other options, with points in the order of this option."""
    found: dict[str, Curve] = {}
    for system in comparison.systems:
        value = _number(system, key)
        if value is None:
            continue
        others = {name: setting for name, setting in system.first.options.items() if name != key}
        found.setdefault(_setting(system.family, others), []).append((value, system))
    return {
        setting: sorted(points, key=lambda point: point[0])
        for setting, points in found.items()
        if len({value for value, _ in points}) >= FEWEST
    }


def _setting(name: str, options: dict[str, object]) -> str:
    """The label of a curve: the strategy and its other options.

    >>> _setting("peso", {"strategy.name": "peso", "strategy.reduction": "mean"})
    'peso, reduction mean'
    """
    rest = [f"{key.split('.')[-1]} {value}" for key, value in options.items() if key != "strategy.name"]
    return ", ".join([name, *rest])


def _plot(comparison: Comparison, key: str, curves: dict[str, Curve], metric: Metric) -> Plot:
    values = sorted({value for points in curves.values() for value, _ in points})
    places = _places(values)
    lines = []
    for number, (setting, points) in enumerate(curves.items()):
        estimates = [comparison.average(system, metric) for _, system in points]
        lines.append(
            Series(
                setting,
                number,
                np.array([places[value] for value, _ in points]),
                np.array([estimate.value for estimate in estimates]),
                np.array([estimate.half_width for estimate in estimates]),
            )
        )
    without = [system for system in comparison.systems if key not in system.first.options]
    ends = np.array([places[values[0]], places[values[-1]]])
    for number, system in enumerate(without, start=len(lines)):
        mean = comparison.average(system, metric).value
        lines.append(Series(system.label, number, ends, np.full(2, mean), dashed=True))
    name = key.split(".")[-1]
    return Plot(
        f"{file_name(metric)}-by-{key.replace('.', '-').replace('_', '-')}",
        f"{metric.label} by {name}",
        f"{metric.label} against {name}, one line for each setting of the other options.",
        lines,
        name,
        _ticks(values, places),
    )


def _places(values: Sequence[float]) -> dict[float, float]:
    """The position of each value on the axis. Values that span a factor of ten are placed by their logarithm,
    with 0 one step to the left of the smallest.

    >>> _places([0.0, 1.0, 10.0, 100.0])
    {0.0: -1.0, 1.0: 0.0, 10.0: 1.0, 100.0: 2.0}
    >>> _places([1.0, 2.0, 4.0])
    {1.0: 1.0, 2.0: 2.0, 4.0: 4.0}
    """
    positive = [value for value in values if value > 0]
    if min(values) < 0 or len(positive) < 2 or positive[-1] / positive[0] < 10:
        return {value: value for value in values}
    step = np.log10(positive[-1] / positive[0]) / (len(positive) - 1)
    return {
        value: float(np.log10(value)) if value > 0 else float(np.log10(positive[0]) - step)
        for value in values
    }


def _ticks(values: Sequence[float], places: dict[float, float]) -> list[tuple[float, str]]:
    return [(places[value], f"{value:g}") for value in values]
