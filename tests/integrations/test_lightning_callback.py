"""ProximalCallback in Lightning trains as the same term written into the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint

import peso
from peso.adapters.groups import find_groups
from peso.errors import ConfigError, TrainingError
from peso.integrations.lightning import ProximalCallback
from peso.model.backbone import small_llama


class Counting(LightningModule):
    def __init__(self, term: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
        self.model = peft.get_peft_model(small_llama(32, 1, seed=0), config)
        with torch.no_grad():
            for group in find_groups(self.model):
                group.tensor.normal_(0, 0.1)
        self.term = term
        self.parts = 1
        if term is not None:
            term.anchor(self.model)

    def training_step(self, batch: torch.Tensor, number: int) -> torch.Tensor:
        loss = self.model(input_ids=batch, labels=batch).loss
        return loss if self.term is None else loss + self.term(self.model)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)


def values(module: Counting) -> torch.Tensor:
    return torch.cat([group.tensor.detach().flatten() for group in find_groups(module.model)])


def fitted(directory: Path, module: Counting, *callbacks: Any, accumulation: int = 1) -> Counting:
    ids = (torch.arange(16).unsqueeze(1) + torch.arange(12)) % 32 + 2
    trainer = Trainer(
        max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=str(directory), callbacks=[*callbacks],
        gradient_clip_val=0.5, accumulate_grad_batches=accumulation,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(ids, batch_size=4))
    return module


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_term_in_the_callback_trains_as_a_term_in_the_loss(tmp_path: Path, accumulation: int) -> None:
    callback = ProximalCallback(peso.SoftmaxKL(weight=3000.0))
    one = fitted(tmp_path, Counting(), callback, accumulation=accumulation)
    other = fitted(tmp_path, Counting(peso.SoftmaxKL(weight=3000.0)), accumulation=accumulation)
    free = fitted(tmp_path, Counting(), accumulation=accumulation)
    assert torch.allclose(values(one), values(other), atol=1e-6)
    assert not torch.allclose(values(one), values(free), atol=1e-4)
    assert callback.effect is not None
    assert callback.effect["distances"]


def test_a_decoupled_term_takes_back_the_share_that_its_strength_says(tmp_path: Path) -> None:
    module = Counting()
    term = peso.L2(strength=1.0, coupling="decoupled")
    term.anchor(module.model)
    before = values(module)
    with torch.no_grad():
        for group in find_groups(module.model):
            group.tensor.add_(0.1)
            group.tensor.register_hook(torch.zeros_like)
    with pytest.raises(ConfigError, match="total_learning_rate"):
        fitted(tmp_path, module, ProximalCallback(term))
    fitted(tmp_path, module, ProximalCallback(term, total_learning_rate=4 * 0.05))
    assert torch.allclose(values(module) - before, torch.full_like(before, 0.1 * 0.36788), atol=1e-4)


def test_a_training_that_continues_from_the_end_of_an_epoch_gives_the_same_result(tmp_path: Path) -> None:
    def train(directory: Path, steps: int, start: Path | None = None) -> torch.Tensor:
        module, term = Counting(), peso.L2(strength=1.0, coupling="decoupled")
        term.anchor(module.model)
        saved = ModelCheckpoint(directory, "{step}", every_n_train_steps=2, save_top_k=-1)
        trainer = Trainer(
            max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=str(directory),
            callbacks=[ProximalCallback(term, total_learning_rate=4 * 0.05), saved],
        )  # fmt: skip
        ids = (torch.arange(8).unsqueeze(1) + torch.arange(12)) % 32 + 2
        trainer.fit(
            module, torch.utils.data.DataLoader(ids, batch_size=4), ckpt_path=start, weights_only=False
        )
        return values(module)

    whole = train(tmp_path / "whole", 4)
    train(tmp_path / "part", 2)
    assert torch.equal(train(tmp_path / "rest", 4, tmp_path / "part" / "step=2.ckpt"), whole)


def test_what_a_callback_cannot_do_is_refused_before_the_first_step(tmp_path: Path) -> None:
    def train(module: Counting, **changes: Any) -> None:
        usual: dict[str, Any] = {"max_steps": 4, "max_epochs": 4, "accelerator": "cpu", "logger": False}
        quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        callback = ProximalCallback(peso.L2(weight=1.0))
        trainer = Trainer(callbacks=[callback], default_root_dir=str(tmp_path), **usual | quiet | changes)
        trainer.fit(module, torch.utils.data.DataLoader(torch.ones(4, 5, dtype=torch.long)))

    manual = Counting()
    manual.automatic_optimization = False
    with pytest.raises(ConfigError, match="needs automatic optimization"):
        train(manual)
    with pytest.raises(ConfigError, match="give Trainer max_epochs or max_steps"):
        train(Counting(), max_steps=-1, max_epochs=-1, max_time="00:00:00:01")
    frozen = Counting()
    frozen.model.requires_grad_(False)
    frozen.model.base_model.model.model.norm.requires_grad_(True)
    with pytest.raises(TrainingError, match="is anchored but frozen"):
        train(frozen)
