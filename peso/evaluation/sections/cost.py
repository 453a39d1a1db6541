"""Section: time, memory and disk."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from peso.evaluation.comparison import Comparison
from peso.evaluation.run_summary import StageCost
from peso.evaluation.sections.section import Section
from peso.evaluation.tables import Cell, Quantity, Table

MIB = 2**20


def cost(comparison: Comparison) -> Section:
    """Time, memory and disk."""
    return Section(
        "cost",
        "Cost",
        [
            "Learning alone, without testing. Later stages and seeds are given as their mean, memory as its "
            "maximum."
        ],
        tables=[_cost_table(comparison)],
        folded=[_cost_by_stage_table(comparison)],
    )


def _cost_table(comparison: Comparison) -> Table:
    rows: list[list[Cell]] = []
    for system in comparison.systems:
        base = [s.cost for run in system.runs for stage, s in run.stages.items() if stage == 0 and s.cost]
        later = [s.cost for run in system.runs for stage, s in run.stages.items() if stage > 0 and s.cost]
        rows.append(
            [
                system.label,
                _mean_cost(base, "seconds", 1, 1),
                _mean_cost(later, "seconds", 1, 1),
                _mean_cost(
                    [max(base + later, key=_memory)] if base + later else [], "peak_memory_bytes", MIB, 0
                ),
                _mean_cost(later, "trained_parameters", 1, 0),
                _mean_cost(later, "bytes_on_disk", MIB, 2),
            ]
        )
    return Table(
        "cost",
        "What learning took",
        [
            "Strategy",
            "Stage 0, s",
            "A later stage, s",
            "Peak memory, MiB",
            "Parameters trained in a later stage",
            "Disk for a later stage, MiB",
        ],
        rows,
    )


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
        "What learning took, stage by stage",
        ["Strategy", "Stage", "Seconds", "Peak memory, MiB", "Parameters trained", "Disk, MiB"],
        rows,
    )


def _mean_cost(costs: Sequence[StageCost], name: str, unit: int, decimals: int) -> Quantity | None:
    known = [value for value in (getattr(cost, name) for cost in costs) if value is not None]
    return Quantity(float(np.mean(known)) / unit, decimals=decimals) if known else None


def _memory(cost: StageCost) -> int:
    return cost.peak_memory_bytes or 0
