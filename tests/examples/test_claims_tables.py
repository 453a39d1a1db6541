"""examples/claims/tables.py: rows and verdicts from a comparison; the pages equal the committed tables."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reports import across, run

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


def test_each_seed_is_also_tested_by_itself() -> None:
    runs = [
        replace(run(name, name, skill, seed=seed), name=f"{name}/{seed}", seed=seed)
        for name, skill in {"single": 0.5, "sum-all": -0.5}.items()
        for seed in range(2)
    ]
    rows = tables.rows_by_seed("bed", "video-games", runs)
    assert {(row["seed"], row["seeds"]) for row in rows} == {(0, 1), (1, 1)}
    first = [row for row in rows if row["seed"] == 0]
    alone = tables.claim_rows("bed", "video-games", Comparison([r for r in runs if r.seed == 0], [5, 10]))
    assert first == [{"seed": 0, **row} for row in alone]
    assert tables.rows_by_seed("bed", "video-games", [r for r in runs if r.seed == 0]) == []


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
    assert rows["good"]["nats minus single value"] == pytest.approx(1.5, abs=0.05)  # as the runs have it
    assert rows["good"]["nats minus single low"] > 0
    assert "minus single value" not in rows["single"]


def test_what_later_stages_change_on_the_cases_of_stage_0_is_in_the_table_where_it_was_tested() -> None:
    tested = replace(run("single", "single", 0.8), seed=0, across=across(0.8, 0))
    compared = Comparison([tested, replace(run("peso", "peso", 0.9), seed=0)], [5, 10])
    rows = {row["strategy"]: row for row in tables.system_rows("bed", "video-games", compared)}
    metric = compared.metric("log_probability")
    of_last, of_first = tested.across[4, 0], tested.stages[0].predictions
    expected = np.mean(metric.values(of_last)) - np.mean(metric.values(of_first))
    assert rows["single"]["nats forgetting"] == pytest.approx(expected, abs=1e-3)
    assert "forgetting" not in rows["peso"]
    written = [
        {column: str(row.get(column, "")) for column in tables.SYSTEM_COLUMNS} for row in rows.values()
    ]
    text = tables.tables_of_systems(written)
    assert "stage 0's cases |" in text
    for row in written:
        row["forgetting"] = ""
    assert "stage 0's cases" not in tables.tables_of_systems(written)


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


RESULTS = ROOT / "docs" / "results.md"
NUMBER = re.compile(r"\d+\.\d+|\d+(?= %)")
SIGNED = re.compile(r"([+−]?)(\d+\.\d+|\d+(?= %))")


def among(number: str, values: Iterable[float]) -> bool:
    """Whether one of the values, rounded to the digits of the number, is the number."""
    digits = len(number.partition(".")[2])
    return any(f"{value:.{digits}f}" == number for value in values)


def parts_of(page: Path) -> list[list[float]]:
    """The figures of each section of a page."""
    sections = re.split(r"\n(?=#+ )", page.read_text(encoding="utf-8"))
    return [[float(number) for number in re.findall(r"\d+(?:\.\d+)?", part)] for part in sections]


def test_every_figure_of_what_holds_is_in_one_or_two_sections_of_the_pages_that_its_row_names() -> None:
    rows = [line for line in RESULTS.read_text(encoding="utf-8").splitlines() if "](results/" in line]
    rows = [row for row in rows if row.startswith("|")]
    assert rows
    for row in rows:
        targets = re.findall(r"\]\((results/[\w-]+\.md)\)", row)
        parts = [part for target in targets for part in parts_of(RESULTS.parent / target)]
        missing = min(
            (
                [number for number in NUMBER.findall(row) if not among(number, [*one, *other])]
                for one, other in combinations_with_replacement(parts, 2)
            ),
            key=len,
        )
        assert not missing, f"{', '.join(missing)} of {row!r}"


# what the sentences below the table of claims call the strategies of the tables
WORDS = {
    "summing": ["sum-all", "sum-all-tenth", "sum-latest-tenth", "single-tenth"],
    "sum of all": ["sum-all", "sum-all-tenth", "single-tenth"],
    "inherit": ["sum-all-inherit", "sum-all-inherit-tenth", "sum-all"],
    "softmax-kl": ["peso"],
    "anchor": ["peso"],
    "dormant": ["peso"],
    "l2": ["released-l2"],
    "stale": ["none"],
    "updating": ["none"],
    "paper's rate": ["single-tenth"],
}


def sentences(text: str) -> list[str]:
    """The items of the list below the table of claims."""
    part = text.split("<!-- end of claims -->", 1)[1].split("\n## ", 1)[0]
    return [re.sub(r"\s+", " ", item) for item in re.split(r"\n(?=- )", part.strip())]


def without_source(sentence: str) -> list[str]:
    """The figures of a sentence that no committed table has, rounded as there, in a row of a strategy that
    the sentence names."""
    committed = [
        row
        for name in ("systems", "tests", "seeds")
        for row in tables._read(tables.TABLES / f"claims_{name}.csv")
    ]
    every = {row["strategy"] for row in committed if "strategy" in row}
    named = {name for name in re.findall(r"`([\w-]+)`", sentence) if name in every} | {"single"}
    for word, strategies in WORDS.items():
        named |= set(strategies) if word in sentence.lower() else set()
    said = sentence.lower()
    unsaid = {name for name in (*tables.GROUPS, "ndcg@5", "hit@5", "hit@10") if name not in said}
    unsaid |= {f"{metric} half" for metric in tables.METRICS if "±" not in said}
    unsaid |= {"bed", "stream", "strategy", "claim", "system", "other", "metric", "group"}
    values = [
        float(value)
        for row in committed
        if (row.get("strategy") or row.get("system")) in named and row.get("other", "single") in named
        for column, value in row.items()
        if value and column not in unsaid
    ]
    values += [claim.published for claim in tables.CLAIMS if claim.published and claim.system in named]
    return [
        sign + number
        for sign, number in SIGNED.findall(sentence)
        if not among(number, {"+": values, "−": [-value for value in values]}.get(sign, map(abs, values)))
    ]


def test_every_figure_below_the_claims_is_in_a_committed_table() -> None:
    items = sentences(RESULTS.read_text(encoding="utf-8"))
    assert sum(len(NUMBER.findall(item)) for item in items) > 20
    for item in items:
        assert not (missing := without_source(item)), f"{', '.join(missing)} of {item!r}"


def test_a_changed_figure_is_noticed() -> None:
    """Of the last digits of all figures with three decimals or more, nearly all. Some neighbors are figures
    of the other stream."""
    noticed = []
    for item in sentences(RESULTS.read_text(encoding="utf-8")):
        for match in re.finditer(r"\d+\.\d{3,}", item):
            last = str((int(match[0][-1]) + 1) % 10)
            changed = item[: match.end() - 1] + last + item[match.end() :]
            noticed.append(len(without_source(changed)) > 0)
    assert sum(noticed) > 0.8 * len(noticed) > 10


def test_every_figure_of_what_is_not_decided_is_on_a_page_of_results_or_in_a_table() -> None:
    part = RESULTS.read_text(encoding="utf-8").split("\n## Not decided", 1)[1].split("\n## ", 1)[0]
    pages = (*(ROOT / "docs" / "results").glob("*.md"), *tables.TABLES.glob("*.csv"))
    there = "".join(page.read_text(encoding="utf-8") for page in pages)
    found = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", there)]
    missing = [number for number in NUMBER.findall(part) if not among(number, found)]
    assert not missing, ", ".join(missing)
