"""The popularity baseline: what it counts, what it must not see, and how it answers."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peso.baselines.baseline import BaselineAnswers, Setting
from peso.baselines.popularity import Popularity, item_counts
from peso.evaluation.predictions import Predictions, label_cases, make_predictions
from peso.events.histories import Ragged, Stage
from peso.items.semantic_ids import SemanticIds
from peso.runtime.progress import Silent

# b and c share an ID
IDS = SemanticIds(list("abcde"), np.array([[0], [1], [1], [2], [3]], dtype=np.int32), (4,))


def stage(number: int, previous: list[list[int]], current: list[list[int]]) -> Stage:
    return Stage(number, [f"u{i}" for i in range(len(current))], Ragged.of(previous), Ragged.of(current))


STAGES = [
    stage(0, [[], []], [[0, 0, 3], [3]]),
    stage(1, [[0, 0, 3], [3], []], [[1, 2, 0, 4, 4], [4, 4], [1, 4, 4]]),
]


def test_counts_hold_the_past_and_what_the_stage_trains_on() -> None:
    assert item_counts(STAGES, 5).tolist() == [2 + 1, 1 + 1, 1, 2, 0]
    assert item_counts(STAGES, 5, last=1).tolist() == [1, 2, 1, 0, 0]
    assert item_counts(STAGES[:1], 5).tolist() == [1, 0, 0, 0, 0]


@given(st.lists(st.lists(st.integers(0, 4), max_size=6), min_size=1, max_size=5), st.data())
def test_held_back_events_cannot_change_the_list(current: list[list[int]], data: st.DataObject) -> None:
    """Nor can events of users whom the protocol leaves out."""
    other = [
        [*items[:-2], *data.draw(st.lists(st.integers(0, 4), min_size=2, max_size=2))]
        if len(items) >= 3
        else data.draw(st.lists(st.integers(0, 4), max_size=2))
        for items in current
    ]
    empty: list[list[int]] = [[]] * len(current)
    for last in (None, 1, 2):
        first = item_counts([*STAGES, stage(2, empty, current)], 5, last)
        second = item_counts([*STAGES, stage(2, empty, other)], 5, last)
        np.testing.assert_array_equal(first, second)


def test_log_probabilities_are_smoothed_frequencies_of_semantic_ids() -> None:
    popularity = Popularity(Setting(IDS.trie, window=1))
    popularity.weights = popularity.smoothing + np.array([3, 2, 1, 2, 0])
    p, same = np.exp(BaselineAnswers(popularity, IDS.trie).log_probabilities(STAGES[1].test_cases(1)))
    np.testing.assert_array_equal(p, same)
    np.testing.assert_allclose(p, np.array([4, 4, 3, 1]) / 12)
    assert p.sum() == pytest.approx(1)


def answers(depth: int, repeats: bool = True) -> Predictions:
    """Of a list that both stages make, to the test cases of the second."""
    popularity = Popularity(Setting(IDS.trie, window=1))
    popularity.learn(STAGES, Silent())
    cases = STAGES[1].test_cases(window=1)
    found = BaselineAnswers(popularity, IDS.trie, repeats=repeats).answer(cases, depth, lambda done: None)
    labels = label_cases(STAGES[:1], STAGES[1])
    return make_predictions(cases, labels, found.leaves, found.scores, found.target_log_probability, IDS)


def test_everyone_gets_the_same_list_best_first() -> None:
    predictions = answers(depth=3)
    assert predictions.users == ["u0", "u2"]
    first, second = predictions.items
    assert first == second
    assert first in (["a", "b", "c", "d"], ["b", "c", "a", "d"])  # two IDs are equally popular
    assert all(earlier >= later for earlier, later in pairwise(predictions.scores[0]))
    assert predictions.rank_semantic_id.tolist() == [0, 0]  # both targets are e, which nobody had before
    np.testing.assert_allclose(predictions.target_log_probability, np.log(1 / 12), rtol=1e-6)
    assert predictions.depth == 3


def test_what_a_user_has_had_can_be_left_out() -> None:
    found = answers(depth=4, repeats=False)
    assert found.users[1] == "u2"  # who has had e, and b, whose ID c has as well
    assert found.items[1] == ["a", "d", "b", "c", "e"]
