"""``ema``: an exponential moving average of the weights within each stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from peso.training.strategies.strategy import StageContext, Strategy

if TYPE_CHECKING:
    from torch import Tensor, nn


class Ema(Strategy):
    """``single``, with the average over a stage's steps kept instead of its last step.

    v̄ ← v̄ + (v - v̄) / (horizon · steps) after every step, from v̄ = v at the start (averaging along the
    trajectory: Polyak & Juditsky 1992; as an exponential average, e.g. Tarvainen & Valpola 2017). Everything
    trained is averaged, semantic vocabulary included. The average is what is validated and kept, and what the
    next stage starts from. exp(-1 / horizon) of the start is still in it at the end of the stage: 0.7 % at
    0.2, 37 % at 1, so a long horizon is also an anchor.
    """

    name = "ema"
    moves_one_adapter = True

    class Options(Strategy.Options):
        horizon: float = Field(
            0.2, gt=0, description="how far the average looks back, as a share of the stage's steps"
        )

    options: Options
    _trained: Mapping[str, nn.Parameter]
    _average: Mapping[str, Tensor]
    _share = 1.0  # of the newest step

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
