"""Warnings about models that have learned too little fire on such models, and on no others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from reports import run

from peso.evaluation.comparison import Comparison
from peso.evaluation.metrics import FEWEST, first_items, warnings
from peso.evaluation.predictions import UNRANKED, Predictions
from peso.evaluation.report.findings import _unhealthy

CASES, ITEMS, DEPTH = 60, 20, 5


def predictions(lists: np.ndarray, targets: np.ndarray, first_code: float = -0.5) -> Predictions:
    """lists: int (n, depth), the items of each answer; the log-probability of every target's first code."""
    hits = lists == targets[:, None]
    ranks = np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, UNRANKED).astype(np.int32)
    levels = np.tile(np.array([[first_code, -1.0]], np.float32), (len(lists), 1))
    return Predictions(
        users=[f"u{n}" for n in range(len(lists))],
        targets=[f"i{t}" for t in targets],
        items=[[f"i{item}" for item in row] for row in lists],
        scores=[np.zeros(lists.shape[1], np.float32)] * len(lists),
        rank_semantic_id=ranks,
        rank_item=ranks,
        target_log_probability=levels.sum(axis=1),
        user_segment=["new"] * len(lists),
        item_segment=["known"] * len(lists),
        history_length=np.ones(len(lists), np.int32),
        depth=DEPTH,
        target_level_log_probabilities=levels,
    )


@pytest.fixture
def targets() -> np.ndarray:
    return np.random.default_rng(0).integers(0, ITEMS, CASES)


@pytest.fixture
def good(targets: np.ndarray) -> np.ndarray:
    """Every second user has the target first; nobody has the same list."""
    lists = (targets[:, None] + np.arange(DEPTH) + 1) % ITEMS
    lists[::2] = (targets[::2, None] + np.arange(DEPTH)) % ITEMS
    return lists


POPULAR = np.where(np.arange(CASES) % 10 == 0, 2, UNRANKED)
FREQUENCIES = np.full(CASES, -2.0)


def test_a_good_model_raises_none(good: np.ndarray, targets: np.ndarray) -> None:
    assert warnings(predictions(good, targets), POPULAR, FREQUENCIES, ease_ranks=POPULAR, catalogue=100) == {}


def test_one_list_for_everyone_is_a_collapse(good: np.ndarray, targets: np.ndarray) -> None:
    same = np.tile(good[:1], (CASES, 1))
    same[:3] = good[:3]
    found = warnings(predictions(same, targets), np.zeros(CASES, int), FREQUENCIES)
    assert [*found] == ["first_items"]
    assert "9" in found["first_items"]
    assert "of all users get the same first item" in found["first_items"]


def test_the_same_few_items_in_any_order_are_a_collapse(good: np.ndarray, targets: np.ndarray) -> None:
    same = np.stack([np.random.default_rng(row).permutation(DEPTH + 2)[:DEPTH] for row in range(CASES)])
    answers = predictions(same, targets)
    found = warnings(answers, np.zeros(CASES, int), FREQUENCIES, catalogue=100)
    assert [*found] == ["lists"]
    assert "nearly the same list (in effect 7 different items in lists of 5, of 100)" in found["lists"]
    assert not warnings(answers, np.zeros(CASES, int), FREQUENCIES, catalogue=20)  # a small catalog
    spread = predictions((same + 7 * (np.arange(CASES)[:, None] % 5)) % 50, targets)
    assert not warnings(spread, np.zeros(CASES, int), FREQUENCIES, catalogue=100)


def test_codes_predicted_no_better_than_by_frequency(good: np.ndarray, targets: np.ndarray) -> None:
    found = warnings(predictions(good, targets, first_code=-2.1), POPULAR, FREQUENCIES)["codes"]
    assert "predicted no better (-2.100 nats) than by how often each code occurs (-2.000)" in found


def test_with_an_item_head_the_likelihood_of_the_whole_answer_counts(
    good: np.ndarray, targets: np.ndarray
) -> None:
    answers = predictions(good, targets, first_code=-9.0)  # the item head can do without the codes
    own = answers.target_log_probability.mean()
    assert not warnings(answers, POPULAR, np.full(CASES, own - 0.1), item_head=True)
    (found,) = warnings(answers, POPULAR, np.full(CASES, own + 0.1), item_head=True).items()
    assert found[0] == "items"
    assert found[1].startswith("the next item is predicted no better")
    assert "than by how often each item occurs" in found[1]


@pytest.mark.parametrize(("catalogue", "told"), [(1, False), (2, False), (5, True), (100, True)])
def test_one_first_item_is_no_collapse_of_a_catalogue_without_others(
    targets: np.ndarray, catalogue: int, told: bool
) -> None:
    same = np.tile(np.arange(min(catalogue, 5)), (CASES, 1))
    same[: CASES // 2] = same[: CASES // 2, ::-1]  # two first items in turn, if there are two
    found = warnings(predictions(same, targets), POPULAR, FREQUENCIES, catalogue=catalogue)
    assert ("first_items" in found) == told


def test_counts_of_transitions_that_are_as_good_alone(good: np.ndarray, targets: np.ndarray) -> None:
    answers = predictions(good, targets)
    low = np.full(CASES, answers.target_log_probability.mean() - 1)
    assert not warnings(answers, POPULAR, low, count_ranks=POPULAR, item_head=True)
    found = warnings(answers, POPULAR, low, count_ranks=np.ones(CASES, int), item_head=True)
    assert [*found] == ["counts"]
    assert "what was trained does not improve the first 5 items here" in found["counts"]


def test_the_most_popular_items_as_good_for_all(good: np.ndarray, targets: np.ndarray) -> None:
    found = warnings(predictions(good, targets), np.ones(CASES, int), FREQUENCIES)["popularity"]
    assert "recommending the newest stage's most popular items to everyone is at least as good" in found
    assert "`head: items`" in found
    ones = np.ones(CASES, int)
    found = warnings(predictions(good, targets), ones, FREQUENCIES, item_head=True)["popularity"]
    assert "`head: items`" not in found


def test_a_linear_model_that_is_as_good(good: np.ndarray, targets: np.ndarray) -> None:
    found = warnings(predictions(good, targets), POPULAR, FREQUENCIES, ease_ranks=np.ones(CASES, int))
    assert [*found] == ["ease"]
    assert "EASE, a linear model" in found["ease"]
    assert "--with hybrid" in found["ease"]


def test_a_handful_of_cases_says_nothing(good: np.ndarray, targets: np.ndarray) -> None:
    few = predictions(np.tile(good[:1], (20, 1)), targets[:20])
    assert warnings(few, np.ones(20, int), FREQUENCIES[:20]) == {}


def test_the_effective_number_of_first_items(good: np.ndarray, targets: np.ndarray) -> None:
    effective, share = first_items(predictions(np.arange(CASES)[:, None] % 10 + np.arange(DEPTH), targets))
    assert effective == pytest.approx(10)
    assert share == pytest.approx(0.1)


def test_the_report_warns_of_the_newest_stage_with_enough_cases() -> None:
    def told(newest_cases: int) -> list[str]:
        made = run("w", "single", 0.5, cases=(300, 300, 300, newest_cases))
        stages = {number: replace(stage, warnings=[f"of {number}"]) for number, stage in made.stages.items()}
        return _unhealthy(Comparison([replace(made, stages=stages)], [5]))

    assert told(FEWEST) == ["Warning: “single”, stage 3: of 3."]
    assert told(FEWEST - 1) == ["Warning: “single”, stage 2: of 2."]
