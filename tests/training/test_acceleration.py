"""Options that make a step cheaper change none of its numbers, and say where they cannot be used."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_path import cases_of, random_sequences, with_adapter
from torch.autograd.graph import saved_tensors_hooks

from peso.config import TrainingConfig, load_config
from peso.config.shape import stage_shape
from peso.errors import ConfigError, TrainingError
from peso.model.generative import GenerativeModel
from peso.runs.stage import FORMAT
from peso.runs.workspace import Workspace
from peso.runtime.manifest import write_manifest
from peso.training.acceleration import gradient_checkpointing
from peso.training.loop import train_stage
from peso.training.strategies.peso import Peso
from peso.training.strategies.strategy import Strategy
from peso.training.task import StageResult, StageTask

SEQUENCES = random_sequences(0, count=8, longest=8)
TREE: dict[str, Any] = {"data": "simulate", "backbone": "tiny"}


def train(
    model: GenerativeModel, directory: Path, strategy: Strategy | None = None, **settings: Any
) -> StageResult:
    return train_stage(
        model,
        StageTask(
            SEQUENCES,
            cases_of(SEQUENCES, 20),
            TrainingConfig(**{"epochs": 2, "batch_size": 8, "device": "cpu", **settings}),
            stage=1,
            learning_rate=1e-2,
            strategy=strategy or Strategy(),
            seed=7,
            directory=directory,
            log=directory / "log.jsonl",
        ),
    )


def check_same(one: GenerativeModel, two: GenerativeModel, tolerance: float) -> None:
    expected = dict(two.named_parameters())
    for name, value in one.named_parameters():
        torch.testing.assert_close(value, expected[name], atol=tolerance, rtol=0)


def test_gradient_checkpointing_changes_no_number(
    make_model: Callable[..., GenerativeModel], tmp_path: Path
) -> None:
    """Under the tree mask of `instruct`, dropout drawn alike; afterwards it is off again."""
    plain, checkpointed = (with_adapter(make_model("instruct"), dropout=0.2) for _ in range(2))
    expected = train(plain, tmp_path / "plain")
    found = train(checkpointed, tmp_path / "checkpointed", gradient_checkpointing=True)
    assert found.training_losses == pytest.approx(expected.training_losses, abs=1e-6)
    assert found.validation_losses == pytest.approx(expected.validation_losses, abs=1e-6)
    check_same(checkpointed, plain, 1e-5)
    assert not checkpointed.causal_lm.is_activation_checkpointing


def test_gradient_checkpointing_keeps_less(make_model: Callable[..., GenerativeModel]) -> None:
    model = with_adapter(make_model(layers=4))
    ids = torch.arange(60).view(1, -1)
    kept = []
    for wanted in (False, True):
        sizes: list[int] = []

        def count(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with gradient_checkpointing(model, wanted), saved_tensors_hooks(count, lambda tensor: tensor):
            model.hidden(ids, None, ids)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 4


def test_a_term_on_outputs_refuses_gradient_checkpointing(
    make_model: Callable[..., GenerativeModel], tmp_path: Path
) -> None:
    strategy = {"name": "peso", "proximal": "output_kl"}
    with pytest.raises(ConfigError, match=r"gradient_checkpointing .*output_kl"):
        load_config({**TREE, "strategy": strategy, "training": {"gradient_checkpointing": True}})
    with pytest.raises(TrainingError, match=r"OutputKL .*gradient checkpointing"):
        train(
            with_adapter(make_model()),
            tmp_path,
            Peso(proximal="output_kl", weight=1.0),
            gradient_checkpointing=True,
        )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_a_compiled_backbone_learns_the_same(
    make_model: Callable[..., GenerativeModel], tmp_path: Path
) -> None:
    plain, compiled = (with_adapter(make_model("instruct", layers=3)) for _ in range(2))
    expected = train(plain, tmp_path / "plain", epochs=1, max_steps=3)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = train(compiled, tmp_path / "compiled", epochs=1, max_steps=3, compile=True)
    # one layer's code serves all three and a pass of another length; validation compiles nothing
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 1
    assert found.training_losses == pytest.approx(expected.training_losses, abs=1e-5)
    check_same(compiled, plain, 1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_a_compiled_backbone_drops(make_model: Callable[..., GenerativeModel], tmp_path: Path) -> None:
    """Other draws than as written, so other numbers of the same kind; the same ones twice."""
    losses = []
    for number, (dropout, wanted) in enumerate([(0.0, False), (0.3, True), (0.3, True)]):
        model = with_adapter(make_model("instruct"), dropout=dropout)
        done = train(model, tmp_path / str(number), epochs=1, max_steps=3, compile=wanted)
        losses.append(done.training_losses)
    assert losses[1] == losses[2]
    assert losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_auto_compiles_nothing_on_a_cpu(
    make_model: Callable[..., GenerativeModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: pytest.fail("compiled"))
    train(with_adapter(make_model()), tmp_path, epochs=1, max_steps=1, compile="auto")


def test_options_of_cost_determine_nothing(tmp_path: Path) -> None:
    """Neither the digest of a stage nor what may change in a workspace depends on them."""
    plain, cheap = (
        load_config({**TREE, "training": training})
        for training in ({}, {"gradient_checkpointing": True, "compile": "auto"})
    )
    for stage in (0, 1):
        assert stage_shape(plain, stage) == stage_shape(cheap, stage)
    workspace = Workspace.create_or_open(tmp_path / "w", plain)
    for directory in (workspace.stream_directory, workspace.semantic_ids_directory):
        directory.mkdir()
        write_manifest(directory, 1, {})
    for stage in (0, 1):
        workspace.stage(stage).directory.mkdir(parents=True)
        write_manifest(
            workspace.stage(stage).directory, FORMAT, {"configuration": plain.model_dump(mode="json")}
        )
    opened = Workspace.create_or_open(tmp_path / "w", cheap)
    assert Workspace.open(tmp_path / "w").config.training == opened.config.training == cheap.training
