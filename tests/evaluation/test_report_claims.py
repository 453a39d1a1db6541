"""What the report claims of runs set side by side: pairs, marks, what is left out and named."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from html_page import Page, page_of
from reports import CASES, INDEX, example_runs, predictions, run, seeds

from peso.errors import ConfigError, WorkspaceError
from peso.evaluation.comparison import Comparison
from peso.evaluation.predictions import Predictions
from peso.evaluation.report.findings import cautions, findings
from peso.evaluation.report.page import write_report
from peso.evaluation.report.sections import sections_of
from peso.evaluation.report.sections.drift import drift
from peso.evaluation.report.sections.significance import significance
from peso.evaluation.report.sections.stages import levels_table
from peso.evaluation.report.sections.summary import averages_table, origin
from peso.evaluation.report.sections.sweep import sweep
from peso.evaluation.report.tables import Quantity
from peso.evaluation.run_summary import RunSummary, StageSummary, TrainingCurve


def test_a_lead_is_claimed_only_where_its_interval_excludes_zero() -> None:
    text = {line.split(":")[0]: line for line in findings(Comparison(example_runs(), [5, 10]))}
    assert "“single” is best" in text["NDCG@10"]
    assert "significantly better than “none (stage 0 only)” and “popularity, all time”" in text["NDCG@10"]
    assert "Not significantly different: “peso (weight 2, mean)” (difference −0.0001, 95 %" in text["NDCG@10"]
    assert "Not significantly" not in text["Log-probability"]  # it tells apart what the hits do not


def test_two_copies_of_one_run_are_not_told_apart() -> None:
    twin = replace(run("a", "first", 0.5), name="b", strategy="second")
    text = " ".join(findings(Comparison([run("a", "first", 0.5), twin], [5, 10])))
    assert text.count("Not significantly different: “second” (no difference in any case).") == 3
    assert "better" not in text


def test_an_interval_beside_a_verdict_that_it_contradicts_is_explained() -> None:
    """Holm's correction is for all pairs; an interval is for one pair."""
    names = "abcdefg"
    runs = [
        RunSummary(name, name, {1: StageSummary(predictions(1, 0.5 if place == 0 else 0.44, place, 200))})
        for place, name in enumerate(names)
    ]
    comparison = Comparison(runs, [10])
    metric = comparison.metric("log_probability")
    standing, contrasts = comparison.standing(metric), comparison.contrasts(metric)
    found = [contrasts.contrast(metric.name, one.name, standing.best.name) for one in standing.tied]
    assert any(one.high < 0 for one in found)
    (text,) = [line for line in findings(comparison) if line.startswith("Log-probability")]
    assert "Not significantly different after the correction for several comparisons" in text


def test_the_difference_of_two_runs_is_that_of_paired_cases() -> None:
    one, other = (
        RunSummary(name, name, {1: StageSummary(predictions(1, skill, seed, 400))})
        for name, skill, seed in (("a", 0.0, 1), ("b", 0.1, 2))
    )
    comparison = Comparison([one, other], [10])
    metric = comparison.metric("log_probability")
    first, second = comparison.systems
    found = comparison.difference(second, first, metric)
    values = metric.values(other.stages[1].predictions) - metric.values(one.stages[1].predictions)
    assert found.value == pytest.approx(values.mean())
    assert found.half_width == pytest.approx(1.96 * values.std(ddof=1) / math.sqrt(400), rel=1e-4)
    assert found.half_width < 0.5 * comparison.average(first, metric).half_width


def test_cases_are_paired_by_user_whatever_their_order() -> None:
    one, other = run("a", "a", 0.2, seed=1), run("b", "b", 0.4, seed=2)
    shuffled = replace(
        other,
        stages={
            t: StageSummary(s.predictions.take(np.random.default_rng(t).permutation(len(s.predictions))))
            for t, s in other.stages.items()
        },
    )
    before, after = (Comparison([one, second], [10]) for second in (other, shuffled))
    for metric in before.metrics:
        expected = before.difference(*before.systems, metric)
        found = after.difference(*after.systems, metric)
        assert found.value == pytest.approx(expected.value, abs=1e-15)
        assert found.half_width == pytest.approx(expected.half_width)


