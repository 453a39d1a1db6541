"""``interpolate``: interpolates the weights before and after a stage, with a share chosen on validation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from peso.training.strategies.strategy import StageContext, Strategy

if TYPE_CHECKING:
    from torch import Tensor


class Interpolate(Strategy):
    """``average``, with a share that each stage chooses on its validation cases.

    v̄ = v̄_before + share · (v - v̄_before), where v is trained starting from v̄_before (WiSE-FT, Wortsman et
    al. 2022, arXiv 2109.01903). The share with the lowest validation loss is chosen; of equal ones, the
    smallest. Each candidate takes one pass over the validation cases.
    """

    name = "interpolate"
    moves_one_adapter = True

    class Options(Strategy.Options):
        shares: list[Annotated[float, Field(ge=0, le=1)]] = Field(
            [0.0, 0.25, 0.5, 0.75, 1.0],
            min_length=2,
            max_length=64,
            description="candidate shares of the new stage: 0 keeps the last stage, 1 is `single`",
        )

    options: Options
    _before: dict[str, Tensor]
    _losses: dict[float, float]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._losses = {}

    def begin(self, context: StageContext) -> None:
        self._before = {name: p.detach().clone() for name, p in context.trainable().items()}

    def end(self, context: StageContext) -> None:
        assert context.validate is not None
        after = {name: p.detach().clone() for name, p in context.trainable().items()}
        self._losses = {}
        for share in sorted(set(self.options.shares)):
            self._put(context, after, share)
            self._losses[share] = context.validate()
        self._put(context, after, self._best)

    @property
    def _best(self) -> float:
        return min(self._losses, key=self._losses.__getitem__)

    def _put(self, context: StageContext, after: dict[str, Tensor], share: float) -> None:
        for name, p in context.trainable().items():
            p.data.copy_(self._before[name].lerp(after[name], share))

    def figures(self) -> dict[str, Any]:
        if not self._losses:
            return {}
        tried = {str(share): loss for share, loss in self._losses.items()}
        return {"share": self._best, "validation_losses": tried}
