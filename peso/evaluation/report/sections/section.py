"""The parts of a report, and functions that several sections share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from peso.config.registry import Registry
from peso.evaluation.comparison import Comparison, Standing
from peso.evaluation.intervals import Estimate
from peso.evaluation.metrics import Metric
from peso.evaluation.report.plots import Drawing, Series
from peso.evaluation.report.tables import Mark, Quantity, Table
from peso.evaluation.run_summary import RunSummary

T = TypeVar("T")
MARKS = (
    "± half width of the 95 % interval. Bold: best. ≈: not significantly worse than the best. "
    "↓: significantly worse (paired by case, p ≤ 0.05 after Holm's correction for all pairs)."
)
CODES_AND_ITEMS = (
    "Log-probabilities of baselines and of models are normalized over different sets (items and codes), so "
    "only models are compared."
)


SECTIONS = Registry(
    "report section", "peso.evaluation.report.sections", "peso.report_sections", beside=["section"]
)
PLACES: dict[str, int] = {}  # the place of each section on the page, by the name of its function


@dataclass(frozen=True)
class Listing:
    """Preformatted text, folded under its title."""

    title: str
    text: str


@dataclass(frozen=True)
class Answers:
    """One test case with the titles of its items.

    Attributes:
        user: the heading of the case.
        history: the titles of the history, oldest first.
        came: the title of the item that came next.
        lists: for each model its name and the titles of its list, best first.
    """

    user: str
    history: Sequence[str]
    came: str
    lists: Sequence[tuple[str, Sequence[str]]]


@dataclass(frozen=True)
class Section:
    """One part of the page. Its contents are shown in the order of the attributes.

    Attributes:
        anchor: the section's address on the page.
        title: its heading.
        paragraphs: its text.
        plots: its plots.
        tables: its main tables.
        answers: test cases with recommendations.
        notes: folded paragraphs on how to read the section.
        folded: further tables, folded.
        listings: preformatted texts, folded.
    """

    anchor: str
    title: str
    paragraphs: Sequence[str] = ()
    plots: Sequence[Drawing] = ()
    tables: Sequence[Table] = ()
    answers: Sequence[Answers] = ()
    notes: Sequence[str] = ()
    folded: Sequence[Table] = ()
    listings: Sequence[Listing] = ()

    @property
    def first(self) -> bool:
        """Whether this is the first section of the page, which is not folded."""
        return self.anchor.endswith("summary")

    def without_empty_tables(self) -> Section:
        """The section without tables that have no rows and without columns that have no entries."""
        tables, folded = (
            [table.without_empty_columns() for table in some if table.rows]
            for some in (self.tables, self.folded)
        )
        return replace(self, tables=tables, folded=folded)


Make = Callable[[Comparison], Section | None]


def section(place: int) -> Callable[[Make], Make]:
    """A decorator that adds the result of a function as a section to every report.

    The function gets a :class:`~peso.evaluation.comparison.Comparison` and returns a :class:`Section`, or
    None if there is nothing to show.

    Args:
        place: the position on the page; sections with smaller numbers come first.
    """

    def register(make: Make) -> Make:
        SECTIONS.add(make.__name__, make)
        PLACES[make.__name__] = place
        return make

    return register


def marks(comparison: Comparison, standing: Standing) -> dict[str, Mark]:
    """The mark of each system's cell, by name of the system. Marks are empty if nothing is compared."""
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
    """The distinct values of the systems, each with a label.

    Empty values are left out. The label is that of the first system with the value, or "" if all systems
    have the same value.
    """
    found: list[tuple[str, T]] = []
    for system in comparison.systems:
        value = values(system.first)
        if value and all(value != other for _, other in found):
            found.append((system.label, value))
    return [("", value) for _, value in found] if len(found) == 1 else found


def labelled(text: str, label: str) -> str:
    """A text followed by a label of :func:`distinct`, unless the label is empty."""
    return f"{text} · {label}" if label else text


def file_name(metric: Metric) -> str:
    """The part of file names that stands for a metric.

    >>> from peso.evaluation.metrics import hit_at
    >>> file_name(hit_at(10))
    'hit-10'
    """
    return metric.name.replace("@", "-").replace("_", "-")
