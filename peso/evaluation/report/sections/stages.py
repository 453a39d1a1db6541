"""Section: each metric at each stage, and the log-probability at each level of the semantic ID."""

from __future__ import annotations

from collections.abc import Sequence

from peso.evaluation.comparison import Comparison
from peso.evaluation.metrics import Metric, level_metrics, log_probability
from peso.evaluation.report.findings import stage_range
from peso.evaluation.report.plots import Plot
from peso.evaluation.report.sections.section import (
    MARKS,
    Section,
    file_name,
    marks,
    quantity,
    section,
    series,
)
from peso.evaluation.report.tables import Cell, Quantity, Table


@section(place=40)
def by_stage(comparison: Comparison) -> Section:
    """Each metric at each stage."""
    first, others = comparison.headline, [m for m in comparison.metrics if m not in comparison.headline]
    return Section(
        "stages",
        "Stage by stage",
        [
            "Each model is tested right after training on the stage. Bars are 95 % intervals over users, and "
            "over seeds if there are several."
        ],
        plots=[_stage_plot(comparison, metric) for metric in first],
        tables=[_stage_table(comparison, metric) for metric in first],
        folded=[
            levels_table(comparison),
            *(_stage_table(comparison, metric) for metric in others),
            _micro_table(comparison),
        ],
    )


def levels_table(comparison: Comparison) -> Table:
    """The target's log-probability at each level of its semantic ID. Baselines have no levels."""
    total, stages = log_probability(), comparison.averaged
    of_levels = {
        system.name: min(
            (level_metrics(run.stages[stage].predictions) for run in system.runs for stage in stages), key=len
        )
        for system in comparison.systems
    }
    most = max(map(len, of_levels.values()))
    rows: list[list[Cell]] = []
    for system in comparison.systems:
        if metrics := of_levels[system.name]:
            cells = [quantity(comparison.average(system, metric), metric) for metric in metrics]
            whole = quantity(comparison.average(system, total), total)
            rows.append([system.label, *cells, *[None] * (most - len(cells)), whole])
    return Table(
        "log-probability-by-level",
        f"Log-probability by level of the semantic ID, mean of {stage_range(stages)}",
        ["Strategy", *(f"Level {level}" for level in range(1, most + 1)), "Log-probability"],
        rows,
        "Mean of ln p(code | history, codes before it) in nats. The last column is the log-probability of "
        "the whole answer: the sum of the levels, unless the model also has an item head, which the levels "
        "do not include. ± half width of the 95 % interval.",
    )


def _stage_table(comparison: Comparison, metric: Metric) -> Table:
    stages, average = comparison.stages, marks(comparison, comparison.standing(metric))
    held = [stage for stage in stages if stage not in comparison.left_out]
    at = {
        stage: marks(comparison, standing)
        for stage, standing in comparison.standings_by_stage(metric, held).items()
    }
    rows = []
    for system in comparison.systems:
        cells = [
            quantity(
                comparison.at_stage(system, metric, stage), metric, at.get(stage, {}).get(system.name, "")
            )
            for stage in stages
        ]
        mean = quantity(comparison.average(system, metric), metric, average[system.name])
        rows.append([system.label, *cells, mean])
    return Table(
        f"{file_name(metric)}-by-stage",
        f"{metric.label} by stage",
        ["Strategy", *(f"Stage {stage}" for stage in stages), f"Mean of {_short_range(comparison.averaged)}"],
        rows,
        f"{MARKS} The correction covers all stages together; the mean is corrected separately."
        if len(comparison.systems) > 1
        else "",
    )


def _micro_table(comparison: Comparison) -> Table:
    return Table(
        "averages-over-cases",
        f"Mean over the cases of {stage_range(comparison.averaged)}, each case with equal weight",
        ["Strategy", *(metric.label for metric in comparison.metrics), "Cases"],
        [
            [
                system.label,
                *(
                    quantity(comparison.average_of_cases(system, metric), metric)
                    for metric in comparison.metrics
                ),
                Quantity(comparison.cases(system)),
            ]
            for system in comparison.systems
        ],
    )


def _stage_plot(comparison: Comparison, metric: Metric) -> Plot:
    stages = comparison.stages
    return Plot(
        f"{file_name(metric)}-by-stage",
        f"{metric.label} by stage",
        f"{metric.label} of each strategy at {stage_range(stages)}; see the table.",
        [
            series(
                comparison, number, [comparison.at_stage(system, metric, stage) for stage in stages], stages
            )
            for number, system in enumerate(comparison.systems)
        ],
        "stage",
        [(stage, str(stage)) for stage in stages],
    )


def _short_range(stages: Sequence[int]) -> str:
    return f"{stages[0]} to {stages[-1]}" if len(stages) > 1 else str(stages[0])
