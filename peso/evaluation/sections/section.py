"""What a report is made of, and the pieces that several sections share.

Knows comparisons, tables and plots; knows nothing of HTML or files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from peso.evaluation.comparison import Comparison, Standing
from peso.evaluation.intervals import Estimate
from peso.evaluation.metrics import Metric
from peso.evaluation.plots import Drawing, Series
from peso.evaluation.run_summary import RunSummary
from peso.evaluation.tables import Mark, Quantity, Table

T = TypeVar("T")
MARKS = (
    "Best in bold; ≈ marks what is not significantly worse, ↓ what is (paired by case, p ≤ 0.05 after Holm's "
    "correction over all pairs in this metric)."
)

CODES_AND_ITEMS = (
    "Log-probabilities of baselines are of items and sum to one over the catalogue, those of models are of "
    "codes, some of which no item has: only models are compared in them."
)


@dataclass(frozen=True)
class Listing:
    """Text to be shown as it is, folded under its title."""

    title: str
    text: str


@dataclass(frozen=True)
class Section:
    """One part of the page, shown in the order of the fields.

    ``folded`` tables are there for who asks; ``anchor`` is the section's address on the page.
    """

    anchor: str
    title: str
    paragraphs: Sequence[str] = ()
    plots: Sequence[Drawing] = ()
    tables: Sequence[Table] = ()
    folded: Sequence[Table] = ()
    listings: Sequence[Listing] = ()


def marks(comparison: Comparison, standing: Standing) -> dict[str, Mark]:
    """The mark of each system's cell, by name of the system; none where there is nothing to compare."""
    result: dict[str, Mark] = {system.name: "" for system in comparison.systems}
    alone = comparison.same_cases and not standing.tied and not standing.behind
    if len(result) > 1 and not alone:
        result[standing.best.name] = "best"
        result |= {system.name: "tied" for system in standing.tied}
        result |= {system.name: "worse" for system in standing.behind}
    return result


def quantity(estimate: Estimate | None, metric: Metric, mark: Mark = "") -> Quantity | None:
    """An estimate as a cell of a table."""
    return Quantity.of(estimate, metric.decimals, mark)


def series(
    comparison: Comparison, number: int, estimates: Sequence[Estimate | None], x: Sequence[float]
) -> Series:
    """The estimates of the system with this number as points of a plot."""
    return Series(
        comparison.systems[number].label,
        number,
        np.array(x, dtype=np.float64),
        np.array([np.nan if e is None else e.value for e in estimates]),
        np.array([np.nan if e is None else e.half_width for e in estimates]),
    )


def distinct(comparison: Comparison, values: Callable[[RunSummary], T]) -> list[tuple[str, T]]:
    """What runs have in common shown once: each different value with a label to tell it by.

    Empty values are left out. The label is that of the first system of the value, and "" where all share one.
    """
    found: list[tuple[str, T]] = []
    for system in comparison.systems:
        value = values(system.first)
        if value and all(value != other for _, other in found):
            found.append((system.label, value))
    return [("", value) for _, value in found] if len(found) == 1 else found


def labelled(text: str, label: str) -> str:
    """A text with the label of :func:`distinct`, where it has one."""
    return f"{text} · {label}" if label else text


def file_name(metric: Metric) -> str:
    """
    >>> from peso.evaluation.metrics import hit_at
    >>> file_name(hit_at(10))
    'hit-10'
    """
    return metric.name.replace("@", "-").replace("_", "-")
