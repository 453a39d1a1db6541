"""Log-probabilities of targets: summed over levels, and renormalised over what exists."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from plain_path import cases_of, random_sequences, separate_loss, token_losses, with_adapter

from peso.events.histories import Cases, TargetSequence
from peso.model.generative import GenerativeModel
from peso.training.likelihood import (
    target_level_log_probabilities,
    target_log_probabilities,
    trie_log_likelihood,
    validation_loss,
)

LAYOUTS = ["stream", "instruct"]
VOCABULARIES = ["full", "semantic", "level"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss_vocabulary", VOCABULARIES)
def test_log_probability_of_a_target_is_the_sum_over_its_levels(
    make_model: Callable[..., GenerativeModel], layout: str, loss_vocabulary: str
) -> None:
    model = with_adapter(make_model(layout, loss_vocabulary, window=6)).eval()
    cases = cases_of(random_sequences(1, 12, 9), window=6)  # histories of 0 to 6 items, in no order
    done: list[int] = []
    found = target_log_probabilities(model, cases, batch_tokens=64, on_progress=done.append)
    by_level = target_level_log_probabilities(model, cases, batch_tokens=64)
    with torch.no_grad():
        expected = torch.stack(
            [
                -token_losses(model, history, target)[: model.vocabulary.levels]
                for history, target in zip(cases.histories, cases.targets, strict=True)
            ]
        ).numpy()
    assert found.dtype == by_level.dtype == np.float32
    np.testing.assert_allclose(by_level, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found, by_level.sum(axis=1))
    assert done == sorted(done)
    assert done[-1] == len(cases)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss_vocabulary", VOCABULARIES)
def test_validation_loss_is_the_training_loss(
    make_model: Callable[..., GenerativeModel], layout: str, loss_vocabulary: str
) -> None:
    model = make_model(layout, loss_vocabulary, window=6)
    sequences = [TargetSequence(s.user, s.items, len(s.items) - 1) for s in random_sequences(2, 10, 7)]
    with torch.no_grad():
        expected = float(separate_loss(model, sequences, temperature=0.8))
    assert validation_loss(model, cases_of(sequences, 6), 0.8) == pytest.approx(expected, abs=1e-5)


def catalogue_probability(model: GenerativeModel, history: np.ndarray, target: int) -> float:
    """By hand: at each level the softmax over the codes of the items that share the target's path so far."""
    layout, vocabulary, codes = model.layout, model.vocabulary, model.semantic_ids.codes
    prompt = layout.prompt(model.item_token_ids(history[-layout.window :]).reshape(-1, vocabulary.levels))
    ids = torch.from_numpy(np.concatenate([prompt, model.item_token_ids(target)]))
    hidden = model.causal_lm.model(inputs_embeds=model.embed(ids).unsqueeze(0))[0][0]
    total = 0.0
    for level in range(vocabulary.levels):
        logits = model.semantic_logits(hidden[len(prompt) + level - 1], level)
        same_path = (codes[:, :level] == codes[target, :level]).all(axis=1)
        possible = np.unique(codes[same_path, level])
        scores = logits[torch.from_numpy(possible)].log_softmax(0)
        total += float(scores[np.flatnonzero(possible == codes[target, level])[0]])
    return total


@pytest.mark.parametrize("layout", LAYOUTS)
def test_renormalised_over_existing_items(make_model: Callable[..., GenerativeModel], layout: str) -> None:
    model = with_adapter(make_model(layout, "full", items=60, sizes=(3, 4, 5), window=6)).eval()
    cases = cases_of(random_sequences(4, 12, 8), window=6)
    with torch.no_grad():
        expected = [
            catalogue_probability(model, h, t) for h, t in zip(cases.histories, cases.targets, strict=True)
        ]
    found = trie_log_likelihood(model, cases, batch_tokens=100)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert (found >= target_log_probabilities(model, cases) - 1e-5).all()  # fewer compete


def test_the_catalogue_has_probability_one(make_model: Callable[..., GenerativeModel]) -> None:
    model = make_model("stream", "semantic", items=40, sizes=(3, 3, 3))
    distinct = np.unique(model.semantic_ids.codes, axis=0, return_index=True)[1]
    history = np.array([3, 1, 4], dtype=np.int32)
    cases = Cases(["u"] * len(distinct), [history] * len(distinct), distinct.astype(np.int32))
    assert np.exp(trie_log_likelihood(model, cases)).sum() == pytest.approx(1, abs=1e-5)


def test_what_a_model_gives_to_tokens_that_cannot_follow_does_not_count(
    make_model: Callable[..., GenerativeModel],
) -> None:
    """The same weights compare as equal whatever they were normalised over in training."""
    models = [make_model("stream", vocabulary) for vocabulary in VOCABULARIES]
    cases = cases_of(random_sequences(5, 8, 6), window=20)
    one, two, three = (trie_log_likelihood(model, cases) for model in models)
    np.testing.assert_allclose(one, two, atol=1e-6)
    np.testing.assert_allclose(one, three, atol=1e-6)
    one, two, three = (target_log_probabilities(model, cases) for model in models)
    assert (one < two).all()
    assert (two < three).all()
