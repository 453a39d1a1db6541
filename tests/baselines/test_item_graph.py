"""The graph of items against its formula, and what it may count."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from catalogs import setting
from hypothesis import given
from hypothesis import strategies as st

from peso.baselines.item_graph import ItemGraph, Sequences, edges, known_sequences
from peso.events.histories import Cases, Ragged, Stage
from peso.runtime.progress import Silent

ITEMS = 6
GIVEN = {"reach": 3, "distance": 0.5, "recency": 0.5, "age": 0.25, "backward": 0.1}


def stage(number: int, rows: dict[str, tuple[list[int], list[int]]]) -> Stage:
    previous, current = (Ragged.of(row[place] for row in rows.values()) for place in (0, 1))
    return Stage(number, list(rows), previous, current)


def cases(*histories: list[int]) -> Cases:
    arrays = [np.array(history, dtype=np.int32) for history in histories]
    return Cases([f"c{n}" for n in range(len(arrays))], arrays, np.zeros(len(arrays), dtype=np.int32))


sequences = st.lists(
    st.lists(st.tuples(st.integers(0, ITEMS - 1), st.integers(0, 2)), max_size=6), max_size=4
)


@given(sequences, st.integers(1, 7), st.sampled_from([0.0, 0.3, 1.0]))
def test_edges_are_the_sum_over_pairs(rows: list[list[tuple[int, int]]], reach: int, backward: float) -> None:
    known = Sequences(
        np.array([item for row in rows for item, _ in row], dtype=np.int64),
        np.repeat(np.arange(len(rows)), [len(row) for row in rows]),
        np.array([age for row in rows for _, age in row], dtype=np.int64),
    )
    expected = np.zeros((ITEMS, ITEMS))
    for row in rows:
        for (a, (i, _)), (b, (j, age)) in combinations(enumerate(row), 2):
            if b - a <= reach and i != j:
                weight = 0.25**age * 0.8 ** (b - a - 1)
                expected[i, j] += weight
                expected[j, i] += backward * weight
    found = edges(known, ITEMS, reach, 0.8, 0.25, backward)
    np.testing.assert_allclose(found.toarray(), expected, atol=1e-12)


def test_scores_add_up_the_edges_of_the_history_newest_first() -> None:
    model = ItemGraph(setting(ITEMS, 3), **GIVEN)
    model.learn([stage(0, {"a": ([], [0, 1, 2, 3, 9, 9]), "b": ([], [1, 2, 0, 9, 9])})], Silent())
    graph = model.edges.toarray()
    expected = graph[2] + 0.5 * graph[1] + 0.25 * graph[0]
    np.testing.assert_allclose(model.sums(cases([4, 5, 0, 1, 2]))[0], expected)
    scores = model.scores(cases([4, 5, 0, 1, 2], []))
    np.testing.assert_allclose(scores[0], np.log(expected + model.popularity), rtol=1e-6)
    np.testing.assert_allclose(scores[1], np.log(model.popularity), rtol=1e-6)


def test_what_no_edge_leads_to_is_ordered_by_recent_popularity() -> None:
    model = ItemGraph(setting(ITEMS, 3), **GIVEN)
    old = stage(0, {name: ([], [4, 9 % ITEMS, 9 % ITEMS]) for name in "abc"})
    model.learn([old, stage(1, {name: ([], [5, 0, 0]) for name in "de"})], Silent())
    scores = model.scores(cases([1]))[0]
    assert scores[5] > scores[4] > scores[2] == scores[0]  # two new events weigh more than three old ones


def test_events_are_as_old_as_their_stage() -> None:
    stages = [
        stage(0, {"a": ([5], [0, 1, 2]), "c": ([], [4])}),
        stage(1, {"b": ([3], [1, 2])}),
        stage(2, {"a": ([5, 0, 1, 2], [3, 4, 0, 1]), "d": ([], [2, 2])}),
    ]
    known = known_sequences(stages)
    rows: dict[int, list[tuple[int, int]]] = {}
    for owner, item, age in zip(known.owners, known.items, known.ages, strict=True):
        rows.setdefault(int(owner), []).append((int(item), int(age)))
    a = [(5, 2), (0, 2), (1, 2), (2, 2), (3, 0), (4, 0)]  # without the two that are held back
    assert list(rows.values()) == [a, [(4, 2)], [(3, 2), (1, 1), (2, 1)]]


@given(st.lists(st.lists(st.integers(0, 5), max_size=6), min_size=1, max_size=4), st.data())
def test_held_back_events_are_not_known(current: list[list[int]], data: st.DataObject) -> None:
    def known(lists: list[list[int]]) -> list[Any]:
        found = known_sequences([stage(0, {f"u{n}": ([], items) for n, items in enumerate(lists)})])
        return [found.items.tolist(), found.ages.tolist()]

    other = [
        [*items[:-2], *data.draw(st.lists(st.integers(0, 5), min_size=2, max_size=2))]
        if len(items) >= 3
        else data.draw(st.lists(st.integers(0, 5), max_size=2))
        for items in current
    ]
    assert known(current) == known(other)


def test_a_sequence_that_is_followed_is_recommended() -> None:
    rows = {f"u{n}": ([], [(n + step) % ITEMS for step in range(5)]) for n in range(12)}
    model = ItemGraph(setting(ITEMS, 3), **GIVEN)
    model.learn([stage(0, rows)], Silent())
    assert model.scores(cases([2], [4, 5])).argmax(axis=1).tolist() == [3, 0]


@pytest.mark.parametrize("option", [{"recency": 0.0}, {"backward": 1.5}, {"reach": 0}, {"distance": 2.0}])
def test_impossible_options_are_refused(option: dict[str, float]) -> None:
    from peso.errors import ConfigError

    with pytest.raises(ConfigError, match=next(iter(option))):
        ItemGraph(setting(ITEMS, 3), **option)
