"""``retrain``: one adapter on all data so far, learned anew at every stage. What forgetting nothing costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from peso.training.strategies.strategy import StageContext, Strategy

if TYPE_CHECKING:
    from peso.events.histories import TargetSequence


class Retrain(Strategy):
    """One adapter, learned anew at every stage on all data so far.

    The upper end in data and in cost: stages 0 … t together, from a fresh adapter. Where stage 0 trained the
    backbone itself, that backbone stays and the adapter is learned on top of it.
    """

    name = "retrain"
    reference = "retraining"
    chooses_by_data = True

    def starts_anew(self, phase: str) -> bool:
        return True

    def choose(self, context: StageContext) -> Sequence[TargetSequence] | None:
        return context.everything()

    def begin(self, context: StageContext) -> None:
        assert context.reset is not None
        context.reset()
