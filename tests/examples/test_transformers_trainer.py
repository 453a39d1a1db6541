"""The documented example with Transformers' Trainer: it runs, and a large weight holds the adapter."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import peft
import pytest
import torch
from transformers import TrainingArguments

import peso
from peso.adapters.anchor_report import anchor_report
from peso.adapters.groups import find_groups
from peso.model.backbone import small_llama

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples" / "transformers_trainer.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("transformers_trainer", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_large_weight_keeps_the_adapter_nearer_its_anchor(
    example: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    results = example.main(weights=(0.0, 1e4, 1e6), epochs=3)
    free, held, frozen = (results[weight] for weight in (0.0, 1e4, 1e6))
    assert free["distance"] > 2 * held["distance"] > 4 * frozen["distance"] > 0
    assert free["kl"] > held["kl"] > frozen["kl"] > 0
    assert free["down"] < held["down"] < frozen["down"]  # what is held learns less of the new ...
    assert free["up"] > frozen["up"]  # ... and forgets less of the old
    assert "distance moved" in capsys.readouterr().out


def anchored_run(
    example: ModuleType, directory: Path, batch_size: int, accumulation: int, num_items: bool
) -> float:
    """Distance moved in two optimiser steps of 16 examples, in micro-batches."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(small_llama(64, 1, seed=0), config)
    with torch.no_grad():
        for group in find_groups(model):
            group.tensor.normal_(0, 0.1)
    term = peso.SoftmaxKL(weight=300.0, reduction="sum")
    term.anchor(model)
    before = [group.snapshot() for group in find_groups(model)]
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=2,
        learning_rate=0.1,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = example.AnchoredTrainer(
        model=model, args=arguments, train_dataset=example.counting(1), term=term
    )
    trainer.model_accepts_loss_kwargs = num_items
    trainer.train()
    return anchor_report(before, find_groups(model))["distance"]


@pytest.mark.parametrize("num_items", [True, False])
def test_the_term_counts_once_however_many_micro_batches_a_step_has(
    example: ModuleType, tmp_path: Path, num_items: bool
) -> None:
    whole = anchored_run(example, tmp_path, 16, 1, num_items)
    assert anchored_run(example, tmp_path, 4, 4, num_items) == pytest.approx(whole, rel=1e-4)


def test_the_evaluated_loss_is_the_plain_one(example: ModuleType, tmp_path: Path) -> None:
    model = peft.get_peft_model(small_llama(64, 1, seed=0), peft.LoraConfig(target_modules=["q_proj"]))
    term = peso.SoftmaxKL(weight=1e9)
    term.anchor(model)
    with torch.no_grad():
        for group in find_groups(model):
            group.tensor.add_(torch.linspace(-1, 1, group.tensor.numel()).view_as(group.tensor))
    data = example.counting(1)
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", disable_tqdm=True)
    trainer = example.AnchoredTrainer(model=model, args=arguments, eval_dataset=data, term=term)
    assert term(model).item() > 1e3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(example.mean_loss(model, data), rel=1e-4)
