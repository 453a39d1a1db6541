"""``average``: the running average of the states that plain fine-tuning reaches, stage after stage."""

from __future__ import annotations

import torch
from torch import Tensor

from peso.training.strategies.strategy import StageContext, Strategy


class Average(Strategy):
    """v̄_t = v̄_{t-1} + share · (v_t - v̄_{t-1}), v_t learnt from v̄_{t-1} on.

    Everything trained is averaged, semantic vocabulary included, since adapter and rows fit each other. A
    factor is averaged, not the product B A, so that one adapter of the same rank is all that is kept.
    """

    def __init__(self, share: float = 0.5) -> None:
        self.share = share
        self._before: dict[str, Tensor] = {}

    def begin(self, context: StageContext) -> None:
        self._before = {name: p.detach().clone() for name, p in context.trainable().items()}

    @torch.no_grad()
    def end(self, context: StageContext) -> None:
        for name, p in context.trainable().items():
            p.copy_(torch.lerp(self._before[name], p, self.share))
