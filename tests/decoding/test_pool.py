"""Answers of a model with an item head: the pool of what it generates and what the head finds best."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import sparse

from peso.config import AdapterConfig, BackboneConfig, HeadConfig, PromptConfig
from peso.decoding import beam, beam_search, search
from peso.decoding.pool import PRIORS, Candidates, Evidence, best_weights, near_best
from peso.events.histories import Cases
from peso.items.semantic_ids import SemanticIds
from peso.model.build import build_model
from peso.model.generative import GenerativeModel
from peso.model.inference import for_inference
from peso.model.transitions import Transitions
from peso.training.likelihood import target_log_probabilities

ITEMS, SIZES = 30, (4, 5)


@pytest.fixture(
    scope="module",
    params=[
        ("stream", True, False),
        ("instruct", True, True),
        ("stream", False, False),
        ("stream", True, True),
    ],
    ids=str,
)
def model(request: pytest.FixtureRequest) -> GenerativeModel:
    """30 items on 20 semantic IDs, of which 10 are shared by two; without or with counts of transitions."""
    codes = np.stack([np.arange(ITEMS) % 20 % SIZES[0], np.arange(ITEMS) % 20 // SIZES[0]], axis=1)
    made = build_model(
        BackboneConfig(name="tiny", layers=2),
        PromptConfig(layout=request.param[0], window=6),
        AdapterConfig(rank=2),
        "semantic",
        SemanticIds([f"i{n}" for n in range(ITEMS)], codes.astype(np.int32), SIZES),
        seed=3,
        head=HeadConfig(name="items", reads=request.param[1]),
    ).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in made.vocabulary.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.4)
        made.vocabulary.item_head.shares.copy_(torch.tensor([0.2, 0.4, 0.6, 0.8]))
    if request.param[2]:
        table = np.random.default_rng(5).random((ITEMS, ITEMS))
        table[table < 0.7] = 0
        made.transitions = Transitions(sparse.csr_array(table), 0.6, window=6, repeats=False, prior=8.0)
    return made


HISTORIES = [np.array(h, dtype=np.int64) for h in ([], [3], [7, 20, 7], [1, 2, 3, 4, 5, 6, 8, 9], [29, 12])]


def brute_force(model: GenerativeModel, history: np.ndarray) -> np.ndarray:
    """float64 (leaves,): the probability of every semantic ID, each scored by itself."""
    ids = model.semantic_ids
    first = ids.trie.items[ids.trie.item_starts[:-1]]
    window = history[-model.layout.window :]
    cases = Cases(["u"] * len(first), [window] * len(first), first.astype(np.int32))
    codes = np.exp(target_log_probabilities(model, cases).astype(np.float64))
    tokens = torch.from_numpy(model.layout.prompt(model.item_token_ids(window.astype(np.int64))))[None]
    positions = torch.arange(tokens.shape[1])[None]
    with torch.no_grad():
        state = model.hidden(tokens, None, positions)[:, -1]
        of_items = model.item_log_probabilities(state)[0].exp().double().numpy()
    items = np.bincount(ids.trie.leaf_of, weights=of_items)
    share = float(model.item_share(torch.tensor([len(window)])))
    mixture = share * items + (1 - share) * codes
    if model.transitions is None:
        return mixture
    counts = np.bincount(ids.trie.leaf_of, weights=model.transitions.evidence([history])[0])
    prior = model.transitions.prior
    return (counts + prior * mixture) / (counts.sum() + prior)


def test_the_best_of_the_pool_are_those_of_the_whole_catalogue(model: GenerativeModel) -> None:
    exclude = [np.array(rows, dtype=np.int64) for rows in ([], [3, 23], [7, 20, 0], [1], [29, 9, 12])]
    targets = np.array([4, 11, 3, 29, 12])
    found = search(model, HISTORIES, beams=20, exclude=exclude, targets=targets, batch_size=3)
    for user, history in enumerate(HISTORIES):
        expected = brute_force(model, history)
        trie = model.semantic_ids.trie
        target = expected[trie.leaf_of[targets[user]]]
        np.testing.assert_allclose(found.target_scores[user], np.log(target), atol=1e-4)
        open_leaves = [leaf for leaf in range(20) if set(trie.items_of(leaf)) - set(exclude[user])]
        best = sorted(open_leaves, key=lambda leaf: -expected[leaf])
        there = found.leaves[user][found.leaves[user] >= 0]
        assert there.tolist() == best
        np.testing.assert_allclose(found.scores[user][: len(best)], np.log(expected[best]), atol=1e-4)


def test_fewer_beams_give_the_best_of_what_both_propose(model: GenerativeModel) -> None:
    every = search(model, HISTORIES, beams=20)
    few = search(model, HISTORIES, beams=4)
    for user in range(len(HISTORIES)):
        scores = dict(zip(every.leaves[user], every.scores[user], strict=True))
        np.testing.assert_allclose([scores[leaf] for leaf in few.leaves[user]], few.scores[user], atol=1e-4)
        assert len(set(few.leaves[user])) == 4
        assert few.leaves[user][0] == every.leaves[user][0]


def test_a_share_of_zero_is_the_search_of_codes_alone(model: GenerativeModel) -> None:
    head, transitions = model.vocabulary.item_head, model.transitions
    shares, reads = head.shares.clone(), head.reads
    try:
        model.transitions = None
        head.reads = False  # what is read of the head stays when its share is zero
        head.shares.zero_()
        pooled = search(model, HISTORIES, beams=6, targets=np.arange(5))
        model.vocabulary.item_head = None
        alone = search(model, HISTORIES, beams=6, targets=np.arange(5))
    finally:
        model.vocabulary.item_head, model.transitions = head, transitions
        head.reads = reads
        head.shares.copy_(shares)
    assert (pooled.leaves == alone.leaves).all()
    np.testing.assert_allclose(pooled.scores, alone.scores, atol=1e-5)
    np.testing.assert_allclose(pooled.target_scores, alone.target_scores, atol=1e-5)
    np.testing.assert_allclose(alone.target_scores, alone.targets.sum(-1), atol=1e-6)


def test_filters_and_k_hold_for_the_pool(model: GenerativeModel) -> None:
    histories = [[f"i{row}" for row in history] for history in HISTORIES]
    allow = [f"i{n}" for n in range(0, 30, 3)]
    for answer, history in zip(
        beam_search(model, histories, k=5, exclude_seen=True, allow=allow), histories, strict=True
    ):
        items = [item for item, _ in answer]
        assert len(items) == len(set(items)) == 5
        assert set(items) <= set(allow) - set(history)
        scores = [score for _, score in answer]
        assert scores == sorted(scores, reverse=True)
    own = beam_search(model, histories, k=3, allow=[["i1", "i2", "i3", "i4"]] * 5, deny=["i2"])
    assert all({item for item, _ in answer} == {"i1", "i3", "i4"} for answer in own)


def only(candidates: Candidates, leaves: torch.Tensor) -> Candidates:
    """One leaf of each user as the only candidate, where leaf n is candidate n."""
    places, evidence = leaves[:, None], candidates.evidence
    return Candidates(
        places,
        candidates.codes.gather(1, places),
        candidates.items.gather(1, places),
        None if evidence is None else evidence.at(places),
    )


def test_the_shares_are_those_that_rank_the_targets_best() -> None:
    users = 600
    generator = torch.Generator().manual_seed(0)
    leaves = torch.arange(10).expand(users, -1)
    noise = 6 * torch.randn(2, users, 10, generator=generator)
    targets = torch.randint(10, (users,), generator=generator)
    lengths = torch.tensor([1, 20]).repeat(users // 2)
    hint = 6.0 * (leaves == targets[:, None])
    long = (lengths == 20)[:, None]
    # the head knows the target of long histories, the codes that of short ones
    items = (noise[0] + hint * long).log_softmax(-1)
    codes = (noise[1] + hint * ~long).log_softmax(-1)
    every = Candidates(leaves, codes, items)
    chosen = best_weights(every, only(every, targets), lengths, depth=5)
    assert chosen.shares[0] < 0.5 < chosen.shares[3]
    assert chosen.prior is None
    assert len(chosen.means) == 21
    assert max(chosen.means) < 1
    part = Candidates(leaves[:90], codes[:90], items[:90])
    few = best_weights(part, only(part, targets[:90]), lengths[:90], depth=5)
    assert len(set(few.shares)) == 1  # too few cases for shares of their own


@pytest.mark.parametrize("size", [1, 2, 4])
def test_weights_are_chosen_for_a_catalog_smaller_than_the_depth(size: int) -> None:
    users = 40
    leaves = torch.arange(size).expand(users, -1)
    same = torch.full((users, size), -math.log(size))
    every, targets = Candidates(leaves, same, same), torch.arange(users) % size
    chosen = best_weights(every, only(every, targets), torch.ones(users, dtype=torch.long), depth=10)
    ranks = 1 + np.arange(users) % size
    assert chosen.means == pytest.approx([(1 / np.log2(ranks + 1)).mean()] * len(chosen.means))


@pytest.mark.parametrize("truthful", ["counts", "model"])
def test_the_prior_is_the_one_that_ranks_the_targets_best(truthful: str) -> None:
    users, generator = 400, torch.Generator().manual_seed(1)
    leaves = torch.arange(10).expand(users, -1)
    targets = torch.randint(10, (users,), generator=generator)
    hint = 4.0 * (leaves == targets[:, None])
    noise = torch.randn(2, users, 10, generator=generator)
    log_p = (noise[0] + hint * (truthful == "model")).log_softmax(-1)
    counts = 20 * (noise[1] + hint * (truthful == "counts")).softmax(-1)
    candidates = Candidates(leaves, log_p, log_p, Evidence(counts, counts.sum(1, keepdim=True), 100.0))
    chosen = best_weights(candidates, only(candidates, targets), torch.full((users,), 3), depth=5)
    assert chosen.prior in PRIORS
    assert chosen.prior < 100 if truthful == "counts" else chosen.prior > 100


def test_values_within_a_standard_error_of_the_best_are_near_it() -> None:
    noise = 0.1 * torch.randn(1000, generator=torch.Generator().manual_seed(2))
    level = torch.stack([0.5 + noise.roll(n) for n in range(4)])  # equal but for chance
    level[3] += 1e-4
    assert near_best(level)[0] == 3
    assert sorted(near_best(level)) == [0, 1, 2, 3]
    clear = torch.stack([0.5 + noise + 0.02 * (n == 2) for n in range(4)])  # every case is better
    assert near_best(clear) == [2]
    assert near_best(torch.zeros(3, 10)) == [0, 1, 2]


def test_where_ndcg_cannot_tell_shares_apart_likelihood_does() -> None:
    users, generator = 400, torch.Generator().manual_seed(3)
    leaves = torch.arange(10).expand(users, -1)
    targets = torch.randint(10, (users,), generator=generator)
    ranked = 3.0 * (leaves == targets[:, None]) + torch.rand(users, 10, generator=generator)
    items = ranked.log_softmax(-1)  # both rank every target first; the codes give all of them almost nothing
    every = Candidates(leaves, items - 30, items)
    chosen = best_weights(every, only(every, targets), torch.full((users,), 3), depth=5)
    assert chosen.shares == [1.0] * 4


def test_a_large_catalog_is_searched_in_smaller_batches(
    model: GenerativeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, sizes = search(model, HISTORIES, beams=6), list[int]()
    monkeypatch.setattr(beam, "SCORES_AT_ONCE", {"cpu": 2 * ITEMS + 1})
    found = search(model, HISTORIES, beams=6, on_candidates=lambda users, *_: sizes.append(len(users)))
    assert sizes == [2, 2, 1]
    np.testing.assert_array_equal(found.leaves, whole.leaves)
    np.testing.assert_allclose(found.scores, whole.scores, atol=1e-5)


def test_candidates_of_batches_are_joined_in_order() -> None:
    parts = [
        Candidates(
            torch.tensor([[n]]),
            torch.tensor([[-1.0]]),
            torch.tensor([[-2.0]]),
            Evidence(torch.tensor([[float(n)]]), torch.tensor([[float(n + 1)]]), 30.0),
        )
        for n in (0, 1)
    ]
    joined = Candidates.joined(parts)
    assert joined.leaves.tolist() == [[0], [1]]
    assert joined.evidence is not None
    assert joined.evidence.totals.tolist() == [[1.0], [2.0]]
    assert joined.evidence.prior == 30.0


def test_a_copy_for_inference_answers_alike(model: GenerativeModel) -> None:
    targets = np.arange(5)
    ours, copies = (
        search(each, HISTORIES, beams=8, targets=targets) for each in (model, for_inference(model))
    )
    assert (ours.leaves == copies.leaves).all()
    np.testing.assert_allclose(ours.scores, copies.scores, atol=1e-4)
    np.testing.assert_allclose(ours.target_scores, copies.target_scores, atol=1e-4)
