"""The baselines of the training benchmark compute what we compute: same loss, same first step of learning."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from plain_path import cases_of, random_sequences

from peso.adapters.lora import add_adapter
from peso.events.histories import TargetSequence
from peso.model.generative import GenerativeModel
from peso.training.likelihood import validation_loss

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from usual_training import TARGETS, Example, ExpertWay, UsualWay

SEQUENCES = [
    TargetSequence(s.user, s.items, len(s.items) - 1) for s in random_sequences(0, count=19, longest=9)
]


def examples_of(model: GenerativeModel) -> list[Example]:
    result = []
    for sequence in SEQUENCES:
        history = model.item_token_ids(sequence.items[:-1]).reshape(-1, model.vocabulary.levels)
        answer = np.concatenate([model.item_token_ids(sequence.items[-1]), model.layout.end])
        result.append((model.layout.prompt(history), answer.astype(np.int64)))
    return result


@pytest.mark.slow
@pytest.mark.parametrize("way", [UsualWay, ExpertWay])
@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_of_a_baseline_is_ours_before_and_after_a_step(
    make_model: Callable[..., GenerativeModel], way: type[UsualWay], tied: bool
) -> None:
    ours = make_model("instruct", "full", tied=tied)
    before = validation_loss(ours, cases_of(SEQUENCES, 20), 0.8)
    theirs = way(make_model("instruct", "full", tied=tied), dropout=0.0, learning_rate=1e-3, steps=10)
    examples = examples_of(ours)
    assert theirs.loss(examples) == pytest.approx(before, abs=1e-5)
    assert theirs.step(examples) == pytest.approx(before, abs=1e-5)
    theirs.step(examples)  # the first step of a warm-up has rate 0
    assert theirs.loss(examples) < before - 1e-3


def test_the_expert_trains_what_we_train(make_model: Callable[..., GenerativeModel]) -> None:
    ours, theirs = make_model("instruct"), ExpertWay(make_model("instruct"), 0.0, 1e-3, 10)
    ours.backbone = add_adapter(ours.backbone, 8, 16, 0.0, TARGETS, seed=0)
    count = sum(p.numel() for p in ours.parameters() if p.requires_grad)
    assert sum(p.numel() for p in theirs.trained) == count
    assert all(p.dtype == torch.float32 for p in theirs.trained)
