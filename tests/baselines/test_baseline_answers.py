"""From scores to answers: semantic IDs, temperature, repeats; and the fusion of two models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from catalogs import random_semantic_ids
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from peso.baselines.baseline import BaselineAnswers, top
from peso.baselines.hybrid import (
    WEIGHTS,
    Candidates,
    Hybrid,
    best_weights,
    distinct,
    mean_ndcg,
    pool,
    pooled,
    stacked,
)
from peso.config import baseline_label, load_config
from peso.config.baselines import read_baseline
from peso.decoding import search
from peso.errors import ConfigError
from peso.evaluation.metrics import ndcg
from peso.evaluation.predictions import semantic_id_ranks
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


def some_candidates(seed: int, n: int = 40, count: int = 12, models: int = 2) -> Candidates:
    generator = np.random.default_rng(seed)
    leaves = np.stack([generator.permutation(30)[:count] for _ in range(n)])
    leaves[::7, -3:] = -1
    of = generator.normal(size=(models, n, count)) - 5
    return Candidates(leaves, np.where(leaves < 0, -np.inf, of))


@pytest.mark.parametrize("weights", [(0.0,), (0.3,), (1.0,), (0.2, 0.5), (0.0, 1.0), (0.1, 0.2, 0.7)])
def test_the_pool_ranks_by_the_weighted_sum(weights: tuple[float, ...]) -> None:
    candidates = some_candidates(0, models=len(weights) + 1)
    leaves, scores = pooled(candidates, weights, 5)
    every = [*weights, 1 - sum(weights)]
    for row in range(len(leaves)):
        expected = {
            int(leaf): sum(w * p for w, p in zip(every, candidates.of[:, row, place], strict=True))
            for place, leaf in enumerate(candidates.leaves[row])
            if leaf >= 0
        }
        best = sorted(expected, key=lambda leaf: -expected[leaf])[:5]
        assert leaves[row].tolist() == best
        np.testing.assert_allclose(scores[row], [expected[leaf] for leaf in best])


def test_equal_candidates_come_in_the_order_of_their_ids() -> None:
    candidates = Candidates(np.array([[7, 2, -1, 5]]), np.log([[[0.2, 0.2, 1.0, 0.4]]] * 2))
    candidates.of[:, 0, 2] = -np.inf
    assert pooled(candidates, (0.5,), 4)[0].tolist() == [[5, 2, 7, -1]]


def test_candidates_named_twice_stand_once() -> None:
    first, second = (some_candidates(seed) for seed in (0, 1))
    both = distinct(
        np.concatenate([first.leaves, second.leaves], axis=1), np.concatenate([first.of, second.of], 2)
    )
    for row in range(len(both.leaves)):
        kept = both.leaves[row][both.leaves[row] >= 0]
        assert sorted(kept) == sorted({*first.leaves[row], *second.leaves[row]} - {-1})
    assert (np.isneginf(both.of) == (both.leaves < 0)).all()


def test_parts_with_fewer_candidates_are_filled_up_with_none() -> None:
    parts = [some_candidates(0, count=12), some_candidates(1, n=3, count=9)]
    together = stacked(parts)
    np.testing.assert_array_equal(together.leaves[:40], parts[0].leaves)
    np.testing.assert_array_equal(together.of[:, 40:, :9], parts[1].of)
    assert (together.leaves[40:, 9:] == -1).all()
    assert np.isneginf(together.of[:, 40:, 9:]).all()


def test_a_pool_is_a_lower_bound_of_the_normalised_one() -> None:
    p = np.log(np.random.default_rng(0).dirichlet(np.ones(20), size=3))
    for weight in WEIGHTS:
        assert np.exp(pool(p[:2], (weight,))).sum() <= 1 + 1e-12
        assert np.exp(pool(p, (weight, (1 - weight) / 3))).sum() <= 1 + 1e-12


def test_what_tuning_looks_at_is_the_ndcg_of_the_ranking() -> None:
    candidates = some_candidates(5, models=3)
    candidates.of[:] = np.where(np.isneginf(candidates.of), -np.inf, candidates.of.round())  # many ties
    targets = np.array([*candidates.leaves[:30, 4], *range(10)])
    for weights in ((0.2, 0.3), (0.0, 0.0), (1.0, 0.0)):
        leaves, _ = pooled(candidates, weights, 6)
        expected = ndcg(semantic_id_ranks(leaves, targets), 6).mean()
        assert mean_ndcg(candidates, targets, weights, 6) == pytest.approx(expected)


@pytest.mark.parametrize("models", [2, 3, 4])
def test_the_weight_goes_to_the_model_that_knows(models: int) -> None:
    candidates = some_candidates(3, models=models)
    for knows in range(models):
        best = np.take_along_axis(candidates.leaves, candidates.of[knows].argmax(axis=1)[:, None], axis=1)
        weights, means = best_weights(candidates, best[:, 0], depth=3)
        assert [*weights, 1 - sum(weights)][knows] >= 0.8
        assert mean_ndcg(candidates, best[:, 0], weights, 3) == max(means)
    unknown = best_weights(candidates, np.full(40, 29_000), depth=3)[0]
    assert unknown == pytest.approx((1 / models,) * (models - 1), abs=0.03)  # nothing is known: even


def test_one_partner_has_the_best_weight_of_the_grid() -> None:
    candidates = some_candidates(4)
    targets = candidates.leaves[:, 3]
    ((weight,), means) = best_weights(candidates, targets, depth=5)
    every = [mean_ndcg(candidates, targets, (weight,), 5) for weight in WEIGHTS]
    assert means == every
    assert every[WEIGHTS.index(weight)] == max(every)


def test_at_its_ends_the_hybrid_is_either_model(make_model) -> None:
    """With the whole catalogue as candidates, nothing is lost on the way."""
    model = make_model(items=ITEMS, sizes=(4, 4, 4))
    ids, cases = model.semantic_ids, some_cases(9)
    towers = BaselineAnswers(fixed(), ids.trie)
    hybrid = Hybrid([towers], model, candidates=ids.trie.leaves, weights=(1.0,))
    alone = towers.answer(cases, 6, lambda done: None)
    found = hybrid.answer(cases, 6, lambda done: None)
    np.testing.assert_array_equal(found.leaves, alone.leaves)
    np.testing.assert_allclose(found.target_log_probability, alone.target_log_probability)

    found = Hybrid([towers], model, ids.trie.leaves, (0.0,)).answer(cases, 6, lambda done: None)
    beams = search(model, cases.histories, beams=ids.trie.leaves)
    np.testing.assert_array_equal(found.leaves, beams.leaves[:, :6])
    np.testing.assert_allclose(found.scores, beams.scores[:, :6], atol=1e-5)
    np.testing.assert_allclose(
        found.target_log_probability, target_log_probabilities(model, cases), atol=1e-5
    )


def test_candidates_of_every_model_are_scored_by_all(make_model) -> None:
    model = make_model(items=ITEMS, sizes=(4, 4, 4))
    trie, cases = model.semantic_ids.trie, some_cases(9)
    partners = [BaselineAnswers(fixed(scale=scale), trie) for scale in (2.0, -1.0)]
    found, of_targets = Hybrid(partners, model, 4, (0.3, 0.3))._propose(cases, lambda done: None)
    everything = search(model, cases.histories, beams=trie.leaves)
    every = [partner.log_probabilities(cases) for partner in partners]
    for row in range(len(cases)):
        wide = dict(zip(everything.leaves[row].tolist(), everything.scores[row].tolist(), strict=True))
        target = trie.leaf_of[cases.targets[row]]
        np.testing.assert_allclose(
            of_targets[:, row], [*(of[row, target] for of in every), wide[target]], 1e-4
        )
        for leaf, *scores in zip(found.leaves[row].tolist(), *found.of[:, row].tolist(), strict=True):
            if leaf >= 0:
                np.testing.assert_allclose(scores, [*(of[row, leaf] for of in every), wide[leaf]], 1e-4)
        best = {leaf for of in every for leaf in np.argsort(-of[row])[:4].tolist()}
        assert best <= set(found.leaves[row].tolist())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"partners": []}, "partners"),
        ({"partners": ["ease", "ease"]}, "named twice"),
        ({"partners": ["hybrid"]}, "cannot be a partner of a hybrid"),
        ({"partners": ["easy"]}, "easy"),
        ({"partners": ["ease"], "two_tower": {"width": 8}}, "remove `two_tower`"),
        ({"partners": ["ease", "popularity"], "weight": 0.5}, "1 weights for 2 partners"),
        ({"weight": [0.5, 0.6], "partners": ["ease", "popularity"]}, "their sum at most 1"),
        ({"weight": -0.1}, "at least 0"),
    ],
)
def test_impossible_hybrids_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config({"data": {"format": "simulate"}, "baselines": [{"name": "hybrid", **options}]})


def test_a_hybrid_is_called_by_its_partners() -> None:
    def label(**options: Any) -> str:
        return baseline_label(read_baseline({"name": "hybrid", **options}))

    assert label() == label(partners="two-tower") == "hybrid"
    assert label(two_tower={"width": 8}) == label(partners=[{"name": "two-tower", "width": 8}])
    assert label(two_tower={"width": 8}) == "hybrid two_tower.width=8"  # as it always was
    mixed = [{"name": "popularity", "last": 1}, "ease"]
    assert label(partners=mixed, weight=[0.2, 0.3]) == "hybrid weight=0.2+0.3 partners=popularity last=1+ease"


def test_options_of_a_hybrid_survive_being_written() -> None:
    for options in ({}, {"partners": ["ease", "sasrec"]}, {"two_tower": {"width": 8}}, {"weight": 0.25}):
        config = read_baseline({"name": "hybrid", **options})
        assert read_baseline(config.model_dump(mode="json")) == config