def test_runs_on_different_cases_are_shown_but_not_compared(tmp_path: Path) -> None:
    runs = [run("a", "a", 0.5), run("b", "b", 0.5, cases=(900, 299, 320, 500, 450))]
    comparison = Comparison(runs, [10])
    text = " ".join(findings(comparison))
    assert "different cases" in text
    assert "better" not in text
    assert "significant" not in text
    with pytest.raises(ValueError, match="different cases of stage 1"):
        comparison.difference(*comparison.systems, comparison.metrics[0])
    with pytest.raises(WorkspaceError, match=r"a and b answered different cases of stage 1.*same stream"):
        write_report(tmp_path / "r", runs, "T", ks=[10], paired=True)
    assert "different numbers of cases" in page_of(*runs).text


@pytest.mark.slow
def test_averages_are_taken_over_the_stages_that_every_run_has() -> None:
    half_done = run("b", "half", 0.5, cases=CASES[:3])
    comparison = Comparison([run("a", "whole", 0.5), half_done], [10])
    assert comparison.averaged == [1, 2]
    text = " ".join(findings(comparison))
    assert "Averages leave out stages 3 to 4, which not every run has: “half” lacks stages 3 to 4." in text
    assert "–" in page_of(*comparison.runs).text.split("NDCG@10 by stage")[2]


def test_a_key_that_one_configuration_does_not_write_is_a_difference() -> None:
    one = replace(run("a", "first", 0.5), configuration="seed: 1\ntraining: {users: all}\n")
    other = replace(run("b", "second", 0.5), configuration="seed: 1\n")
    section = origin(Comparison([one, other], [10]))
    assert section is not None
    (table,) = section.tables
    assert table.columns == ["Key", "first", "second"]
    assert table.rows == [["training.users", "all", "not set"]]


def test_stages_that_are_not_tested_any_more_are_named() -> None:
    whole = run("a", "whole", 0.5)
    one = replace(whole, stages={4: whole.stages[4]}, untested=[0, 1, 2, 3])
    text = " ".join(findings(Comparison([one], [10])))
    assert "“a” is not tested on stages 0 to 3 with its present settings" in text
    assert "not tested" not in " ".join(findings(Comparison([whole], [10])))


def test_what_a_run_lacks_is_left_out_of_the_page_without_a_word() -> None:
    bare = RunSummary("a", "none", {0: StageSummary(predictions(0, 0.5, 1, 50))})
    page = page_of(bare)
    assert page.headings == ["Summary", "Stage by stage", "By kind of user and item", "Cost"]
    assert "All figures are those of stage 0." in page.text
    assert "None" not in page.text


@pytest.mark.slow
def test_what_runs_share_is_shown_once_and_what_differs_for_each() -> None:
    one, same = run("a", "one", 0.1), run("b", "two", 0.2)
    other = replace(same, drift=[{**stage, "users": 2000} for stage in same.drift])
    assert page_of(one, same).text.count("Users of each stage") == 1
    text = page_of(one, other).text
    assert text.count("Users of each stage · one") == text.count("Users of each stage · two") == 1
    assert text.count("Statistics of the index") == 1


def test_a_stage_without_events_has_no_shares_and_no_divergence() -> None:
    """`peso forget` may leave one."""
    kept = run("a", "one", 0.1)
    empty = {key: value if key == "stage" else 0 for key, value in kept.drift[2].items()}
    empty |= dict.fromkeys(("item_divergence", "code_divergence", "new_item_targets"))
    empty["history_lengths"] = dict.fromkeys(kept.drift[2]["history_lengths"])
    stages = [empty if stage["stage"] == 2 else stage for stage in kept.drift]
    shown = drift(Comparison([replace(kept, drift=stages)], [5, 10]))
    assert shown is not None
    assert all(math.isnan(series.y[1]) for plot in shown.plots for series in plot.series)
    users, items = (table.rows[2] for table in shown.tables)
    assert users[-1] is items[-1] is None


@pytest.mark.slow
def test_an_index_that_came_with_the_data_is_shown_by_what_is_known_of_it() -> None:
    quality = {key: INDEX["quality"][key] for key in ("collisions", "levels", "sample")}
    brought = {**INDEX, "quality": quality}
    del brought["fitness"]
    text = page_of(replace(run("a", "a", 0.1), semantic_ids=brought)).text
    assert "Collision rate" in text
    assert "Reconstruction error" not in text
    old = {key: INDEX[key] for key in ("items", "distinct_ids", "tokens_in_use")}  # of an earlier version
    assert "478" in page_of(replace(run("a", "a", 0.1), semantic_ids=old)).text


