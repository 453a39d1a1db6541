"""``average``: the running average of the states that plain fine-tuning reaches, stage after stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from peso.training.strategies.strategy import StageContext, Strategy

if TYPE_CHECKING:
    from torch import Tensor


class Average(Strategy):
    """``single``, each stage's result averaged with what came before it.

    v̄_t = v̄_{t-1} + share · (v_t - v̄_{t-1}), v_t learned from v̄_{t-1} on. Everything trained is averaged,
    semantic vocabulary included, since adapter and rows fit each other. A factor is averaged, not the product
    B A, so that one adapter of the same rank is all that is kept.
    """

    name = "average"
    moves_one_adapter = True

    class Options(Strategy.Options):
        share: float = Field(0.5, gt=0, le=1, description="weight of the newest stage in the running average")

    options: Options
    _before: dict[str, Tensor]

    def begin(self, context: StageContext) -> None:
        self._before = {name: p.detach().clone() for name, p in context.trainable().items()}

    def end(self, context: StageContext) -> None:
        for name, p in context.trainable().items():
            p.data.copy_(self._before[name].lerp(p.data, self.options.share))
