"""Section: time, memory and disk."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from peso.evaluation.comparison import Comparison
from peso.evaluation.report.sections.section import Section, section
from peso.evaluation.report.tables import Cell, Quantity, Table
from peso.evaluation.run_summary import StageCost, System

MIB = 2**20


@section(place=110)
def cost(comparison: Comparison) -> Section:
    """Training time, memory and disk space of each system."""
    return Section(
        "cost",
        "Cost",
        [
            "Cost of training only, without testing. Times are means over later stages and seeds; memory is "
            "the maximum."
        ],
        tables=[_cost_table(comparison)],
        folded=[_cost_by_stage_table(comparison)],
    )


def _cost_table(comparison: Comparison) -> Table:
    reference = next((s for s in comparison.systems if s.first.reference == "fine-tuning"), None)
    plain, times = ([], "Relative") if reference is None else (_later(reference), f"× {reference.label}")
    rows: list[list[Cell]] = []
    for system in comparison.systems:
        base = [s.cost for run in system.runs for stage, s in run.stages.items() if stage == 0 and s.cost]
        later = _later(system)
        rows.append(
            [
                system.label,
                _mean_cost(base, "seconds", 1, 1),
                _mean_cost(later, "seconds", 1, 1),
                _times(later, plain, "seconds"),
                _mean_cost(
                    [max(base + later, key=_memory)] if base + later else [], "peak_memory_bytes", MIB, 0
                ),
                _times(later, plain, "peak_memory_bytes"),
                _mean_cost(later, "trained_parameters", 1, 0),
                *(_mean_cost(_at_end(system, end), "bytes_on_disk", MIB, 2) for end in (0, -1)),
            ]
        )
    return Table(
        "cost",
        "Cost of training",
        [
            "Strategy",
            "Stage 0, s",
            "A later stage, s",
            times,
            "Peak memory, MiB",
            times,
            "Parameters trained in a later stage",
            "Disk, first later stage, MiB",
            "Disk, last stage, MiB",
        ],
        rows,
        f"{times}: a later stage relative to plain fine-tuning. " * bool(reference)
        + "Times of runs that shared a busy machine are not comparable.",
    )


def _later(system: System) -> list[StageCost]:
    return [s.cost for run in system.runs for stage, s in run.stages.items() if stage > 0 and s.cost]


def _at_end(system: System, end: int) -> list[StageCost]:
    """The cost of the first (0) or the last (-1) of the later stages, in every run."""
    later = [stage for stage in system.stages if stage > 0]
    return [cost for run in system.runs if later and (cost := run.stages[later[end]].cost)]


def _times(costs: Sequence[StageCost], plain: Sequence[StageCost], name: str) -> Quantity | None:
    mine, theirs = _mean_cost(costs, name, 1, 2), _mean_cost(plain, name, 1, 2)
    if mine is None or theirs is None or not theirs.value:
        return None
    return Quantity(mine.value / theirs.value, decimals=2)


def _cost_by_stage_table(comparison: Comparison) -> Table:
    rows: list[list[Cell]] = []
    for system in comparison.systems:
        for stage in system.stages:
            costs = [cost for run in system.runs if (cost := run.stages[stage].cost)]
            if not costs:
                continue
            rows.append(
                [
                    system.label,
                    Quantity(stage),
                    _mean_cost(costs, "seconds", 1, 1),
                    _mean_cost([max(costs, key=_memory)], "peak_memory_bytes", MIB, 0),
                    _mean_cost(costs, "trained_parameters", 1, 0),
                    _mean_cost(costs, "bytes_on_disk", MIB, 2),
                ]
            )
    return Table(
        "cost-by-stage",
        "Cost of training, stage by stage",
        ["Strategy", "Stage", "Seconds", "Peak memory, MiB", "Parameters trained", "Disk, MiB"],
        rows,
    )


def _mean_cost(costs: Sequence[StageCost], name: str, unit: int, decimals: int) -> Quantity | None:
    known = [value for value in (getattr(cost, name) for cost in costs) if value is not None]
    return Quantity(float(np.mean(known)) / unit, decimals=decimals) if known else None


def _memory(cost: StageCost) -> int:
    return cost.peak_memory_bytes or 0