def test_runs_that_cannot_be_set_side_by_side_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="called a"):
        write_report(tmp_path / "r", [run("a", "x", 0.1), run("a", "y", 0.1)], "T")
    later = RunSummary("b", "b", {1: StageSummary(predictions(1, 0.5, 1, 50))})
    first = RunSummary("a", "a", {0: StageSummary(predictions(0, 0.5, 1, 50))})
    with pytest.raises(WorkspaceError, match="no stage is evaluated in all of a, b"):
        write_report(tmp_path / "r", [first, later], "T")
    with pytest.raises(ConfigError, match="20 is larger than"):
        write_report(tmp_path / "r", [first], "T", ks=[5, 20])
    assert not (tmp_path / "r").exists()


def test_cases_without_a_hit_have_no_interval() -> None:
    hopeless = predictions(1, 0.5, 1, 50)
    hopeless.rank_semantic_id[:] = 0
    comparison = Comparison([RunSummary("a", "a", {1: StageSummary(hopeless)})], [10])
    assert "NDCG@10 is 0.0000, Hit@10 is 0.0000 and" in findings(comparison)[0]


def test_runs_that_differ_in_their_seed_alone_are_one_system() -> None:
    runs = [*seeds("peso", "peso", 0.8), *seeds("single", "single", 0.2), run("popularity", "popularity", -1)]
    comparison = Comparison(runs, [10])
    assert [(system.label, system.seeds) for system in comparison.systems] == [
        ("peso", [0, 1, 2]),
        ("single", [0, 1, 2]),
        ("popularity", [None]),
    ]
    metric = comparison.metric("log_probability")
    alone = [Comparison([one], [10]) for one in runs[:3]]
    means = [one.average(one.systems[0], metric).value for one in alone]
    assert comparison.average(comparison.systems[0], metric).value == pytest.approx(np.mean(means))
    text = " ".join(cautions(comparison))
    assert "3 systems in 7 runs" in text
    assert "users and seeds." in text
    assert "another training seed" not in text.lower()
    other = replace(runs[1], configuration=runs[1].configuration.replace("0.001", "0.002"))
    assert len(Comparison([runs[0], other], [10]).systems) == 2


@pytest.mark.slow
def test_one_seed_is_said_to_speak_of_users_alone() -> None:
    comparison = Comparison([seeds("peso", "peso", 0.8, 1)[0], *seeds("single", "single", 0.2)], [10])
    cover = "With a single seed (“peso”) they do not cover another training seed"
    assert cover in " ".join(cautions(comparison))
    assert "a single seed of “peso”" in page_of(*comparison.runs).text


def test_seeds_of_one_system_on_different_cases_are_refused() -> None:
    first, second = seeds("peso", "peso", 0.5, 2)
    stages = {t: StageSummary(s.predictions.take(range(100))) for t, s in second.stages.items()}
    with pytest.raises(WorkspaceError, match="peso-0 and peso-1 answered different cases of stage 0"):
        Comparison([first, replace(second, stages=stages)], [10])


def test_a_run_that_is_not_done_is_left_out_and_named() -> None:
    runs = [replace(one, expected_stages=5) for one in seeds("peso", "peso", 0.5)]
    half = replace(runs[1], stages={t: runs[1].stages[t] for t in (0, 1)})
    missing = RunSummary("late", "retrain", {}, expected_stages=5)
    comparison = Comparison([runs[0], half, runs[2], missing], [10])
    assert comparison.averaged == [1, 2, 3, 4]
    assert comparison.systems[0].seeds == [0, 2]
    text = " ".join(findings(comparison))
    assert "Unfinished and left out: “peso-1” has 2 of 5 stages and “late” has 0 of 5 stages" in text
    assert [row[0] for row in averages_table(comparison).rows] == [
        "peso",
        "peso-1 (unfinished)",
        "late (unfinished)",
    ]


