"""What only a GPU can show. Skipped where there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from packed_losses import gradients, packed_batch, packed_loss
from plain_path import cases_of, random_sequences, with_adapter

from peso.config import TrainingConfig
from peso.decoding import search
from peso.model.generative import GenerativeModel
from peso.training.acceleration import compiled, gradient_checkpointing
from peso.training.likelihood import target_log_probabilities
from peso.training.loop import train_stage
from peso.training.strategies.peso import Peso
from peso.training.task import StageTask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


def on_gpu(model: GenerativeModel) -> GenerativeModel:
    return with_adapter(model).to("cuda")


def learn(model: GenerativeModel, directory: Path, **settings) -> list[float]:
    directory.mkdir()
    result = train_stage(
        model,
        StageTask(
            random_sequences(seed=3, count=40, longest=30),
            cases_of(random_sequences(seed=4, count=20, longest=30), 20),
            TrainingConfig(device="cuda", epochs=2, max_steps=8, batch_size=64, **settings),
            stage=1,
            learning_rate=1e-3,
            strategy=Peso(proximal="softmax_kl", strength=1.0, coupling="decoupled"),
            seed=0,
            directory=directory / "training",
            log=directory / "log.jsonl",
        ),
    )
    return result.training_losses + result.validation_losses


@pytest.mark.parametrize("again", [False, True])
def test_compiled_layers_learn_the_same(make_model: Callable[..., GenerativeModel], again: bool) -> None:
    """Float32 without reduced products: what differs is the order of sums."""
    model = on_gpu(make_model("instruct", width=64, layers=3))
    expected, found = [], []
    for rows in (300, 900, 500):  # several shapes, one after the other
        packed = packed_batch(model, random_sequences(seed=rows, count=12, longest=25), rows, 3000)[0]
        packed = packed.to(model.device)
        expected.append(gradients(model, packed_loss(model, [packed])))
        with compiled(model, True), gradient_checkpointing(model, again):
            found.append(gradients(model, packed_loss(model, [packed])))
    for one, other in zip(found, expected, strict=True):
        for name, gradient in other.items():
            assert (one[name] - gradient).norm() <= 1e-3 * gradient.norm(), name


@pytest.mark.parametrize("settings", [{}, {"precision": "float32"}, {"compile": True}], ids=str)
def test_a_seed_fixes_what_is_learnt(
    make_model: Callable[..., GenerativeModel], tmp_path: Path, settings: dict
) -> None:
    runs = []
    for name in ("one", "other"):
        model = on_gpu(make_model("instruct", width=64))
        losses = learn(model, tmp_path / name, **settings)
        runs.append((losses, {n: p.detach().cpu() for n, p in model.named_parameters() if p.requires_grad}))
    assert runs[0][0] == runs[1][0]
    for name, values in runs[0][1].items():
        assert torch.equal(values, runs[1][1][name]), name


def test_losses_and_answers_are_those_of_a_cpu(
    make_model: Callable[..., GenerativeModel], tmp_path: Path
) -> None:
    cases = cases_of(random_sequences(seed=5, count=30, longest=25), 20)
    here, there = make_model("instruct").eval(), make_model("instruct").eval().to("cuda")
    one, other = (target_log_probabilities(model, cases) for model in (here, there))
    np.testing.assert_allclose(one, other, atol=1e-3)
    ours, theirs = (search(model, cases.histories, beams=10) for model in (here, there))
    np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-3)
    assert (ours.leaves == theirs.leaves).mean() > 0.99
