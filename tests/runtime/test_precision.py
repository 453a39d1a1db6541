"""Number formats of a run: what is trained stays in float32, and bfloat16 learns what float32 learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from plain_path import cases_of, random_sequences, with_adapter

from peso.config import TrainingConfig
from peso.errors import TrainingError
from peso.model.generative import GenerativeModel
from peso.runtime.device import Precision
from peso.training.loop import train_stage
from peso.training.strategies.strategy import Strategy
from peso.training.task import StageResult, StageTask

CPU = torch.device("cpu")


def test_words_of_the_configuration() -> None:
    assert Precision.of("float32", "cpu") == Precision(CPU, torch.float32, torch.float32)
    assert Precision.of("auto", "cpu") == Precision(CPU, torch.float32, torch.float32)
    assert Precision.of("bfloat16", "cpu") == Precision(CPU, torch.bfloat16, torch.bfloat16)
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert Precision.of("float32", "auto").device.type == expected


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "cpu:x", "hpu"])
def test_a_device_that_is_not_there_is_an_error_with_a_cure(name: str) -> None:
    with pytest.raises(TrainingError, match=rf"training\.device '{name}' cannot be used.*auto or cpu"):
        Precision.of("float32", name)


def train(model: GenerativeModel, directory: Path, precision: str) -> StageResult:
    sequences = random_sequences(0, count=12, longest=8)
    settings = {"epochs": 6, "batch_size": 8, "device": "cpu", "precision": precision}
    return train_stage(
        model,
        StageTask(
            sequences,
            cases_of(sequences, model.layout.window),
            TrainingConfig.model_validate(settings),
            stage=1,
            learning_rate=1e-2,
            strategy=Strategy(),
            seed=0,
            directory=directory,
            log=directory / "log.jsonl",
        ),
    )


@pytest.mark.slow
@pytest.mark.parametrize("loss_vocabulary", ["full", "level"])
def test_bfloat16_learns_what_float32_learns(
    make_model: Callable[..., GenerativeModel], tmp_path: Path, loss_vocabulary: str
) -> None:
    models = {name: with_adapter(make_model("stream", loss_vocabulary)) for name in ("float32", "bfloat16")}
    frozen = [p for p in models["bfloat16"].parameters() if not p.requires_grad]
    for p in frozen:
        p.data = p.data.to(Precision.of("bfloat16", "cpu").frozen)
    results = {name: train(model, tmp_path / name, name) for name, model in models.items()}
    exact, rough = (results[name].validation_losses for name in ("float32", "bfloat16"))
    assert exact[0] - exact[-1] > 0.3  # there is something to learn
    assert rough == pytest.approx(exact, abs=0.05)
    assert rough != exact
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    assert {p.dtype for p in models["bfloat16"].parameters() if p.requires_grad} == {torch.float32}
