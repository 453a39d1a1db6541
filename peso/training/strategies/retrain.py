"""``retrain``: one adapter on all data so far, learnt anew at every stage. What forgetting nothing costs."""

from __future__ import annotations

from collections.abc import Sequence

from peso.events.histories import TargetSequence
from peso.training.strategies.strategy import StageContext, Strategy


class Retrain(Strategy):
    """The upper end in data and in cost: stages 0 … t together, from a fresh adapter. Where stage 0 trained
    the backbone itself, that backbone stays and the adapter is learnt on top of it."""

    def starts_anew(self, phase: str) -> bool:
        return True

    def choose(self, context: StageContext) -> Sequence[TargetSequence] | None:
        return everything(context)

    def begin(self, context: StageContext) -> None:
        assert context.reset is not None
        context.reset()


def everything(context: StageContext) -> list[TargetSequence]:
    """The training targets of all stages up to this one."""
    assert context.examples is not None
    return [each for stage in range(context.number + 1) for each in context.examples.of(stage)]
