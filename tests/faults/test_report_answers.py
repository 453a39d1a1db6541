"""The report answers what its reader asks, and a run is not shown without the cheap baselines beside it."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from html_page import Page, page_of
from reports import catalogue, example_runs, predictions, run

from peso.config import baseline_label, load_config
from peso.evaluation.comparison import Comparison
from peso.evaluation.predictions import Predictions
from peso.evaluation.report.findings import findings
from peso.evaluation.report.page import render_page
from peso.evaluation.report.plots import VERDICTS, Ranking
from peso.evaluation.report.sections import sections_of
from peso.evaluation.report.sections.recommendations import recommendations
from peso.evaluation.report.sections.section import Answers
from peso.evaluation.report.sections.summary import averages_table
from peso.evaluation.run_summary import RunSummary
from peso.runs import baselines, pipeline, report
from peso.runs.workspace import Workspace
from peso.runtime.progress import Silent

pytestmark = pytest.mark.slow

STAGE = 4  # the newest of the made-up runs


def updated(gain: float, lists: list[list[str]] | None = None) -> RunSummary:
    """A run whose newest model is better than the one before it by ``gain``, with the test that shows it."""
    model = replace(run("w", "peso", 0.5, seed=3), catalogue=catalogue())
    old = predictions(STAGE, 0.5 - gain, 77, len(model.stages[STAGE].predictions))
    if lists:
        old = replace(old, items=lists, scores=[np.zeros(len(one), dtype=np.float32) for one in lists])
    return replace(model, across={(STAGE - 1, STAGE): old})


@pytest.mark.parametrize(
    ("gain", "verdict"),
    [(5.0, "is better than"), (-5.0, "is worse than"), (0.0, "is not significantly different from")],
)
def test_the_first_sentence_says_whether_the_new_model_is_better(gain: float, verdict: str) -> None:
    comparison = Comparison([updated(gain)], [5, 10])
    first = findings(comparison)[0]
    assert first.startswith(f"The model after stage 4 {verdict} the model after stage 3 on the 450 cases")
    change = comparison.last_change(comparison.systems[0], comparison.headline[0])
    assert change is not None
    assert re.search(r"NDCG@10 0\.\d{4} against 0\.\d{4}, difference [+−]0\.\d{4}, 95 % interval", first)
    assert change.excludes_zero == bool(gain)
    before, after = comparison.before_and_after(comparison.systems[0], comparison.headline[0], change)
    assert f"NDCG@10 {after:.4f} against {before:.4f}" in first
    assert "By users: " in first


def test_the_change_of_a_group_is_that_of_its_cases() -> None:
    model = updated(1.0)
    comparison = Comparison([model], [10])
    (system,), metric = comparison.systems, comparison.headline[2]
    new, old = model.stages[STAGE].predictions, model.across[STAGE - 1, STAGE]
    for number, kind in enumerate(("dormant", "continuing", "new")):
        inside = np.array([segment == kind for segment in new.user_segment])
        found = comparison.last_change(system, metric, number)
        assert found is not None
        assert found.value == pytest.approx((metric.values(new) - metric.values(old))[inside].mean())
        assert found.cases == inside.sum()


def hits(of: Predictions, rank: int) -> Predictions:
    ranks = np.full(len(of), rank, dtype=np.int32)
    return replace(of, rank_semantic_id=ranks, rank_item=ranks)


def test_a_baseline_that_wins_is_named_first_and_one_that_does_not_is_not() -> None:
    model, weak = run("w", "peso", 0.2, seed=3), replace(run("b", "popularity", -0.9, seed=5), baseline=True)
    strong = replace(
        weak,
        name="e",
        strategy="ease",
        stages={t: replace(s, predictions=hits(s.predictions, 1)) for t, s in weak.stages.items()},
    )
    first = findings(Comparison([model, weak, strong], [10]))[0]
    assert first.startswith("A baseline without a language model beats the model, “peso”, in NDCG@10")
    assert "“ease” (1.0000" in first
    assert "“popularity”" not in first
    assert not any("baseline" in text.lower() for text in findings(Comparison([model, weak], [10])))
    fused = replace(strong, name="h", strategy="hybrid", contains_model=True)
    told = findings(Comparison([model, weak, fused], [10]))
    assert told[0].startswith("The model together with a baseline beats the model, “peso”, alone in NDCG@10")
    assert not any("without a language model" in text for text in told)
    equal = replace(model, name="b", strategy="ease", baseline=True)
    assert not any("baseline" in text.lower() for text in findings(Comparison([model, equal], [10])))


def shown(model: RunSummary) -> list[Answers]:
    section = recommendations(Comparison([model], [10]))
    assert section is not None
    return list(section.answers)


def test_recommendations_of_both_models_stand_beside_what_came() -> None:
    targets = predictions(STAGE, 0, 0, 450).targets
    model = updated(0.0, [[target, "i1", "i2"] for target in targets])
    cases = shown(model)
    assert [case.user.split()[0] for case in cases] == 2 * ["New"] + 2 * ["Continuing"] + 2 * ["Dormant"]
    new = model.stages[STAGE].predictions
    for case in cases:
        row = new.users.index(case.user.split()[-1])
        target = int(new.targets[row][1:])
        assert case.came == (
            f"Game {target}" if target % 2 else f"i{target}"
        )  # the id where no title is known
        assert [name for name, _ in case.lists] == ["After stage 3", "After stage 4"]
        assert case.lists[0][1][0] == case.came
        assert case.lists[1][1] == ["i0", "Game 1", "i2", "Game 3", "i4"]
        assert len(case.history) in (3, 4)  # the last items, and how many came before them
    assert shown(model) == cases
    text = page_of(model).text
    assert "Game 1" in text
    assert "✓" in text


def test_without_a_test_of_the_model_before_the_new_one_stands_alone() -> None:
    (case, *_) = shown(replace(updated(0.0), across={}))
    assert [name for name, _ in case.lists] == ["Recommended"]
    assert recommendations(Comparison([replace(updated(0.0), catalogue=None)], [10])) is None


def test_the_page_has_no_empty_table_no_backtick_and_folds_all_but_its_first_screen() -> None:
    sections = sections_of(Comparison([updated(0.5)], [10]))
    assert "Forgetting and transfer" not in [section.title for section in sections]  # one test fills no row
    for section in sections:
        for table in (*section.tables, *section.folded):
            assert table.rows
            assert all(any(row[i] is not None for row in table.rows) for i in range(len(table.columns)))
    quoted = replace(sections[0], paragraphs=["run `peso update <now>`"])
    page = render_page([quoted, *sections[1:]], "T")
    assert "`" not in Page(page).text
    assert "<code>peso update &lt;now&gt;</code>" in page
    assert page.count("<section") == 1 + page.count("<summary><h2")


def test_a_verdict_has_one_color_and_what_is_not_compared_is_not_ranked() -> None:
    runs = [replace(one, baseline=one.name == "popularity") for one in example_runs()]
    comparison = Comparison(runs, [5, 10])
    rankings = [plot for plot in sections_of(comparison)[0].plots if isinstance(plot, Ranking)]
    for metric, plot in zip(comparison.headline, rankings, strict=True):
        standing = comparison.standing(metric)
        verdicts = dict(zip(plot.labels, plot.verdicts, strict=True))
        assert set(verdicts) == {system.label for system in comparison.rivals(metric)}
        behind = {system.label for system in standing.behind}
        assert {label for label, verdict in verdicts.items() if verdict == "worse"} == behind
    assert VERDICTS["best"] == VERDICTS["tied"] != VERDICTS["worse"]


def test_the_main_metric_stands_beside_the_name() -> None:
    assert averages_table(Comparison(example_runs(), [5, 10])).columns[:2] == ["Strategy", "NDCG@10"]


# -- cheap baselines ---------------------------------------------------------------------------------

TREE = {
    "data": {"format": "simulate", "simulate": {"users": 60, "items": 40, "stages": 2}},
    "backbone": {"name": "tiny", "layers": 1},
    "strategy": {"name": "peso", "examples": 8},
    "training": {"epochs": 1, "max_steps": 2},
}
CHEAP = ["popularity last=1", "item-knn", "ease", "item-graph"]


def test_the_cheap_ones_are_run_unless_told_otherwise() -> None:
    def labels(**more: object) -> list[str]:
        return [baseline_label(config) for config in load_config({**TREE, **more}).baselines]

    assert labels() == CHEAP
    assert labels(baselines=[]) == labels(baselines="none") == labels(baselines=None) == []
    assert labels(baselines="ease") == ["ease"]


def test_a_run_shows_them_updated_and_a_catalog_smaller_than_a_list_is_no_obstacle(tmp_path: Path) -> None:
    tree = {**TREE, "decoding": {"beams": 60}}
    workspace = Workspace.create_or_open(tmp_path / "w", load_config(tree))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "report", lambda workspaces, directory: None)
        with workspace.lock():
            pipeline.run(workspace)
    columns, rows, sentences = report.results([workspace])
    assert columns[:4] == ["", "stages", "cases", "NDCG@10"]
    assert sorted(row[0] for row in rows) == sorted(["w", "popularity", *CHEAP])
    assert any("“ease”" in sentence for sentence in sentences)
    # one that lags behind is named instead of taking a stage from all the others
    shutil.rmtree(workspace.root / "baselines" / "ease" / "1")
    _, _, sentences = report.results([workspace])
    assert any("Unfinished and left out: “ease” has 1 of 2 stages." in sentence for sentence in sentences)
    baselines.run_cheap_baselines(workspace, Silent())
    _, _, sentences = report.results([workspace])
    assert not any("Unfinished" in sentence for sentence in sentences)
