"""LSAT: two trainings, fused exactly as stated, and an ensemble that is one model to search and scoring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from plain_path import with_adapter
from strategy_runs import SCALE, Runs, changes_at, factors, rows, state
from torch import Tensor

from peso import decoding
from peso.adapters.lora import adapter_parameters
from peso.errors import ExportError
from peso.events.histories import Cases
from peso.model.ensemble import Ensemble, twin
from peso.model.export import export_merged, export_peft
from peso.model.generative import GenerativeModel, LogitTransform
from peso.runs.recommender import Recommender
from peso.training.likelihood import target_log_probabilities, trie_log_likelihood

pytestmark = pytest.mark.slow

HISTORIES = [[3, 17, 4], [], [20, 2, 2, 9, 11]]


def lsat(fusion: str, share: float = 0.3) -> dict[str, Any]:
    return {"name": "lsat", "fusion": fusion, "long_share": share}


def pair(model: GenerativeModel, transform: LogitTransform | None = None) -> tuple[Any, Any]:
    """Two models on one backbone that agree on little."""
    first = with_adapter(model).eval()
    if transform is not None:
        first.logit_transform = transform
    second = twin(first)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in [*adapter_parameters(second.backbone).values(), *second.vocabulary.parameters()]:
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return first, second


@torch.no_grad()
def logits_after(model: GenerativeModel, ids: np.ndarray) -> Tensor:
    """(ids, tokens): the plain causal pass of one model over one sequence, words before codes."""
    lm, vocabulary = model.causal_lm, model.vocabulary
    words = vocabulary.first_id
    table = torch.cat([lm.get_input_embeddings().weight[:words], vocabulary.input_rows])
    head = torch.cat([lm.get_output_embeddings().weight[:words], vocabulary.output_rows])
    hidden = lm.model(inputs_embeds=table[torch.from_numpy(ids)][None])[0][0]
    logits = model.logit_transform.scale * hidden @ head.T
    cap = model.logit_transform.cap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def brute_force(first: GenerativeModel, second: GenerativeModel, share: float, history: list[int]) -> Tensor:
    """(items,) log-probability of every item: at each token p ∝ p_1^w · p_2^(1-w), normalised anew."""
    vocabulary, sizes = first.vocabulary, np.array(first.vocabulary.sizes)
    starts = vocabulary.first_id + np.cumsum(sizes) - sizes
    prompt = first.layout.prompt(first.item_token_ids(np.array(history, dtype=np.int64)))
    result = []
    for item in range(len(first.semantic_ids.item_ids)):
        tokens = first.item_token_ids(item)
        ids = np.concatenate([prompt, tokens]).astype(np.int64)
        one, two = (logits_after(model, ids) for model in (first, second))
        total = 0.0
        for level, token in enumerate(tokens):
            span = {
                "full": slice(0, None),
                "semantic": slice(vocabulary.first_id, None),
                "level": slice(starts[level], starts[level] + sizes[level]),
            }[first.loss_vocabulary]
            place = len(prompt) + level - 1
            p = one[place, span].softmax(0).double() ** share * two[place, span].softmax(0).double() ** (
                1 - share
            )
            total += float((p / p.sum()).log()[token - (span.start or 0)])
        result.append(total)
    return torch.tensor(result)


@pytest.mark.parametrize("layout", ["stream", "instruct"])
@pytest.mark.parametrize("loss_vocabulary", ["full", "semantic", "level"])
def test_search_and_scores_of_an_ensemble_are_those_of_the_product(
    make_model: Callable[..., GenerativeModel], layout: str, loss_vocabulary: str
) -> None:
    first, second = pair(make_model(layout, loss_vocabulary, items=24, layers=1))
    check_product(first, second)


@pytest.mark.parametrize("transform", [LogitTransform(0.5), LogitTransform(2.0, cap=1.5)])
def test_logits_that_are_scaled_or_capped_are_averaged_afterwards(
    make_model: Callable[..., GenerativeModel], transform: LogitTransform
) -> None:
    check_product(*pair(make_model("stream", "semantic", items=24, layers=1), transform))


def check_product(first: GenerativeModel, second: GenerativeModel) -> None:
    share = 0.3
    ensemble: Any = Ensemble(first, second, share)
    expected = [brute_force(first, second, share, history) for history in HISTORIES]
    spread = (brute_force(first, first, 1.0, HISTORIES[0]) - expected[0]).abs().max()
    assert spread > 0.05  # else the test would see no difference between the two
    ids = first.semantic_ids.item_ids
    for user, ranked in enumerate(
        decoding.beam_search(ensemble, [[ids[i] for i in h] for h in HISTORIES], k=24, beams=30)
    ):
        scores = dict(ranked)
        assert scores.keys() == set(ids)
        found = torch.tensor([scores[item] for item in ids])
        torch.testing.assert_close(found, expected[user].float(), atol=1e-4, rtol=0)
    targets = np.array([7, 22, 23], dtype=np.int32)
    cases = Cases(["a", "b", "c"], [np.array(h, dtype=np.int32) for h in HISTORIES], targets)
    found = target_log_probabilities(ensemble, cases)
    np.testing.assert_allclose(found, [e[t] for e, t in zip(expected, targets, strict=True)], atol=1e-4)


def test_an_ensemble_of_one_model_is_that_model(make_model: Callable[..., GenerativeModel]) -> None:
    first, second = pair(make_model("instruct", "full", layers=1))
    cases = Cases(["a"], [np.array([3, 17, 4], dtype=np.int32)], np.array([7], dtype=np.int32))
    for share, alone in ((1.0, first), (0.0, second)):
        ensemble: Any = Ensemble(first, second, share)
        for score in (target_log_probabilities, trie_log_likelihood):
            np.testing.assert_allclose(score(ensemble, cases), score(alone, cases), atol=1e-5)


def test_a_twin_shares_the_backbone_and_nothing_that_is_learnt(
    make_model: Callable[..., GenerativeModel],
) -> None:
    model = with_adapter(make_model())
    own = {id(p) for p in twin(model).parameters()} - {id(p) for p in model.parameters()}
    assert len(own) == sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_arithmetic_is_the_weighted_sum_of_what_both_learnt(runs: Runs, stage: int) -> None:
    """The trainings are those of fusion ``outputs``, which keeps both apart in its files."""
    apart, fused = runs(lsat("outputs")), runs(lsat("arithmetic"))
    kept = state(apart, stage)
    for module, change in changes_at(fused, stage).items():
        long = kept[f"lsat.past.{module}.up"] @ kept[f"lsat.past.{module}.down"]
        a, b = factors(apart, stage)[module]
        torch.testing.assert_close(change, SCALE * (0.3 * long + 0.7 * b @ a), atol=1e-6, rtol=1e-5)
    for name, values in rows(fused, stage).items():
        expected = 0.3 * kept[f"lsat.vocabulary.{name}"] + 0.7 * rows(apart, stage)[name]
        torch.testing.assert_close(values, expected, atol=1e-6, rtol=1e-5)
    assert not [name for name in state(fused, stage) if name.startswith("lsat.")]


def test_what_is_kept_does_not_grow(runs: Runs) -> None:
    for fusion in ("outputs", "arithmetic"):
        workspace = runs(lsat(fusion))
        shapes = [{n: t.shape for n, t in state(workspace, stage).items()} for stage in (1, 2, 3)]
        assert shapes[0] == shapes[1] == shapes[2]


def test_the_long_term_training_is_that_of_retrain(runs: Runs) -> None:
    """Same data, same beginning, same rate: the same bits."""
    kept, retrained = state(runs(lsat("outputs")), 2), runs("retrain")
    for module, (a, b) in factors(retrained, 2).items():
        assert torch.equal(kept[f"lsat.past.{module}.down"], a)
        assert torch.equal(kept[f"lsat.past.{module}.up"], b)
    for name, values in rows(retrained, 2).items():
        assert torch.equal(kept[f"lsat.vocabulary.{name}"], values)


def test_a_stage_answers_with_both(runs: Runs) -> None:
    recommender = Recommender.load(runs(lsat("outputs")).root)
    model: Any = recommender.model
    assert isinstance(model, Ensemble)
    item = model.semantic_ids.item_ids[0]
    ranked = recommender.recommend([item], k=5)
    assert len(ranked) == 5
    assert [score for _, score in ranked] == sorted((score for _, score in ranked), reverse=True)
    kept = state(runs(lsat("outputs")), 3)
    for name, values in model.members[0].vocabulary.named_parameters():
        assert torch.equal(values, kept[f"lsat.vocabulary.{name}"])


@pytest.mark.parametrize("export", [export_merged, export_peft])
def test_an_ensemble_is_no_single_model_to_export(runs: Runs, export: Any, tmp_path: Any) -> None:
    model = Recommender.load(runs(lsat("outputs")).root).model
    with pytest.raises(ExportError, match=r"two models.*fusion: arithmetic"):
        export(model, tmp_path / "exported")
    assert not list(tmp_path.iterdir())
