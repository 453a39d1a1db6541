"""EASE and item-kNN against the definitions, and what every baseline may count."""

from __future__ import annotations

import numpy as np
import pytest
from catalogs import setting
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from peso.baselines.baseline import interactions, known_histories, repeats_occur
from peso.baselines.ease import Ease, ease_weights
from peso.baselines.item_knn import ItemKnn, similarities
from peso.events.histories import Cases, Ragged, Stage
from peso.runtime.progress import Silent


def ease(items: int, window: int, taking_part: int, regularisation: float) -> Ease:
    return Ease(setting(items, window), items=taking_part, regularisation=regularisation)


def item_knn(items: int, window: int, neighbours: int, shrinkage: float) -> ItemKnn:
    return ItemKnn(setting(items, window), neighbours=neighbours, shrinkage=shrinkage)


def stage(number: int, rows: dict[str, tuple[list[int], list[int]]]) -> Stage:
    return Stage(
        number,
        list(rows),
        Ragged.of(previous for previous, _ in rows.values()),
        Ragged.of(current for _, current in rows.values()),
    )


def random_stages(items: int = 12, users: int = 30, seed: int = 0) -> list[Stage]:
    generator = np.random.default_rng(seed)
    had: dict[str, list[int]] = {}
    stages = []
    for number in range(3):
        rows = {}
        for user in generator.choice(users, size=users // 2, replace=False):
            name = f"u{user}"
            current = generator.integers(0, items, generator.integers(1, 7)).tolist()
            rows[name] = (list(had.get(name, [])), current)
            had[name] = had.get(name, []) + current
        stages.append(stage(number, rows))
    return stages


def cases(*histories: list[int]) -> Cases:
    arrays = [np.array(history, dtype=np.int32) for history in histories]
    return Cases([f"c{n}" for n in range(len(arrays))], arrays, np.zeros(len(arrays), dtype=np.int32))


ones = hnp.arrays(
    np.float64, st.tuples(st.integers(2, 12), st.integers(2, 8)), elements=st.sampled_from([0, 1])
)


@given(ones, st.floats(0.1, 50))
def test_ease_is_the_ridge_regression_of_every_item_on_the_others(x: np.ndarray, penalty: float) -> None:
    weights = ease_weights(x.T @ x, penalty)
    for item in range(x.shape[1]):
        others = np.delete(np.arange(x.shape[1]), item)
        a = x[:, others]
        expected = np.linalg.solve(a.T @ a + penalty * np.eye(len(others)), a.T @ x[:, item])
        np.testing.assert_allclose(weights[others, item], expected, atol=1e-9)
        assert weights[item, item] == 0


@given(ones, st.integers(1, 8), st.floats(0, 20))
def test_neighbours_are_the_most_similar_items(x: np.ndarray, neighbours: int, shrinkage: float) -> None:
    found = similarities(interactions([np.flatnonzero(row) for row in x], x.shape[1]), neighbours, shrinkage)
    both, users = x.T @ x, x.sum(axis=0)
    for i, row in enumerate(found.toarray()):
        expected = both[i] / (np.sqrt(users[i] * users) + shrinkage + (both[i] == 0))
        expected[i] = 0
        kept = np.argsort(-expected, kind="stable")[:neighbours]
        np.testing.assert_allclose(row, np.where(np.isin(np.arange(len(row)), kept), expected, 0))


def test_scores_add_up_over_the_items_of_the_window() -> None:
    stages = random_stages()
    for model in (ease(12, 3, 12, 5.0), item_knn(12, 3, 12, 1.0)):
        model.learn(stages, Silent())
        alone = model.sums(cases([1], [4], [7]))
        together = model.sums(cases([9, 9, 1, 4, 7]))  # 9 is older than the window
        np.testing.assert_allclose(together[0], alone.sum(axis=0), atol=1e-6)


def test_what_a_history_says_nothing_about_is_ordered_by_popularity() -> None:
    stages = [stage(0, {"a": ([], [0, 1, 8, 8]), "b": ([], [2, 3, 3, 8]), "c": ([], [3, 2, 8, 8])})]
    for model in (ease(9, 20, 9, 1.0), item_knn(9, 20, 10, 0.0)):
        model.learn(stages, Silent())
        scores = model.scores(cases([7]))[0]
        # what is held back, 8, is as unknown as what nobody had
        assert scores[3] == scores[2] > scores[0] == scores[1] > scores[8] == scores[4]


def test_items_beyond_those_taking_part_are_below_the_others() -> None:
    model = ease(12, 20, 4, 5.0)
    figures = model.learn(random_stages(), Silent())
    assert figures["items_taking_part"] == len(model.rows) == 4
    users = interactions(list(known_histories(random_stages()).values()), 12).sum(axis=0)
    assert users[model.rows].min() >= np.delete(users, model.rows).max()
    outside = np.setdiff1d(np.arange(12), model.rows)
    found = model.scores(cases([1, 2]))[0][outside]
    np.testing.assert_allclose(found, np.log(model.popularity[outside]), rtol=1e-6)


def test_they_are_kept_up_to_date_and_can_be_had_again(tmp_path) -> None:
    stages = random_stages()
    for make in (lambda: ease(12, 20, 12, 5.0), lambda: item_knn(12, 20, 12, 1.0)):
        continual, static, again = make(), make(), make()
        static.learn(stages[:1], Silent())
        for number in range(3):
            continual.learn(stages[: number + 1], Silent())
        again.restore(tmp_path, stages)
        asked = cases([1, 2], [3])
        np.testing.assert_array_equal(continual.scores(asked), again.scores(asked))
        assert np.abs(continual.scores(asked) - static.scores(asked)).max() > 1e-3


@given(st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=5), st.data())
def test_held_back_events_are_not_known(current: list[list[int]], data: st.DataObject) -> None:
    """Nor are events in the newest stage of users whom its protocol leaves out."""

    def known(lists: list[list[int]]) -> dict[str, list[int]]:
        earlier = stage(0, {f"u{n}": ([], [n]) for n in range(3)})
        rows = {f"u{n}": ([n] if n < 3 else [], items) for n, items in enumerate(lists)}
        return {u: h.tolist() for u, h in known_histories([earlier, stage(1, rows)]).items()}

    other = [
        [*items[:-2], *data.draw(st.lists(st.integers(0, 9), min_size=2, max_size=2))]
        if len(items) >= 3
        else data.draw(st.lists(st.integers(0, 9), max_size=2))
        for items in current
    ]
    assert known(current) == known(other)
    assert {u: h for u, h in known(current).items() if u in ("u0", "u1", "u2")}.keys() == {"u0", "u1", "u2"}


@pytest.mark.parametrize(("items", "expected"), [([1, 2, 3, 9, 9], False), ([1, 2, 1, 8, 9], True)])
def test_repeats_are_those_of_the_training_part(items: list[int], expected: bool) -> None:
    assert repeats_occur([stage(0, {"a": ([], items)})]) is expected


@pytest.mark.parametrize("neighbours", [3, 12])
def test_item_knn_without_shrinkage_is_that_of_implicit(neighbours: int) -> None:
    """An independent implementation: its neighbors include the item itself, ours do not."""
    recommenders = pytest.importorskip("implicit.nearest_neighbours")
    from scipy import sparse

    had = interactions(list(known_histories(random_stages(users=60)).values()), 12)
    oracle = recommenders.CosineRecommender(K=neighbours + 1, num_threads=1)
    oracle.fit(sparse.csr_matrix(had), show_progress=False)
    expected = oracle.similarity.toarray()
    np.fill_diagonal(expected, 0)
    found = similarities(had, neighbours, 0.0).toarray()
    np.testing.assert_allclose(np.sort(found, axis=1), np.sort(expected, axis=1), atol=1e-9)
    if neighbours == 12:  # all of them: no ties are broken
        np.testing.assert_allclose(found, expected, atol=1e-9)
