"""``peso``: one evolving adapter, held near its last state by a softmax-KL term (arXiv 2510.25093)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from peso.continual.hooks import StageContext, Strategy
from peso.continual.proximal import SoftmaxKL


class Peso(Strategy):
    """``single`` with an anchor: the adapter that each stage from stage 1 on starts with."""

    def __init__(self, weight: float = 2.0, reduction: Literal["mean", "sum"] = "mean") -> None:
        self.term = SoftmaxKL(weight, reduction)

    def begin(self, context: StageContext) -> None:
        if context.number > 0:
            self.term.anchor(context.backbone)

    def penalty(self, context: StageContext) -> Tensor | None:
        return self.term(context.backbone) if context.number > 0 else None
