"""Report: what strategies cost beside plain fine-tuning, and whether what they keep grows."""

from __future__ import annotations

from dataclasses import replace

import pytest
from reports import run

from peso.evaluation.comparison import Comparison
from peso.evaluation.report.sections.cost import cost
from peso.evaluation.run_summary import RunSummary


def costly(base: RunSummary, time: float, growth: int) -> RunSummary:
    stages = {}
    for number, stage in base.stages.items():
        assert stage.cost is not None
        changed = replace(stage.cost, seconds=10.0 * time, bytes_on_disk=2**20 * (1 + growth * number))
        stages[number] = replace(stage, cost=changed)
    return replace(base, stages=stages)


def row(comparison: Comparison, place: int) -> dict[str, float | None]:
    (table,) = cost(comparison).tables
    names = [*table.columns[:5], "× memory", *table.columns[6:]]
    return {name: getattr(cell, "value", None) for name, cell in zip(names, table.rows[place], strict=True)}


def test_time_is_beside_single_and_bytes_grow_where_they_do() -> None:
    single, all_past = costly(run("single", "single", 0.5), 1, 0), costly(run("past", "sum_lora", 0.6), 3, 2)
    found = row(Comparison([single, all_past], [5, 10]), 1)
    assert found["× single"] == pytest.approx(3)
    assert found["× memory"] == pytest.approx(1)
    assert found["Disk, first later stage, MiB"] == pytest.approx(3)
    assert found["Disk, last stage, MiB"] == pytest.approx(9)
    plain = row(Comparison([single, all_past], [5, 10]), 0)
    assert plain["× single"] == pytest.approx(1)
    assert plain["Disk, first later stage, MiB"] == plain["Disk, last stage, MiB"]


def test_without_single_nothing_is_relative() -> None:
    found = row(Comparison([costly(run("a", "sum_lora", 0.5), 1, 0)], [5, 10]), 0)
    assert found["Relative"] is found["× memory"] is None
