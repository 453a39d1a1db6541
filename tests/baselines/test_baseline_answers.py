"""From scores to answers: semantic IDs, temperature, repeats; and the fusion of two models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import random_semantic_ids
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from peso.baselines.baseline import BaselineAnswers, top
from peso.baselines.hybrid import WEIGHTS, Candidates, Hybrid, best_weight, joined, pool, pooled
from peso.decoding import search
from peso.events.histories import Cases
from peso.training.likelihood import target_log_probabilities

ITEMS = 50


class Fixed:
    """Scores that depend on the length of the history only."""

    def __init__(self, rows: np.ndarray, probabilistic: bool) -> None:
        self.rows, self.probabilistic = rows.astype(np.float32), probabilistic

    def scores(self, cases: Cases) -> np.ndarray:
        return self.rows[[len(history) % len(self.rows) for history in cases.histories]]

    def learn(self, stages: Sequence[Any], observer: Any) -> dict[str, Any]:
        return {}

    def save(self, directory: Path) -> None: ...

    def restore(self, directory: Path, stages: Sequence[Any]) -> None: ...


def some_cases(n: int, seed: int = 0) -> Cases:
    generator = np.random.default_rng(seed)
    histories = [generator.integers(0, ITEMS, generator.integers(1, 9)).astype(np.int32) for _ in range(n)]
    return Cases([f"u{i}" for i in range(n)], histories, generator.integers(0, ITEMS, n).astype(np.int32))


def fixed(probabilistic: bool = True, scale: float = 2.0) -> Fixed:
    return Fixed(scale * np.random.default_rng(1).normal(size=(9, ITEMS)), probabilistic)


@pytest.mark.parametrize("repeats", [True, False])
def test_a_semantic_id_has_the_probability_of_its_items(repeats: bool) -> None:
    ids = random_semantic_ids(ITEMS, (3, 4))  # at most 12 IDs for 50 items
    cases, baseline = some_cases(130), fixed()
    answers = BaselineAnswers(baseline, ids.trie, repeats=repeats)
    found = answers.log_probabilities(cases)
    weights = np.exp(baseline.scores(cases).astype(np.float64))
    if not repeats:
        for row, history in zip(weights, cases.histories, strict=True):
            row[np.unique(history)] *= 1e-6
    expected = np.zeros_like(found)
    for item, leaf in enumerate(ids.trie.leaf_of):
        expected[:, leaf] += weights[:, item]
    expected /= weights.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.exp(found), expected, rtol=1e-9)

    told: list[int] = []
    answered = answers.answer(cases, 5, told.append)
    np.testing.assert_array_equal(answered.leaves, np.argsort(-expected, axis=1, kind="stable")[:, :5])
    np.testing.assert_allclose(
        answered.target_log_probability, np.log(expected[np.arange(130), ids.trie.leaf_of[cases.targets]])
    )
    assert told[-1] == 130


@given(
    hnp.arrays(np.float64, (3, 12), elements=st.sampled_from([0.0, 1.0, 2.0, -np.inf])), st.integers(1, 12)
)
def test_the_best_are_those_of_a_stable_sort(scores: np.ndarray, depth: int) -> None:
    np.testing.assert_array_equal(top(scores, depth), np.argsort(-scores, axis=1, kind="stable")[:, :depth])


def test_the_temperature_is_the_one_that_the_targets_were_drawn_at() -> None:
    ids, baseline = random_semantic_ids(ITEMS, (8, 8, 8)), fixed(probabilistic=False, scale=1.0)
    cases = some_cases(1000)
    drawn = np.exp(3.0 * baseline.scores(cases).astype(np.float64))
    generator = np.random.default_rng(2)
    targets = [generator.choice(ITEMS, p=row / row.sum()) for row in drawn]
    cases = Cases(cases.users, cases.histories, np.array(targets, dtype=np.int32))
    fitted = BaselineAnswers.fitted(baseline, ids.trie, cases, repeats=True)
    assert fitted.settings == {"inverse_temperature": pytest.approx(3.0, rel=0.1), "repeats": True}
    own = BaselineAnswers.fitted(fixed(), ids.trie, cases, repeats=True)
    assert own.inverse_temperature == 1.0  # a model with probabilities of its own keeps them


def some_candidates(seed: int, n: int = 40, count: int = 12) -> Candidates:
    generator = np.random.default_rng(seed)
    leaves = np.stack([generator.permutation(30)[:count] for _ in range(n)])
    leaves[::7, -3:] = -1
    towers, llm = generator.normal(size=(2, n, count)) - 5
    absent = leaves < 0
    return Candidates(leaves, np.where(absent, -np.inf, towers), np.where(absent, -np.inf, llm))


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_pool_ranks_by_the_weighted_sum(weight: float) -> None:
    candidates = some_candidates(0)
    leaves, scores = pooled(candidates, weight, 5)
    for row in range(len(leaves)):
        expected = {
            int(leaf): weight * a + (1 - weight) * b
            for leaf, a, b in zip(
                candidates.leaves[row], candidates.towers[row], candidates.llm[row], strict=True
            )
            if leaf >= 0
        }
        best = sorted(expected, key=lambda leaf: -expected[leaf])[:5]
        assert leaves[row].tolist() == best
        np.testing.assert_allclose(scores[row], [expected[leaf] for leaf in best])


def test_joined_candidates_stand_once() -> None:
    both = joined(some_candidates(0), some_candidates(1))
    for row in range(len(both.leaves)):
        kept = both.leaves[row][both.leaves[row] >= 0]
        first, second = (some_candidates(seed).leaves[row] for seed in (0, 1))
        assert sorted(kept) == sorted({*first, *second} - {-1})
    assert (np.isneginf(both.llm) == (both.leaves < 0)).all()


def test_a_pool_is_a_lower_bound_of_the_normalised_one() -> None:
    p, q = np.random.default_rng(0).dirichlet(np.ones(20), size=2)
    for weight in WEIGHTS:
        assert np.exp(pool(np.log(p), np.log(q), weight)).sum() <= 1 + 1e-12


def test_the_weight_goes_to_the_model_that_knows() -> None:
    candidates = some_candidates(3)
    best = np.take_along_axis(candidates.leaves, candidates.towers.argmax(axis=1)[:, None], axis=1)[:, 0]
    assert best_weight(candidates, best, depth=3)[0] >= 0.9
    best = np.take_along_axis(candidates.leaves, candidates.llm.argmax(axis=1)[:, None], axis=1)[:, 0]
    assert best_weight(candidates, best, depth=3)[0] <= 0.1
    assert best_weight(candidates, np.full(40, 29_000), depth=3)[0] == 0.5  # nothing is known: even


def test_at_its_ends_the_hybrid_is_either_model(make_model) -> None:
    """With the whole catalogue as candidates, nothing is lost on the way."""
    model = make_model(items=ITEMS, sizes=(4, 4, 4))
    ids, cases = model.semantic_ids, some_cases(9)
    towers = BaselineAnswers(fixed(), ids.trie)
    hybrid = Hybrid(towers, model, candidates=ids.trie.leaves, weight=1.0)
    alone = towers.answer(cases, 6, lambda done: None)
    found = hybrid.answer(cases, 6, lambda done: None)
    np.testing.assert_array_equal(found.leaves, alone.leaves)
    np.testing.assert_allclose(found.target_log_probability, alone.target_log_probability)

    found = Hybrid(towers, model, ids.trie.leaves, 0.0).answer(cases, 6, lambda done: None)
    beams = search(model, cases.histories, beams=ids.trie.leaves)
    np.testing.assert_array_equal(found.leaves, beams.leaves[:, :6])
    np.testing.assert_allclose(found.scores, beams.scores[:, :6], atol=1e-5)
    np.testing.assert_allclose(
        found.target_log_probability, target_log_probabilities(model, cases), atol=1e-5
    )


def test_candidates_of_both_models_are_scored_by_both(make_model) -> None:
    model = make_model(items=ITEMS, sizes=(4, 4, 4))
    trie, cases = model.semantic_ids.trie, some_cases(9)
    towers = BaselineAnswers(fixed(), trie)
    found, *_ = Hybrid(towers, model, 4, 0.5)._propose(cases, lambda done: None)
    everything = search(model, cases.histories, beams=trie.leaves)
    every = towers.log_probabilities(cases)
    for row in range(len(cases)):
        wide = dict(zip(everything.leaves[row].tolist(), everything.scores[row].tolist(), strict=True))
        for leaf, a, b in zip(found.leaves[row], found.towers[row], found.llm[row], strict=True):
            if leaf >= 0:
                assert a == pytest.approx(every[row, leaf])
                assert b == pytest.approx(wide[int(leaf)], abs=1e-4)
        best = set(np.argsort(-every[row])[:4].tolist())
        assert best <= set(found.leaves[row].tolist())
