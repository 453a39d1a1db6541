"""ProximalCallback trains as the same term written into the loss, and says whether the anchor restrains."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import Trainer, TrainingArguments

import peso
from peso.adapters.anchor_report import anchor_report
from peso.adapters.groups import find_groups
from peso.errors import ConfigError, TrainingError
from peso.integrations.transformers import ProximalCallback, _sum_of_rates
from peso.model.backbone import small_llama

pytestmark = pytest.mark.slow

EXAMPLES = 16


def data() -> list[dict[str, torch.Tensor]]:
    ids = (torch.arange(EXAMPLES).unsqueeze(1) + torch.arange(12)) % 32 + 2
    return [{"input_ids": row, "labels": row} for row in ids]


def adapted() -> peft.PeftModel:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(small_llama(32, 1, seed=0), config)
    with torch.no_grad():
        for group in find_groups(model):
            group.tensor.normal_(0, 0.1)
    return model


def arguments(directory: Path, **changes: Any) -> TrainingArguments:
    usual: dict[str, Any] = {
        "max_steps": 4, "learning_rate": 0.05, "optim": "sgd", "lr_scheduler_type": "linear",
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5,
        "logging_steps": 2, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(directory), **usual | changes)


class InTheLoss(Trainer):
    term: peso.SoftmaxKL

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[no-untyped-def]
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = loss + self.term(model) / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss


def values(model: peft.PeftModel) -> torch.Tensor:
    return torch.cat([group.tensor.detach().flatten() for group in find_groups(model)])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_term_in_the_callback_trains_as_a_term_in_the_loss(tmp_path: Path, accumulation: int) -> None:
    given = arguments(tmp_path, gradient_accumulation_steps=accumulation)
    one, other, free = adapted(), adapted(), adapted()
    term = peso.SoftmaxKL(weight=3000.0)
    callback = ProximalCallback(peso.SoftmaxKL(weight=3000.0))
    term.anchor(other)
    by_hand = InTheLoss(model=other, args=given, train_dataset=data())
    by_hand.term = term
    Trainer(model=one, args=given, train_dataset=data(), callbacks=[callback]).train()
    by_hand.train()
    Trainer(model=free, args=given, train_dataset=data()).train()
    assert torch.allclose(values(one), values(other), atol=1e-6)
    assert not torch.allclose(values(one), values(free), atol=1e-4)
    assert callback.effect is not None
    assert callback.effect["gradient_ratio"] is None or callback.effect["gradient_ratio"] >= 0


def test_a_decoupled_term_takes_back_the_share_that_its_strength_says(tmp_path: Path) -> None:
    """Without a gradient, exp(−strength) of a displacement is left, whatever the schedule, and also if the
    same callback is used again for another number of steps."""
    model = adapted()
    term = peso.L2(strength=1.0, coupling="decoupled")
    term.anchor(model)
    before = values(model)
    for parameter in model.parameters():
        parameter.register_hook(torch.zeros_like) if parameter.requires_grad else None
    callback = ProximalCallback(term)
    for steps in (7, 3):
        with torch.no_grad():
            for group in find_groups(model):
                group.tensor.add_(0.1)
        moved = values(model) - before
        given = arguments(tmp_path, lr_scheduler_type="cosine", max_steps=steps)
        trainer = Trainer(model=model, args=given, train_dataset=data(), callbacks=[callback])
        trainer.train()
        assert torch.allclose(values(model) - before, 0.36788 * moved, atol=1e-4)
        assert callback.effect is not None
        assert callback.effect["taken_back"] == pytest.approx(1 - 0.36788, abs=0.02)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all("proximal/distance" in entry for entry in logged)


def test_the_log_says_whether_the_anchor_restrains(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = adapted()
    with torch.no_grad():
        before = [group.snapshot() for group in find_groups(model)]
    callback = ProximalCallback(peso.SoftmaxKL(weight=1e-9), stage=3)
    term = callback.term
    term.anchor(model)
    with torch.no_grad():
        for group in find_groups(model):
            group.tensor.add_(torch.randn_like(group.tensor), alpha=0.05)
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=data(), callbacks=[callback])
    with caplog.at_level(logging.INFO, "peso.integrations"):
        trainer.train()
    assert callback.effect is not None
    assert 0 < callback.effect["gradient_ratio"] < 1e-3
    assert "stage 3" in caplog.text
    assert "had no measurable effect at this weight" in caplog.text
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert logged["proximal/value"] >= 0
    assert 0 < logged["proximal/gradient_ratio"] < 1e-3
    assert anchor_report(before, find_groups(model))["distance"] > 0


def test_what_a_callback_cannot_do_is_refused_before_the_first_step(tmp_path: Path) -> None:
    def train(term: Any, model: Any = None, **changes: Any) -> None:
        model = model or adapted()
        given = arguments(tmp_path, **changes)
        Trainer(model=model, args=given, train_dataset=data(), callbacks=[ProximalCallback(term)]).train()

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    with pytest.raises(ConfigError, match=r"learning rates of StepLR are not known in advance"):
        _sum_of_rates(torch.optim.lr_scheduler.StepLR(optimizer, 2), 4)
    halves = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    assert _sum_of_rates(halves, 3) == pytest.approx(0.1 * 1.75)
    with pytest.raises(TrainingError, match="no LoRA adapter"):
        train(peso.L2(weight=1.0), small_llama(32, 1, seed=0))
    frozen = adapted().requires_grad_(False)
    frozen.base_model.model.model.norm.requires_grad_(True)
    with pytest.raises(TrainingError, match=r"is anchored but frozen"):
        train(peso.L2(weight=1.0), frozen)


def test_the_callback_works_with_trl(tmp_path: Path) -> None:
    """Adding the gradient and pulling afterwards hold the adapter nearer its anchor than plain SFTTrainer."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(64)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")
    rows = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in data()])
    given = arguments(tmp_path).to_dict()
    kept = ("max_steps", "learning_rate", "per_device_train_batch_size", "max_grad_norm", "logging_steps")
    distances = []
    for term in (None, peso.SoftmaxKL(weight=1e5), peso.L2(strength=3.0, coupling="decoupled")):
        model = adapted()
        before = [group.snapshot() for group in find_groups(model)]
        callback = [] if term is None else [ProximalCallback(term)]
        settings = SFTConfig(
            output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, save_strategy="no",
            gradient_checkpointing=False, max_length=None, optim="sgd",
            **{name: given[name] for name in kept},
        )  # fmt: skip
        SFTTrainer(
            model=model, args=settings, train_dataset=rows, processing_class=tokenizer, callbacks=callback
        ).train()
        distances.append(anchor_report(before, find_groups(model))["distance"])
    free, held, pulled = distances
    assert held < free / 2
    assert pulled < free / 2
