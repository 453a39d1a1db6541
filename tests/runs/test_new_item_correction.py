"""The correction of the probability of new items after a stage (``head.arrivals``)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import sparse

from peso.config import AdapterConfig, BackboneConfig, HeadConfig, PromptConfig, load_config
from peso.decoding.pool import Evidence, leaf_log_probabilities, pool
from peso.decoding.prompt import Prompt, run_prompts
from peso.events.histories import Cases
from peso.items.semantic_ids import SemanticIds
from peso.model.build import build_model
from peso.model.generative import GenerativeModel
from peso.model.transitions import Transitions
from peso.runs import pipeline
from peso.runs.pool_weights import _probabilities, correct_arrivals
from peso.runs.workspace import Workspace

pytestmark = pytest.mark.slow

ITEMS, NEW = 30, 6  # the last six are new; the very last has no event


def model_of(arrivals: bool = True) -> GenerativeModel:
    codes = np.stack([np.arange(ITEMS) % 5, np.arange(ITEMS) // 5], axis=1).astype(np.int32)
    made = build_model(
        BackboneConfig(name="tiny", layers=1),
        PromptConfig(window=6),
        AdapterConfig(rank=2),
        "semantic",
        SemanticIds([f"i{n}" for n in range(ITEMS)], codes, (5, 6)),
        seed=0,
        head=HeadConfig(name="items", arrivals=arrivals),
    ).eval()
    head = made.vocabulary.item_head
    with torch.no_grad():
        head.rows.normal_(std=0.03, generator=torch.Generator().manual_seed(1))
    head.compete(ITEMS - 1 - np.arange(ITEMS))
    return made


def cases_with(new: float, count: int) -> Cases:
    """Cases of which this share have a new item as their target."""
    random = np.random.default_rng(2)
    histories = [random.integers(0, ITEMS, random.integers(0, 6)).astype(np.int32) for _ in range(count)]
    targets = np.where(np.arange(count) < new * count, ITEMS - NEW, 3).astype(np.int32)
    return Cases([f"u{n}" for n in range(count)], histories, targets)


def first_now() -> np.ndarray:
    return np.arange(ITEMS) >= ITEMS - NEW


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_new_items_together_get_the_probability_of_their_share(share: float) -> None:
    model, cases = model_of(), cases_with(share, 400)
    told = correct_arrivals(model, cases, first_now())
    assert told["items"] == NEW - 1
    assert told["share"] == pytest.approx(share)
    met = torch.from_numpy(first_now()) & (model.vocabulary.item_head.counts > 0)
    now, _ = _probabilities(model, cases, met, 64)
    assert now.mean() == pytest.approx(share, abs=0.02)
    assert correct_arrivals(model, cases, first_now()) == pytest.approx(told)  # not added twice
    bias = model.vocabulary.item_head.arrival_bias
    assert bias[ITEMS - NEW : -1].eq(bias[ITEMS - NEW]).all()
    assert not bias[: ITEMS - NEW].any()
    assert not bias[-1]  # training has not met this item


def counted() -> Transitions:
    random = np.random.default_rng(3)
    edges = sparse.csr_array(random.random((ITEMS, ITEMS)) * (random.random((ITEMS, ITEMS)) < 0.3) * 40)
    return Transitions(edges.astype(np.float32), recency=0.6, window=4, repeats=True)


def likelihood(model: GenerativeModel, cases: Cases) -> float:
    """The log-likelihood of the targets under head and counts together, as an answer computes it."""
    head, total = model.vocabulary.item_head, 0.0
    trie = model.semantic_ids.trie
    for history, target in zip(cases.histories, cases.targets, strict=True):
        last = run_prompts(model, [Prompt.cold(model, history)], 0).last
        of_leaves = leaf_log_probabilities(model, last)
        evidence = Evidence.of(model.transitions, trie, [history], torch.device("cpu"))
        found = pool(of_leaves, torch.full_like(of_leaves, -torch.inf), torch.ones(1), evidence)
        assert found.exp().sum().item() == pytest.approx(1.0, abs=1e-4)
        total += found[0, trie.leaf_of[target]].item()
    assert head.arrivals
    return total


@torch.no_grad()
@pytest.mark.parametrize("share", [0.05, 0.5])
def test_head_and_counts_are_corrected_together_for_the_highest_likelihood(share: float) -> None:
    model, cases = model_of(), cases_with(share, 120)
    model.transitions = before = counted()
    told = correct_arrivals(model, cases, first_now())
    found, bias = told["addition"], model.vocabulary.item_head.arrival_bias.clone()
    # the last item has no event, so it is not corrected
    factors = np.exp(found * (first_now() & (np.arange(ITEMS) < ITEMS - 1)))
    np.testing.assert_allclose(
        model.transitions.edges.toarray(), before.edges.toarray() * factors, rtol=1e-5, atol=1e-6
    )
    best = likelihood(model, cases) - found**2 / 2
    for other in (found - 0.3, found + 0.3, 0.0):
        model.vocabulary.item_head.arrival_bias.copy_(bias * (other / found))
        model.transitions = before.with_factors(factors ** (other / found))
        assert likelihood(model, cases) - other**2 / 2 < best


def test_few_cases_correct_little_and_without_new_items_nothing_changes() -> None:
    few, many = (correct_arrivals(model_of(), cases_with(1.0, n), first_now())["addition"] for n in (1, 400))
    assert 0 < few < 1 < many
    model = model_of()
    assert correct_arrivals(model, cases_with(0.5, 40), np.zeros(ITEMS, bool)) == {"items": 0}
    assert not model.vocabulary.item_head.arrival_bias.any()


def test_each_stage_corrects_its_own_new_items_and_answers_with_it(tmp_path: Path) -> None:
    tree = {
        "data": {"simulate": {"users": 60, "items": 40, "stages": 3}},
        "items": {"quantizer": "rq-kmeans", "levels": 2, "codes": 8},
        "backbone": {"name": "tiny", "layers": 1},
        "head": {"name": "items", "arrivals": True},
        "strategy": "single",
        "training": {"epochs": 1, "max_steps": 3},
        "evaluation": {"enabled": False},
        "baselines": [],
    }
    workspace = Workspace.create_or_open(tmp_path / "w", load_config(tree))
    with workspace.lock():
        pipeline.run(workspace)
    first = workspace.stream.first_stages()
    for number in (0, 1, 2):
        directory = workspace.root / "stages" / str(number)
        bias = load_file(directory / "vocabulary.safetensors")["item_head.arrival_bias"]
        told = json.loads((directory / "metrics.json").read_text())["training"]["item_head"]
        corrected = np.flatnonzero(bias.numpy())
        if not number:
            assert not len(corrected)
            assert "arrivals" not in told
            continue
        assert len(corrected) == told["arrivals"]["items"] > 0
        assert (first[corrected] == number).all()
        assert bias[corrected[0]] == pytest.approx(told["arrivals"]["addition"])
        head = workspace.stage(number).model().vocabulary.item_head
        torch.testing.assert_close(head.biases() - bias, head.bias + head.code_bias[head.tokens].sum(-1))
