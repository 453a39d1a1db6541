"""The reference for the tests of training: one example per target, written out by hand.

Shares no code with the packing: the layout's own prompt, the backbone's plain causal forward, embeddings and
head put together from their parts, a softmax over the whole row.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from peso.adapters.lora import adapter_parameters, add_adapter
from peso.events.histories import Cases, TargetSequence
from peso.model.generative import GenerativeModel

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def with_adapter(model: GenerativeModel, dropout: float = 0.0) -> GenerativeModel:
    """A LoRA adapter whose B is not zero, so that every matrix has a gradient; in training mode."""
    model.backbone = add_adapter(model.backbone, rank=4, alpha=8, dropout=dropout, targets=TARGETS, seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter_parameters(model.backbone).values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.train()


def random_sequences(seed: int, count: int, longest: int, items: int = 50) -> list[TargetSequence]:
    generator = np.random.default_rng(seed)
    result = []
    for number in range(count):
        length = int(generator.integers(1, longest + 1))
        first = int(generator.integers(0, length))
        rows = generator.integers(0, items, length).astype(np.int32)
        result.append(TargetSequence(f"user{number}", rows, first))
    return result


def token_losses(
    model: GenerativeModel, history: np.ndarray, target: int, temperature: float = 1.0
) -> Tensor:
    """(target tokens,): minus the log-probability of each token of one target, in a prompt of its own."""
    causal_lm, vocabulary, layout = model.causal_lm, model.vocabulary, model.layout
    words = causal_lm.get_input_embeddings().weight[: vocabulary.first_id]
    table = torch.cat([words, vocabulary.input_rows])
    head_words = causal_lm.get_output_embeddings().weight[: vocabulary.first_id]
    head = torch.cat([head_words, vocabulary.output_rows])
    sizes = np.array(vocabulary.sizes)
    starts = vocabulary.first_id + np.cumsum(sizes) - sizes

    prompt = layout.prompt(model.item_token_ids(history[-layout.window :]).reshape(-1, vocabulary.levels))
    ids = np.concatenate([prompt, model.item_token_ids(target), layout.end]).astype(np.int64)
    hidden = causal_lm.model(inputs_embeds=table[torch.from_numpy(ids)].unsqueeze(0))[0][0]
    logits = hidden @ head.T / temperature
    losses = []
    for place in range(len(prompt), len(ids)):
        token, level, row = int(ids[place]), place - len(prompt), logits[place - 1]
        if model.loss_vocabulary == "full":
            losses.append(-row.log_softmax(0)[token])
        elif level < vocabulary.levels:
            first, last = starts[0], starts[-1] + sizes[-1]
            if model.loss_vocabulary == "level":
                first, last = starts[level], starts[level] + sizes[level]
            losses.append(-row[first:last].log_softmax(0)[token - first])
    return torch.stack(losses)


def separate_loss(
    model: GenerativeModel, sequences: list[TargetSequence], temperature: float = 0.8
) -> Tensor:
    """The mean over all target tokens of all sequences."""
    return torch.cat(
        [
            token_losses(model, sequence.items[:t], sequence.items[t], temperature)
            for sequence in sequences
            for t in range(sequence.first_target, len(sequence.items))
        ]
    ).mean()


def cases_of(sequences: list[TargetSequence], window: int) -> Cases:
    """The last item of each sequence as a case."""
    return Cases(
        [sequence.user for sequence in sequences],
        [sequence.items[:-1][-window:] for sequence in sequences],
        np.array([sequence.items[-1] for sequence in sequences], dtype=np.int32),
    )
