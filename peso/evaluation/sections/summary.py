"""Section: what was measured and what came out."""

from __future__ import annotations

from peso.evaluation.comparison import Comparison
from peso.evaluation.findings import findings, stage_range
from peso.evaluation.sections.section import MARKS, Section, marks, quantity
from peso.evaluation.tables import Quantity, Table


def summary(comparison: Comparison) -> Section:
    """What was measured and what came out."""
    tables = [averages_table(comparison)]
    if len(comparison.runs) > 1 and comparison.same_cases:
        tables.append(_distance_table(comparison))
    return Section("summary", "Summary", findings(comparison), tables=tables)


def averages_table(comparison: Comparison) -> Table:
    """Every metric of every run, averaged over the later stages."""
    standings = {metric.name: marks(comparison, metric) for metric in comparison.metrics}
    return Table(
        "averages",
        f"Mean of {stage_range(comparison.averaged)}, every stage counting the same",
        ["Strategy", *(metric.label for metric in comparison.metrics)],
        [
            [
                comparison.labels[run.name],
                *(
                    quantity(comparison.average(run, metric), metric, standings[metric.name][run.name])
                    for metric in comparison.metrics
                ),
            ]
            for run in comparison.runs
        ],
        f"± is the half width of the 95 % interval over users. {MARKS}" if len(comparison.runs) > 1 else "",
    )


def _distance_table(comparison: Comparison) -> Table:
    columns = []
    for metric in comparison.metrics:
        standing, column = comparison.standing(metric), dict[str, Quantity | None]()
        for run in standing.tied + standing.behind:
            difference = comparison.difference(standing.best, run, metric)
            column[run.name] = quantity(difference, metric, "tied" if run in standing.tied else "")
        columns.append(column)
    return Table(
        "distance-to-best",
        "How far behind the best of each column",
        ["Strategy", *(metric.label for metric in comparison.metrics)],
        [
            [comparison.labels[run.name], *(column.get(run.name) for column in columns)]
            for run in comparison.runs
        ],
        "Differences are taken case by case, so what makes a case hard for all cancels. ≈ marks an interval "
        "that contains zero; – stands for the best itself.",
    )
