"""Section: the course of each metric over the stages."""

from __future__ import annotations

from collections.abc import Sequence

from peso.evaluation.comparison import Comparison
from peso.evaluation.findings import stage_range
from peso.evaluation.metrics import Metric
from peso.evaluation.plots import Plot
from peso.evaluation.sections.section import MARKS, Section, file_name, marks, quantity, series
from peso.evaluation.tables import Quantity, Table


def by_stage(comparison: Comparison) -> Section:
    """The course of each metric over the stages."""
    first, others = comparison.headline, [m for m in comparison.metrics if m not in comparison.headline]
    return Section(
        "stages",
        "Stage by stage",
        [
            "Each model is tested right after it has learnt the stage. Bars are 95 % intervals over users "
            "and, where there are several, seeds."
        ],
        plots=[_stage_plot(comparison, metric) for metric in first],
        tables=[_stage_table(comparison, metric) for metric in first],
        folded=[_stage_table(comparison, metric) for metric in others] + [_micro_table(comparison)],
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
        f"{MARKS} Stages are corrected together, the mean by itself." if len(comparison.systems) > 1 else "",
    )


def _micro_table(comparison: Comparison) -> Table:
    return Table(
        "averages-over-cases",
        f"Mean over the cases of {stage_range(comparison.averaged)}, every case counting the same",
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