def test_models_that_are_not_done_count_beside_a_baseline_that_is() -> None:
    half = [replace(one, expected_stages=9) for one in seeds("peso", "peso", 0.5)]
    baseline = replace(run("popularity", "popularity", -1), baseline=True, expected_stages=5)
    comparison = Comparison([*half, baseline], [10])
    assert [system.label for system in comparison.systems] == ["peso", "popularity"]
    assert comparison.unfinished == []
    alone = Comparison([replace(baseline, expected_stages=9)], [10])
    assert [system.label for system in alone.systems] == ["popularity"]


def test_log_probabilities_of_baselines_are_shown_and_not_compared() -> None:
    """Theirs are over items, those of models over codes, so a baseline is highest for that alone."""
    models = [*seeds("peso", "peso", 0.8), *seeds("single", "single", 0.2)]
    baseline = replace(run("popularity", "popularity", 3.0), baseline=True)
    comparison = Comparison([*models, baseline], [10])
    metric = comparison.metric("log_probability")
    averages = {system.label: comparison.average(system, metric).value for system in comparison.systems}
    assert max(averages, key=lambda name: averages[name]) == "popularity"
    standing = comparison.standing(metric)
    assert {s.label for s in (standing.best, *standing.tied, *standing.behind)} == {"peso", "single"}
    assert comparison.contrasts(metric) is not comparison.contrasts(comparison.metric("ndcg@10"))
    table = averages_table(comparison)
    place = table.columns.index(metric.label)
    marked = {row[0]: row[place].mark for row in table.rows}  # type: ignore[union-attr]
    assert (marked["peso"], marked["popularity"]) == ("best", "")
    assert "only models are compared" in table.note
    (section,) = filter(None, [significance(comparison)])
    pairs = {t.name: len(t.rows) for t in section.folded if t.name.endswith("-pairs")}
    assert pairs == {"ndcg-10-pairs": 3, "hit-10-pairs": 3}
    at_stage = comparison.standings_by_stage(metric, [1])[1]
    assert "popularity" not in {s.label for s in (at_stage.best, *at_stage.tied, *at_stage.behind)}
    one = Comparison([models[0], baseline], [10])
    assert not any("Log-probability: " in sentence for sentence in findings(one))
    assert {row[place].mark for row in averages_table(one).rows} == {""}  # type: ignore[union-attr]


def test_log_probabilities_of_models_with_an_item_head_are_compared_with_baselines() -> None:
    models = [replace(each, item_head=True) for each in seeds("single", "single", 0.2)]
    baseline = replace(run("popularity", "popularity", 3.0), baseline=True)
    comparison = Comparison([*models, baseline], [10])
    assert comparison.standing(comparison.metric("log_probability")).best.label == "popularity"
    assert "only models are compared" not in averages_table(comparison).note
    mixed = Comparison([*models, *seeds("peso", "peso", 0.8), baseline], [10])
    assert mixed.codes_and_items


def test_marks_are_those_of_the_corrected_tests() -> None:
    comparison = Comparison(example_runs(), [5, 10])
    table = averages_table(comparison)
    for metric in comparison.metrics:
        place = table.columns.index(metric.label)
        standing = comparison.standing(metric)
        found = {row[0]: row[place].mark for row in table.rows}  # type: ignore[union-attr]
        assert found.pop(standing.best.label) == "best"
        for system in standing.tied + standing.behind:
            p = comparison.contrasts(metric).p_adjusted(metric.name, standing.best.name, system.name)
            assert found[system.label] == ("worse" if p <= 0.05 else "tied")


@pytest.mark.slow
def test_runs_on_several_data_sets_are_compared_within_each(tmp_path: Path, drawn: None) -> None:
    runs = [
        replace(one, name=f"{one.name} {place}", data_set=place, backbone="scratch")
        for place in ("games", "films")
        for one in (run("a", "a", 0.2), run("b", "b", 0.6, seed=1))
    ]
    parsed = Page(write_report(tmp_path / "r", runs, "Two").read_text(encoding="utf-8"))
    assert {"Summary · games · scratch", "Summary · films · scratch"} <= set(parsed.headings)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert (tmp_path / "r" / "tables" / "films-scratch-averages.csv").exists()


