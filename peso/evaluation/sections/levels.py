"""Section: the target's log-probability level by level of its semantic ID."""

from __future__ import annotations

from peso.evaluation.comparison import Comparison
from peso.evaluation.findings import stage_range
from peso.evaluation.metrics import level_metrics, log_probability
from peso.evaluation.sections.section import Section, quantity
from peso.evaluation.systems import System
from peso.evaluation.tables import Cell, Table


def levels(comparison: Comparison) -> Section:
    """At which code of the semantic ID a system is surprised."""
    title = "Level by level"
    counts = {system.name: _levels(comparison, system) for system in comparison.systems}
    most = max(counts.values())
    if not most:
        return Section("levels", title, ["No answers hold the log-probability of each level."])
    total = log_probability()
    rows: list[list[Cell]] = []
    for system in comparison.systems:
        metrics = level_metrics(system.first.stages[comparison.averaged[0]].predictions)
        if counts[system.name]:
            cells = [quantity(comparison.average(system, metric), metric) for metric in metrics]
            whole = quantity(comparison.average(system, total), total)
            rows.append([system.label, *cells, *[None] * (most - len(cells)), whole])
    return Section(
        "levels",
        title,
        [
            "The mean of ln p(code | history, codes before it), in nats, of each code of the target's "
            "semantic ID. The first level is the coarse kind of item, the last tells neighbours apart; the "
            "levels sum to the log-probability of the item. Baselines have no levels."
        ],
        tables=[
            Table(
                "log-probability-by-level",
                f"Log-probability by level, mean of {stage_range(comparison.averaged)}",
                ["Strategy", *(f"Level {level}" for level in range(1, most + 1)), "All levels"],
                rows,
                "± is the half width of the 95 % interval.",
            )
        ],
    )


def _levels(comparison: Comparison, system: System) -> int:
    """How many levels all answers of a system hold; 0 where some lack them."""
    return min(
        len(level_metrics(run.stages[stage].predictions))
        for run in system.runs
        for stage in comparison.averaged
    )
