"""examples/claims/tables.py: rows and verdicts from a comparison; the pages equal the committed tables."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reports import run

from peso.evaluation.comparison import Comparison
from peso.evaluation.run_summary import RunSummary

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("claims_tables", ROOT / "examples" / "claims" / "tables.py")
assert spec is not None
assert spec.loader is not None
tables = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = tables  # dataclasses look their module up
spec.loader.exec_module(tables)

CLAIMS = {claim.name: claim for claim in tables.CLAIMS}


def comparison(skills: dict[str, float], seeds: int = 3) -> Comparison:
    runs: list[RunSummary] = [
        replace(run(name, name, skill, seed=seed), name=f"{name}/{seed}", seed=seed)
        for name, skill in skills.items()
        for seed in range(seeds)
    ]
    return Comparison(runs, [5, 10])


def rows_of(compared: Comparison) -> dict[tuple[str, str], dict[str, Any]]:
    rows = tables.claim_rows("bed", "video-games", compared)
    return {(row["claim"], row["metric"]): row for row in rows}


def test_a_claim_is_tested_where_both_of_its_strategies_are_there() -> None:
    rows = rows_of(comparison({"single": 0.5, "sum-all": -0.5, "peso": 0.5}))
    assert {name for name, _ in rows} == {"anchor", "dormant users", "new users", "sum, all"}
    found = rows["sum, all", "log_probability"]
    assert found["value"] == pytest.approx(-1.5, abs=0.05)  # as the made-up runs have it
    assert found["low"] <= found["value"] <= found["high"] < 0
    assert (found["seeds"], found["cases"]) == (3, 300 + 320 + 500 + 450)
    dormant = rows["dormant users", "ndcg@5"]
    assert 0 < dormant["cases"] < 300
    assert dormant["p"] is None
    ndcg = rows["sum, all", "ndcg@5"]
    assert ndcg["percent low"] < ndcg["percent"] < ndcg["percent high"]


def test_p_values_are_corrected_over_the_claims_about_all_cases() -> None:
    compared = comparison({"single": 0.5, "sum-all": 0.4, "peso": 0.55})
    metric = compared.metric("ndcg@5")
    names = {s.first.strategy: s.name for s in compared.systems}
    plain = {
        claim: compared.contrasts(metric).contrast("ndcg@5", names[system], names["single"]).p
        for claim, system in (("anchor", "peso"), ("sum, all", "sum-all"))
    }
    rows = rows_of(compared)
    smallest = min(plain, key=lambda name: plain[name])
    assert rows[smallest, "ndcg@5"]["p"] == pytest.approx(min(1, 2 * plain[smallest]), abs=1e-4)


@pytest.mark.parametrize(
    ("claim", "percents", "p", "said"),
    [
        ("sum, all", (-25, -35, -15), 0.01, "confirmed"),
        ("sum, all", (-10, -15, -5), 0.01, "confirmed, smaller"),
        ("sum, all", (-40, -50, -30), 0.01, "confirmed, larger"),
        ("sum, all", (-10, -15, -5), 0.20, "undecided"),  # not significant after the correction
        ("sum, all", (5, 2, 8), 0.01, "the opposite"),
        ("sum, all", (5, 2, 8), 0.20, "refuted"),
        ("sum, all", (0, -5, 5), 0.9, "refuted"),
        ("sum, all", (0, -30, 30), 0.9, "undecided"),
        ("dormant users", (12, 2, 22), None, "confirmed"),
        ("orthogonality", (-5, -8, -2), 0.01, "confirmed"),
        ("softmax-KL", (0, -1, 1), 0.9, "undecided"),
    ],
)
def test_verdicts(claim: str, percents: tuple[float, ...], p: float | None, said: str) -> None:
    row = dict(zip(("percent", "percent low", "percent high"), percents, strict=True))
    row |= {"value": percents[0], "p": p}
    assert tables.verdict(CLAIMS[claim], row | {"seeds": 3}) == said
    assert tables.verdict(CLAIMS[claim], row | {"seeds": 1}) == f"{said} (trial)"


def test_rows_of_systems_have_means_groups_and_the_difference_from_single() -> None:
    compared = comparison({"single": 0.5, "good": 1.5}, seeds=2)
    rows = {row["strategy"]: row for row in tables.system_rows("bed", "video-games", compared)}
    assert set(rows["good"]) <= set(tables.SYSTEM_COLUMNS)
    good = next(system for system in compared.systems if system.first.strategy == "good")
    dormant = [
        values
        for one in good.runs
        for stage in (1, 2, 3, 4)
        for values in compared.metric("ndcg@10").values(one.stages[stage].predictions)[
            np.array(one.stages[stage].predictions.user_segment) == "dormant"
        ]
    ]
    assert rows["good"]["dormant"] == pytest.approx(np.mean(dormant), abs=1e-4)
    difference = rows["good"]["ndcg@10"] - rows["single"]["ndcg@10"]
    assert rows["good"]["minus single value"] == pytest.approx(difference, abs=2e-4)
    assert "minus single value" not in rows["single"]


def test_a_strategy_with_the_answers_of_single_is_said_to_have_them() -> None:
    rows = tables.system_rows("bed", "video-games", comparison({"single": 0.5, "copy": 0.5}, seeds=1))
    written = [{column: str(row.get(column, "")) for column in tables.SYSTEM_COLUMNS} for row in rows]
    (line,) = (line for line in tables.tables_of_systems(written).splitlines() if "copy" in line)
    assert "| the same answers |" in line


def test_the_pages_equal_the_committed_tables() -> None:
    for page, text in tables.pages().items():
        assert page.read_text(encoding="utf-8") == text, (
            f"{page.name} differs from its tables; run `python examples/claims/tables.py write`"
        )


NUMBER = re.compile(r"\d+\.\d+|\d+(?= %)")


def test_every_figure_of_what_holds_is_on_the_page_that_its_row_names() -> None:
    results = ROOT / "docs" / "results.md"
    text = results.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|") and "](results/" in line]
    assert rows
    for row in rows:
        targets = re.findall(r"\]\((results/[\w-]+\.md)\)", row)
        there = "".join((results.parent / target).read_text(encoding="utf-8") for target in targets)
        missing = [number for number in NUMBER.findall(row) if number not in there]
        assert not missing, f"{', '.join(missing)} of {row!r}"
