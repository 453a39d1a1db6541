"""``retrain``: at every stage, a new adapter trained on all data so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from peso.training.strategies.strategy import StageContext, Strategy

if TYPE_CHECKING:
    from peso.events.histories import TargetSequence


class Retrain(Strategy):
    """At every stage t, a new adapter trained on stages 0 … t together.

    This is the upper reference of a comparison, in data and in cost. If stage 0 trained the backbone itself,
    that backbone is kept, and the adapter is trained on top of it.
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
