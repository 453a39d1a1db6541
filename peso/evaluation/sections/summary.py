"""Section: what was measured and what came out."""

from __future__ import annotations

from peso.evaluation.comparison import Comparison
from peso.evaluation.findings import findings, stage_range
from peso.evaluation.sections.section import MARKS, Section, marks, quantity
from peso.evaluation.tables import Cell, Quantity, Table


def summary(comparison: Comparison) -> Section:
    """What was measured and what came out."""
    return Section("summary", "Summary", findings(comparison), tables=[averages_table(comparison)])


def averages_table(comparison: Comparison) -> Table:
    """Every metric of every system, averaged over the later stages; runs that are not done at its end."""
    standings = {metric.name: marks(comparison, comparison.standing(metric)) for metric in comparison.metrics}
    rows: list[list[Cell]] = []
    for system in comparison.systems:
        cells = [
            quantity(comparison.average(system, metric), metric, standings[metric.name][system.name])
            for metric in comparison.metrics
        ]
        seeds = Quantity(len(system.runs)) if system.first.seed is not None else None
        rows.append([system.label, *cells, seeds])
    for run in comparison.unfinished:
        rows.append([f"{run.name} (not done)", *([None] * len(comparison.metrics)), None])
    return Table(
        "averages",
        f"Mean of {stage_range(comparison.averaged)}, every stage counting the same",
        ["Strategy", *(metric.label for metric in comparison.metrics), "Seeds"],
        rows,
        f"± is the half width of the 95 % interval. {MARKS}" if len(comparison.systems) > 1 else "",
    )
