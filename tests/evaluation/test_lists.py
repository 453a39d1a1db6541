"""Figures of what is recommended, against a walk through the lists."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reports import example_runs

from peso.evaluation.catalogue import (
    coverage,
    gini,
    item_rows,
    novelty,
    popularity_percentile,
    prefix_diversity,
)
from peso.evaluation.comparison import Comparison
from peso.evaluation.intervals import Estimate, Panel

ITEMS = 12


@st.composite
def rows(draw: st.DrawFn) -> np.ndarray:
    """Lists of up to five different items, filled up with -1; at least one item somewhere."""
    lists = draw(
        st.lists(st.lists(st.integers(0, ITEMS - 1), max_size=5, unique=True), min_size=1, max_size=8)
    )
    lists[0] = lists[0] or [3]
    return np.array([[*one, *[-1] * (5 - len(one))] for one in lists])


def items_of(row: np.ndarray) -> list[int]:
    return [int(item) for item in row if item >= 0]


@given(rows())
def test_coverage_and_gini_by_definition(lists: np.ndarray) -> None:
    shown = [item for row in lists for item in items_of(row)]
    assert coverage(lists, ITEMS) == len(set(shown)) / ITEMS
    times = [shown.count(item) for item in range(ITEMS)]
    # the mean absolute difference over twice the mean
    differences = [abs(a - b) for a in times for b in times]
    assert gini(lists, ITEMS) == pytest.approx(np.mean(differences) / (2 * np.mean(times)))


@given(rows(), st.lists(st.integers(0, 50), min_size=ITEMS, max_size=ITEMS))
def test_novelty_by_definition(lists: np.ndarray, seen: list[int]) -> None:
    found = novelty(lists, np.array(seen))
    for row, value in zip(lists, found, strict=True):
        parts = [-math.log2((seen[item] + 1) / (sum(seen) + ITEMS)) for item in items_of(row)]
        assert value == pytest.approx(np.mean(parts)) if parts else math.isnan(value)


@given(rows(), st.integers(0, 100))
def test_diversity_of_prefixes_by_definition(lists: np.ndarray, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2, (ITEMS, 3))

    def distance(one: int, other: int) -> float:
        shared = 0
        while shared < 3 and codes[one, shared] == codes[other, shared]:
            shared += 1
        return 1 - shared / 3

    for row, value in zip(lists, prefix_diversity(lists, codes), strict=True):
        parts = [distance(a, b) for a, b in itertools.combinations(items_of(row), 2)]
        assert value == pytest.approx(np.mean(parts)) if parts else math.isnan(value)


@given(rows())
def test_order_in_a_list_changes_nothing(lists: np.ndarray) -> None:
    seen, codes = np.arange(ITEMS), np.arange(ITEMS)[:, None] // np.array([6, 3, 1])
    backwards = lists[:, ::-1]
    for function, known in (
        (novelty, seen),
        (popularity_percentile, seen / ITEMS),
        (prefix_diversity, codes),
    ):
        assert np.allclose(function(lists, known), function(backwards, known), equal_nan=True)


def test_lists_are_cut_at_k() -> None:
    assert item_rows([["a", "b", "c"]], {"a": 0, "b": 1, "c": 2}, k=2).tolist() == [[0, 1]]


def test_figures_of_cases_have_intervals_over_users_and_those_of_a_catalogue_have_none() -> None:
    popularity, other, *_ = example_runs()
    generator = np.random.default_rng(0)
    varied = {
        stage: replace(
            one,
            predictions=replace(
                one.predictions,
                items=[
                    [f"i{item}" for item in generator.permutation(500)[:10]] for _ in one.predictions.users
                ],
            ),
        )
        for stage, one in other.stages.items()
    }
    comparison = Comparison([popularity, replace(other, stages=varied)], [10])
    system, stages = comparison.systems[1], comparison.averaged
    figures = [comparison.list_figures(system.first, stage) for stage in stages]
    users = [np.array(system.first.stages[stage].predictions.users) for stage in stages]
    expected = Estimate.of(np.concatenate([figure.novelty for figure in figures]), Panel.of(users))
    found = comparison.list_mean(system, "novelty", stages)
    assert found.value == pytest.approx(expected.value)
    assert expected.has_interval
    assert found.half_width == pytest.approx(expected.half_width, rel=1e-3)
    assert not comparison.list_mean(system, "coverage", stages).has_interval
