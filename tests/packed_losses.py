"""Losses and gradients of packed batches, as training computes them."""

from __future__ import annotations

import torch
from torch import Tensor

from peso.events.histories import TargetSequence
from peso.model.generative import GenerativeModel
from peso.training.batches import Packed, cut, lay_out, pack
from peso.training.likelihood import predicts_end, target_token_log_probabilities


def packed_batch(
    model: GenerativeModel, sequences: list[TargetSequence], row_tokens: int, pass_tokens: int, most: int = 8
) -> list[Packed]:
    pieces = [
        lay_out(
            model.layout,
            model.item_token_ids(sequences[c.sequence].items[c.start : c.stop]),
            c.first - c.start,
            predict_end=predicts_end(model),
        )
        for c in cut(sequences, model.layout.window, most)
    ]
    return pack(pieces, model.layout.prefix, row_tokens, pass_tokens)


def packed_loss(model: GenerativeModel, passes: list[Packed], temperature: float = 0.8) -> Tensor:
    scores = [target_token_log_probabilities(model, packed, temperature) for packed in passes]
    return -torch.cat(scores).mean()


def gradients(model: GenerativeModel, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(
        *((name, p) for name, p in model.named_parameters() if p.requires_grad), strict=True
    )
    found = torch.autograd.grad(loss, parameters)
    return dict(zip(names, found, strict=True))
