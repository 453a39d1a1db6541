"""Transfer and forgetting by their formulas, and what the report makes of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reports import CASES, across, run

from peso.errors import WorkspaceError
from peso.evaluation.comparison import Comparison
from peso.evaluation.metrics import Term, backward_terms, forgetting_terms, forward_terms
from peso.evaluation.report.sections.transfer import matrix, transfer
from peso.evaluation.run_summary import RunSummary

TERMS = (backward_terms, forward_terms, forgetting_terms)


def figure(results: np.ndarray, terms: list[Term]) -> float:
    return float(np.mean([results[a, j] - results[b, j] for j, a, b in terms]))


@given(st.integers(2, 6), st.integers(0, 1000))
def test_figures_by_definition(stages: int, seed: int) -> None:
    results, last = np.random.default_rng(seed).normal(size=(stages, stages)), stages - 1
    changes = [results[last, j] - results[j, j] for j in range(last)]
    assert figure(results, backward_terms(results)) == pytest.approx(sum(changes) / last)
    drops = [max(results[i, j] for i in range(last)) - results[last, j] for j in range(last)]
    assert figure(results, forgetting_terms(results)) == pytest.approx(sum(drops) / last)
    helped = [results[j - 1, j] - results[0, j] for j in range(2, stages)]
    if helped:
        assert figure(results, forward_terms(results)) == pytest.approx(sum(helped) / len(helped))
    else:
        assert not forward_terms(results)


def test_a_model_that_never_changes_neither_transfers_nor_forgets() -> None:
    results = np.tile(np.array([0.4, 0.1, 0.3, 0.2]), (4, 1))
    assert [figure(results, terms(results)) for terms in TERMS] == [0, 0, 0]


def test_what_was_not_tested_is_not_guessed() -> None:
    results = np.diag([0.4, 0.3, 0.2])
    results[results == 0] = np.nan
    assert np.isnan([figure(results, terms(results)) for terms in TERMS[:2]]).all()
    assert not forgetting_terms(results)


def test_one_stage_has_no_transfer() -> None:
    assert not any(terms(np.ones((1, 1))) for terms in TERMS)


def with_across(name: str, strategy: str, skill: float) -> RunSummary:
    return replace(run(name, strategy, skill, seed=3), across=across(skill, 3))


def test_matrix_holds_the_means_of_the_tests() -> None:
    comparison = Comparison([with_across("a", "single", 0.5)], [10])
    (system,) = comparison.systems
    metric = comparison.metric("log_probability")
    results = matrix(system, metric)
    assert results.shape == (len(CASES), len(CASES))
    assert results[1, 3] == pytest.approx(metric.values(system.first.across[1, 3]).mean())
    assert results[2, 2] == pytest.approx(metric.values(system.first.stages[2].predictions).mean())


def test_figures_of_the_report_are_those_of_the_matrix_with_the_interval_of_paired_cases() -> None:
    comparison = Comparison([with_across("a", "single", 0.5)], [10])
    (system,) = comparison.systems
    metric = comparison.metric("log_probability")
    results = matrix(system, metric)
    (table,) = [t for t in transfer(comparison).tables if t.name == "log-probability-transfer"]
    for cell, terms in zip(table.rows[0][1:4], TERMS, strict=True):
        assert cell.value == pytest.approx(figure(results, terms(results)))  # type: ignore[union-attr]
    # by hand: the mean over stages 0 … 3 of the mean change of their cases, users added up over stages
    last, changes = len(CASES) - 1, {}
    for j in range(last):
        own, later = system.first.stages[j].predictions, system.first.across[last, j]
        change = metric.values(later) - metric.values(own)
        for user, value in zip(own.users, change - change.mean(), strict=True):
            changes[user] = changes.get(user, 0.0) + value / len(change) / last
    error = np.sqrt(len(changes) / (len(changes) - 1) * sum(value**2 for value in changes.values()))
    assert table.rows[0][1].half_width == pytest.approx(1.959964 * error, rel=1e-5)  # type: ignore[union-attr]


def test_a_test_of_other_cases_is_refused() -> None:
    tests = across(0.5, 3)
    tests[4, 1] = tests[4, 1].take(range(5))
    broken = replace(run("a", "single", 0.5, seed=3), across=tests)
    with pytest.raises(WorkspaceError, match="different cases of stage 1"):
        transfer(Comparison([broken], [10]))


def test_regret_is_the_paired_difference_to_learning_anew() -> None:
    runs = [run("a", "single", 0.2, seed=1), run("b", "retrain", 0.9, seed=2)]
    comparison = Comparison(runs, [10])
    section = transfer(comparison)
    (table,) = [t for t in section.tables if t.name == "log-probability-transfer"]
    single, anew = comparison.systems
    expected = comparison.difference(anew, single, comparison.metric("log_probability"))
    assert table.rows[0][4].value == pytest.approx(expected.value)  # type: ignore[union-attr]
    assert [row[0] for row in table.rows] == ["single"]  # nothing is known of the other
    assert table.rows[0][1] is None  # no tests across stages
