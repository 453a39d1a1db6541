"""``ema``: an exponential moving average of the weights within each stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from peso.training.strategies.strategy import StageContext, Strategy

if TYPE_CHECKING:
    from torch import Tensor, nn


class Ema(Strategy):
    """``single``, with an exponential moving average of the weights over the steps of a stage.

    After every step, v̄ ← v̄ + (v - v̄) / (horizon · steps), starting from v̄ = v (Polyak and Juditsky 1992;
    Tarvainen and Valpola 2017). All trained parameters are averaged, including the semantic vocabulary. The
    average is validated and stored, and the next stage starts from it. At the end of the stage, the weight of
    the initial values in the average is exp(-1 / horizon), which is 0.7 % for a horizon of 0.2 and 37 % for
    1. So a long horizon also acts as an anchor.
    """

    name = "ema"
    moves_one_adapter = True

    class Options(Strategy.Options):
        horizon: float = Field(
            0.2, gt=0, description="time constant of the average, as a share of the stage's steps"
        )

    options: Options
    _trained: Mapping[str, nn.Parameter]
    _average: Mapping[str, Tensor]
    _share = 1.0  # the weight of the newest step

    def begin(self, context: StageContext) -> None:
        self._trained = context.trainable()
        self._average = {name: p.detach().clone() for name, p in self._trained.items()}
        self._share = min(1.0, 1 / (self.options.horizon * context.total_steps))

    def running(self) -> Mapping[str, Tensor]:
        return self._average

    def after_step(self, context: StageContext, learning_rate: float) -> None:
        from torch import _foreach_lerp_

        now = [p.detach() for p in self._trained.values()]
        _foreach_lerp_(list(self._average.values()), now, self._share)
