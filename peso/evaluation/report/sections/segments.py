"""Section: results by kind of user, item, history, popularity, activity and column."""

from __future__ import annotations

import math

import numpy as np

from peso.evaluation.catalogue import ACTIVE, ITEMS, LONG_HISTORY, USERS, Segmentation
from peso.evaluation.comparison import Comparison
from peso.evaluation.intervals import Estimate
from peso.evaluation.metrics import LOG_PROBABILITY, Metric
from peso.evaluation.predictions import DORMANT, NEW, USER_SEGMENTS
from peso.evaluation.report.findings import stage_range
from peso.evaluation.report.plots import Plot, Series
from peso.evaluation.report.sections.section import Section, file_name, quantity, section, series
from peso.evaluation.report.tables import Cell, Table
from peso.evaluation.run_summary import System


@section(place=50)
def segments(comparison: Comparison) -> Section:
    """Results by kind of user and item, and by every other way to split the cases."""
    others = [s for s in comparison.segmentations if s not in (USERS, ITEMS)]
    return Section(
        "segments",
        "By kind of user and item",
        [
            "A dormant user was seen in an earlier stage but not in the previous one, a continuing user in "
            "the previous one, a new user never. A known item occurred before the stage; a new one did not. "
            f"Every case of {stage_range(comparison.averaged)} counts the same. Bars and lines are 95 % "
            "intervals. In the plots of stability and plasticity, systems further up are better for new "
            "users, and systems further right are better for dormant users."
        ],
        notes=[
            f"The further tables split cases by history (up to {LONG_HISTORY} items or more), by activity "
            "(quarters of users by their number of items so far, with the gap between the best and worst "
            "served quarter), and by popularity of the target (head, middle and tail: a third of the "
            "earlier events)."
        ],
        plots=[
            *(_bars(comparison, metric) for metric in comparison.headline),
            *(_plane(comparison, metric) for metric in comparison.headline),
        ],
        tables=[_main_table(comparison, metric) for metric in comparison.headline],
        folded=[_table(comparison, metric, part) for part in others for metric in comparison.headline],
    )


def _main_table(comparison: Comparison, metric: Metric) -> Table:
    columns = [
        (part, number, f"{group} {part.title.split()[-1]}")
        for part in (USERS, ITEMS)
        for number, group in enumerate(part.groups)
    ]
    return _grid(comparison, metric, columns, "segment", f"{metric.label} by segment")


def _table(comparison: Comparison, metric: Metric, part: Segmentation) -> Table:
    columns = [(part, number, group) for number, group in enumerate(part.groups)]
    return _grid(comparison, metric, columns, part.name, f"{metric.label} by {part.title}", part is ACTIVE)


def _grid(
    comparison: Comparison,
    metric: Metric,
    columns: list[tuple[Segmentation, int, str]],
    name: str,
    title: str,
    with_gap: bool = False,
) -> Table:
    """A table with one column per group. A column's heading shows its number of cases if all systems have the
    same number."""
    found = {
        (system.name, place): comparison.in_group(system, metric, part, number)
        for system in comparison.systems
        for place, (part, number, _) in enumerate(columns)
    }
    heads, shown, counts_differ = [], [], False
    for place, (_, _, head) in enumerate(columns):
        counts = {e.cases if (e := found[system.name, place]) else 0 for system in comparison.systems}
        if counts == {0} and name.startswith("column"):
            continue
        shown.append(place)
        counts_differ |= len(counts) > 1
        head = head[:1].upper() + head[1:]
        heads.append(f"{head} (n = {counts.pop():,})" if len(counts) == 1 else head)
    rows: list[list[Cell]] = []
    for system in comparison.systems:
        estimates = [found[system.name, place] for place in shown]
        gap = [quantity(_gap(estimates), metric)] if with_gap else []
        rows.append([system.label, *(quantity(estimate, metric) for estimate in estimates), *gap])
    return Table(
        f"{file_name(metric)}-by-{name}",
        title,
        ["Strategy", *heads, *(["Largest gap"] * with_gap)],
        rows,
        "The runs have different numbers of cases in some segments." if counts_differ else "",
    )


def _gap(estimates: list[Estimate | None]) -> Estimate | None:
    """The largest difference between two groups' means, a measure of fairness.

    Its interval treats the two groups as independent, although a user may be in both in different stages, and
    as fixed, although they were chosen because they are the extremes.
    """
    known = [estimate for estimate in estimates if estimate is not None]
    if len(known) < 2:
        return None
    best, worst = max(known, key=lambda e: e.value), min(known, key=lambda e: e.value)
    value, error = best.value - worst.value, math.hypot(best.half_width, worst.half_width)
    return Estimate(value, value - error, value + error, best.cases + worst.cases)


def _bars(comparison: Comparison, metric: Metric) -> Plot:
    places = list(range(len(USER_SEGMENTS)))
    return Plot(
        f"{file_name(metric)}-by-user-segment",
        f"{metric.label} by user",
        f"{metric.label} of each strategy for {', '.join(USER_SEGMENTS)} users; see the table.",
        [
            series(
                comparison,
                number,
                [comparison.in_group(system, metric, USERS, place) for place in places],
                places,
            )
            for number, system in enumerate(comparison.systems)
        ],
        "users",
        list(zip(places, USER_SEGMENTS, strict=True)),
        connected=False,
        bars=metric.name != LOG_PROBABILITY,  # bars start at 0, far from any log-probability
    )


def _plane(comparison: Comparison, metric: Metric) -> Plot:
    kept, learned = (USER_SEGMENTS.index(segment) for segment in (DORMANT, NEW))
    points = [
        _point(number, system, *(comparison.in_group(system, metric, USERS, g) for g in (kept, learned)))
        for number, system in enumerate(comparison.systems)
    ]
    return Plot(
        f"{file_name(metric)}-plane",
        f"{metric.label}: stability and plasticity",
        f"{metric.label} of each strategy for new users against that for dormant ones; see the table.",
        points,
        "dormant users (stability)",
        (),
        y_label="new users (plasticity)",
        connected=False,
    )


def _point(number: int, system: System, kept: Estimate | None, learned: Estimate | None) -> Series:
    values = [np.nan if e is None else e.value for e in (kept, learned)]
    widths = [np.nan if e is None else e.half_width for e in (kept, learned)]
    return Series(
        system.label,
        number,
        np.array(values[:1]),
        np.array(values[1:]),
        np.array(widths[1:]),
        x_half_width=np.array(widths[:1]),
    )
