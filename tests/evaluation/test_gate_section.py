"""Report: the gate's verdicts, with every condition and the test cases beside it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from reports import predictions, run

from peso.config import GateConfig
from peso.evaluation.comparison import Comparison
from peso.evaluation.report.sections.gate import gate
from peso.evaluation.report.tables import Quantity
from peso.evaluation.run_summary import RunSummary
from peso.evaluation.verdict import Pair, compare, decide, metric_of

SETTINGS = GateConfig.model_validate(
    {
        "metric": "log_probability",
        "anchor": "held",
        "segments": {"dormant_users": 0.01},
        "forgetting": 0.1,
    }
)


def verdict(skill: float) -> dict:
    """Of a challenger against one of skill 0.6, as gate.json has it."""
    pair = Pair(predictions(1, 0.6, 0, 300), predictions(1, skill, 1, 300))
    found = decide(SETTINGS, pair, pair, 10, (True, "anchor: held"))
    return {
        **found.as_json(),
        "champion": 0,
        "says": found.says,
        "settings": dict(SETTINGS),
        "test": compare(pair, metric_of(SETTINGS), SETTINGS.delta, SETTINGS.confidence),
        "earlier": compare(pair, metric_of(SETTINGS), SETTINGS.delta, SETTINGS.confidence),
    }


def judged(**verdicts: float) -> RunSummary:
    stages = {int(name.removeprefix("stage_")): verdict(skill) for name, skill in verdicts.items()}
    return replace(run("peso", "peso", 0.6), verdicts=stages)


def test_without_a_verdict_there_is_no_section() -> None:
    assert gate(Comparison([run("peso", "peso", 0.6)], [5, 10])) is None


def test_every_condition_has_a_row_and_every_verdict_a_sentence() -> None:
    found = gate(Comparison([judged(stage_1=0.9, stage_2=0.3), run("single", "single", 0.5)], [5, 10]))
    assert found is not None
    _, first, second = found.paragraphs
    assert first.startswith("Stage 1 was compared with stage 0, which was serving: passed.")
    assert second.startswith("Stage 2 was compared with stage 0, which was serving: refused.")
    (table,) = found.tables
    names = [row[table.columns.index("Condition")] for row in table.rows]
    assert names == 2 * [
        "log_probability",
        "log_probability of dormant users",
        "log_probability on earlier cases",
        "coverage",
        "anchor",
        "log_probability on test cases",
        "log_probability on earlier test cases",
    ]
    told = verdict(0.9)["conditions"][0]["figures"]
    row = table.rows[0]
    for title, key in (("Difference", "difference"), ("At least", "low"), ("Margin", "margin")):
        cell = row[table.columns.index(title)]
        assert isinstance(cell, Quantity)
        np.testing.assert_allclose(cell.value, told[key])
    assert [row[table.columns.index("Outcome")] for row in table.rows][5] == "reported"
