"""Use a proximal term with Transformers' ``Trainer``, on any PEFT LoRA model.

A tiny Llama with frozen random weights and a LoRA adapter learns to count up. It is then trained to count
down, once for each weight of the term, always from the same anchored adapter:

    python examples/transformers_trainer.py

The part to copy is ``AnchoredTrainer``.
"""

from __future__ import annotations

import copy
import tempfile

import peft
import torch
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

import peso
from peso.adapters.anchor_report import anchor_report
from peso.adapters.groups import find_groups
from peso.model.backbone import small_llama

WEIGHTS = (0.0, 2.0, 1e4, 1e6)


class AnchoredTrainer(Trainer):
    """``Trainer`` with a proximal term in its training loss."""

    def __init__(self, *args, term: peso.SoftmaxKL, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.term = term

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:  # evaluation uses the plain loss
            # If the number of items is given, Trainer sums the micro-batches of an optimizer step instead of
            # averaging them. The term must count once in both cases.
            parts = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = loss + self.term(model) / parts
        return (loss, outputs) if return_outputs else loss


def counting(step: int, examples: int = 64, length: int = 16) -> list[dict[str, torch.Tensor]]:
    """Sequences s, s + step, s + 2·step, … modulo 32, as token ids and labels."""
    starts = torch.arange(examples).unsqueeze(1)
    ids = (starts + step * torch.arange(length)) % 32 + 2  # 0 and 1 are special tokens
    return [{"input_ids": row, "labels": row} for row in ids]


def train(model: peft.PeftModel, data: list, term: peso.SoftmaxKL | None, epochs: int) -> None:
    """One stage. Without a term it is plain ``Trainer``."""
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            output_dir=directory,
            num_train_epochs=epochs,
            learning_rate=1e-2,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        if term is None:
            trainer = Trainer(model=model, args=arguments, train_dataset=data)
        else:
            trainer = AnchoredTrainer(model=model, args=arguments, train_dataset=data, term=term)
        trainer.remove_callback(PrinterCallback)
        trainer.train()


@torch.no_grad()
def mean_loss(model: peft.PeftModel, data: list) -> float:
    model.eval()
    ids = torch.stack([example["input_ids"] for example in data]).to(model.device)
    return float(model(input_ids=ids, labels=ids).loss)


def main(weights: tuple[float, ...] = WEIGHTS, epochs: int = 20) -> dict[float, dict[str, float]]:
    """weight → how far the adapter moved in the second stage, and both losses after it."""
    set_seed(0)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    base = peft.get_peft_model(small_llama(width=64, layers=2, seed=0), config)
    up, down = counting(+1), counting(-1)
    train(base, up, term=None, epochs=epochs)

    print(f"after stage 0: loss {mean_loss(base, up):.3f} up, {mean_loss(base, down):.3f} down")
    print("   weight  distance moved         KL   loss, up  loss, down")
    results = {}
    for weight in weights:
        model = copy.deepcopy(base)
        before = [group.snapshot() for group in find_groups(model)]
        term = peso.SoftmaxKL(weight=weight)
        term.anchor(model)
        set_seed(1)
        train(model, down, term, epochs)
        moved = anchor_report(before, find_groups(model))
        results[weight] = {
            "distance": moved["distance"],
            "kl": moved["kl"],
            "up": mean_loss(model, up),
            "down": mean_loss(model, down),
        }
        distance, kl, loss_up, loss_down = results[weight].values()
        print(f"{weight:9g} {distance:15.3f} {kl:10.2e} {loss_up:10.3f} {loss_down:11.3f}")
    return results


if __name__ == "__main__":
    main()
