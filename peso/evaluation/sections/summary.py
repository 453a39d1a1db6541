"""Section: what was measured and what came out."""

from __future__ import annotations

import numpy as np

from peso.evaluation.comparison import Comparison
from peso.evaluation.findings import findings, stage_range
from peso.evaluation.metrics import Metric
from peso.evaluation.plots import Ranking
from peso.evaluation.sections.section import CODES_AND_ITEMS, MARKS, Section, file_name, marks, quantity
from peso.evaluation.tables import Cell, Quantity, Table

PICTURES = (
    "Points are means, lines their 95 % intervals; grey is significantly worse than the best. Differences "
    "are tested pair by pair on the same cases, so two may be apart although their lines overlap."
)


def summary(comparison: Comparison) -> Section:
    """What was measured and what came out."""
    several = len(comparison.systems) > 1
    return Section(
        "summary",
        "Summary",
        [*findings(comparison), *([PICTURES] if several else [])],
        plots=[_ranking(comparison, metric) for metric in comparison.headline] if several else [],
        tables=[averages_table(comparison)],
    )


def _ranking(comparison: Comparison, metric: Metric) -> Ranking:
    means = {system.name: comparison.average(system, metric) for system in comparison.systems}
    systems = sorted(comparison.systems, key=lambda system: -means[system.name].value)
    behind = comparison.standing(metric).behind
    return Ranking(
        f"{file_name(metric)}-ranking",
        f"{metric.label}, mean of {stage_range(comparison.averaged)}",
        f"{metric.label} of each system, best first; see the table.",
        [system.label for system in systems],
        np.array([means[system.name].value for system in systems]),
        np.array([means[system.name].half_width for system in systems]),
        [system in behind for system in systems],
    )


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
    notes = ["± is the half width of the 95 % interval.", MARKS]
    if comparison.codes_and_items:
        notes.append(CODES_AND_ITEMS)
    return Table(
        "averages",
        f"Mean of {stage_range(comparison.averaged)}, every stage counting the same",
        ["Strategy", *(metric.label for metric in comparison.metrics), "Seeds"],
        rows,
        " ".join(notes) if len(comparison.systems) > 1 else "",
    )
