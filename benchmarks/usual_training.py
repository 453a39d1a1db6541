"""Training as users of Transformers and PEFT write it, for comparison in ``benchmarks/training.py``.

Our model is used only to start from the same weights and prompts; everything else is plain Transformers and
PEFT. There is one example per target, with the history's prompt followed by the target, the loss is on the
target only, batches (of 8) are padded, gradients are accumulated over 32 targets, and AdamW, the cosine
schedule and clipping are those of `Trainer`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import get_cosine_schedule_with_warmup

from peso.model.generative import GenerativeModel

Example = tuple[np.ndarray, np.ndarray]  # prompt, answer (both token ids)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH, TEMPERATURE = 8, 0.8
IGNORED = -100


def resized(model: GenerativeModel) -> Any:
    """The backbone with its embedding and head enlarged by the semantic tokens' rows, untied."""
    causal_lm = model.causal_lm
    first = model.vocabulary.first_id
    embedding, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    weights = [
        torch.cat([embedding.weight[:first], model.vocabulary.input_rows]).detach(),
        torch.cat([head.weight[:first], model.vocabulary.output_rows]).detach(),
    ]
    causal_lm.config.tie_word_embeddings = False
    causal_lm.config.vocab_size = len(weights[0])
    causal_lm.set_input_embeddings(nn.Embedding.from_pretrained(weights[0], freeze=True))
    new_head = nn.Linear(weights[1].shape[1], len(weights[1]), bias=False)
    new_head.weight = nn.Parameter(weights[1], requires_grad=False)
    causal_lm.set_output_embeddings(new_head)
    return causal_lm


class UsualWay:
    """Embedding and head copied and trained (`modules_to_save`), logits of the whole vocabulary at all
    positions, batches in the order of the shuffle."""

    def __init__(
        self,
        model: GenerativeModel,
        dropout: float,
        learning_rate: float,
        steps: int,
        batch: int = BATCH,
        compute: torch.dtype = torch.float32,
    ) -> None:
        self.device, self.compute, self.batch = model.device, compute, batch
        config = LoraConfig(
            r=8,
            lora_alpha=16,
            lora_dropout=dropout,
            target_modules=TARGETS,
            task_type="CAUSAL_LM",
            **self.options(model),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = get_peft_model(resized(model), config).to(self.device).train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.01, fused=True)
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, 1, steps)
        self.trained = trained

    def options(self, model: GenerativeModel) -> dict[str, Any]:
        return {"modules_to_save": ["embed_tokens", "lm_head"]}

    def step(self, examples: list[Example]) -> float:
        """One optimizer step over the examples; returns the mean loss over their target tokens."""
        loss = 0.0
        count = sum(len(answer) for _, answer in examples)
        for batch in self.batches(examples):
            part = self.summed_loss(batch) / count
            part.backward()
            loss += part.item()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return loss

    @torch.no_grad()
    def loss(self, examples: list[Example]) -> float:
        """Mean loss over target tokens, dropout off, nothing learned."""
        self.model.eval()
        total = sum(float(self.summed_loss(batch)) for batch in self.batches(examples))
        self.model.train()
        return total / sum(len(answer) for _, answer in examples)

    def batches(self, examples: list[Example]) -> list[list[Example]]:
        return [examples[i : i + self.batch] for i in range(0, len(examples), self.batch)]

    def products(self) -> AbstractContextManager[object]:
        """What `Trainer(bf16=True)` does; nothing in float32."""
        mixed = self.compute != torch.float32
        return torch.autocast(self.device.type, dtype=self.compute) if mixed else nullcontext()

    def summed_loss(self, batch: list[Example]) -> Tensor:
        ids, mask, labels = (x.to(self.device) for x in padded(batch, left=False))
        with self.products():
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        logits = logits.float()[:, :-1] / TEMPERATURE
        return F.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
        )


class ExpertWay(UsualWay):
    """The same libraries in expert hands: only the new rows are trained (`trainable_token_indices`),
    batches of similar length, padded on the left so that logits are needed at the answer only."""

    def options(self, model: GenerativeModel) -> dict[str, Any]:
        rows = list(range(model.vocabulary.first_id, model.vocabulary.first_id + len(model.vocabulary)))
        return {"trainable_token_indices": {"embed_tokens": rows, "lm_head": rows}}

    def batches(self, examples: list[Example]) -> list[list[Example]]:
        return super().batches(sorted(examples, key=lambda example: -len(example[0])))

    def summed_loss(self, batch: list[Example]) -> Tensor:
        ids, mask, labels = (x.to(self.device) for x in padded(batch, left=True))
        answer = len(batch[0][1])
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        with self.products():
            output = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=False,
                logits_to_keep=answer + 1,
            )
        logits = output.logits[:, :-1].float() / TEMPERATURE
        return F.cross_entropy(logits.flatten(0, 1), labels[:, -answer:].flatten(), reduction="sum")


def padded(batch: list[Example], *, left: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and labels, int64 (examples, longest); only answers have labels."""
    longest = max(len(prompt) + len(answer) for prompt, answer in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, (prompt, answer) in enumerate(batch):
        start = longest - len(prompt) - len(answer) if left else 0
        middle, stop = start + len(prompt), start + len(prompt) + len(answer)
        ids[row, start:middle] = torch.from_numpy(prompt)
        ids[row, middle:stop] = labels[row, middle:stop] = torch.from_numpy(answer)
        mask[row, start:stop] = 1
    return ids, mask, labels