def test_a_sweep_is_drawn_over_the_values_of_an_option() -> None:
    runs = [
        replace(
            run(f"peso-{weight}", f"peso (weight {weight})", 0.5, seed=place),
            options={"strategy.name": "peso", "strategy.weight": weight},
        )
        for place, weight in enumerate((0.0, 0.1, 1.0, 10.0))
    ]
    single = replace(run("single", "single", 0.4, seed=9), options={"strategy.name": "single"})
    comparison = Comparison([*runs, single], [10])
    (section,) = filter(None, [sweep(comparison)])
    plot = section.plots[0]
    curve, level = plot.series  # type: ignore[union-attr]
    assert curve.x.tolist() == [-2, -1, 0, 1]
    metric = comparison.headline[0]
    assert curve.y.tolist() == [comparison.average(s, metric).value for s in comparison.systems[:4]]
    assert (level.label, level.dashed) == ("single", True)
    assert sweep(Comparison(runs[:2], [10])) is None


def test_two_runs_of_one_strategy_are_told_apart_by_name() -> None:
    comparison = Comparison([run("a", "peso", 0.1), run("b", "peso", 0.2), run("c", "none", 0.2)], [10])
    assert [system.label for system in comparison.systems] == ["peso · a", "peso · b", "none"]


def test_training_curve_reads_the_log() -> None:
    lines = [
        {"epoch": 1, "step": 1, "loss": 3.0, "gradient_norm": 0.5, "penalty_gradient_norm": 0.0, "tokens": 9},
        {"epoch": 1, "step": 2, "loss": 2.0, "gradient_norm": 0.4, "penalty_gradient_norm": 0.1, "tokens": 9},
        {"epoch": 1, "step": 2, "training_loss": 2.5, "validation_loss": 2.2},
    ]
    curve = TrainingCurve.of_records(lines)
    assert curve.steps.tolist() == [1, 2]
    assert curve.loss.tolist() == [3, 2]
    assert curve.penalty_gradient_norm.tolist() == [0, 0.1]
    assert (curve.validation_steps.tolist(), curve.validation_loss.tolist()) == ([2], [2.2])


def test_levels_of_a_table_sum_to_their_last_column_and_baselines_are_not_in_it() -> None:
    comparison = Comparison(example_runs(), [5, 10])
    first, *others = comparison.systems
    assert first.runs[0].stages[1].predictions.target_level_log_probabilities is not None
    table = levels_table(comparison)
    assert [row[0] for row in table.rows] == [system.label for system in comparison.systems]
    for row in table.rows:
        numbers = [cell.value for cell in row[1:] if isinstance(cell, Quantity)]
        assert numbers[-1] == pytest.approx(sum(numbers[:-1]), abs=1e-5)
    bare = [
        replace(run, stages={t: replace(s, predictions=_without_levels(s)) for t, s in run.stages.items()})
        for run in others[0].runs
    ]
    table = levels_table(Comparison([*first.runs, *bare], [5, 10]))
    assert [row[0] for row in table.rows] == [first.label]


def _without_levels(stage: StageSummary) -> Predictions:
    return replace(stage.predictions, target_level_log_probabilities=None)


def test_the_report_says_whether_seeds_share_their_base_stage() -> None:
    def based(runs: list[RunSummary], shared: bool) -> list[RunSummary]:
        return [
            replace(one, manifests=[{"stage": 0, "determined_by": "x" if shared else one.name}])
            for one in runs
        ]

    one, two = seeds("single", "single", 0.4), seeds("peso", "peso", 0.5)
    for runs, words in {
        "shared": (based(one, True) + based(two, True), ["The seeds of all systems share one stage 0"]),
        "apart": (based(one, False) + based(two, False), ["Each seed of every system has its own stage 0"]),
        "both": (based(one, True) + based(two, False), ["seeds of “single” share", "Each seed of “peso”"]),
    }.values():
        text = " ".join(cautions(Comparison(runs, [10])))
        assert all(word in text for word in words), text
    assert "stage 0" not in " ".join(cautions(Comparison(one + two, [10])))  # nothing is known


@pytest.mark.slow
def test_sections_stand_alone() -> None:
    """Each is a function of the comparison and names files and addresses that no other uses."""
    sections = sections_of(Comparison(example_runs(), [5, 10]))
    assert len({section.anchor for section in sections}) == len(sections)
    tables = [table.name for section in sections for table in (*section.tables, *section.folded)]
    plots = [plot.name for section in sections for plot in section.plots]
    assert len(set(tables)) == len(tables)
    assert len(set(plots)) == len(plots)
