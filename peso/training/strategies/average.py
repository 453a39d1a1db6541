"""``average``: a running average of the weights after each stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from peso.training.strategies.strategy import StageContext, Strategy

if TYPE_CHECKING:
    from torch import Tensor


class Average(Strategy):
    """``single``, but the weights after a stage are averaged with those of the earlier stages.

    v̄_t = v̄_{t-1} + share · (v_t - v̄_{t-1}), where v_t is trained starting from v̄_{t-1}. All trained
    parameters are averaged, including the semantic vocabulary, because adapter and rows depend on each other.
    The factors A and B are averaged, not their product, so that the result is one adapter of the same rank.
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
