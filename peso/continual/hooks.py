"""What a strategy is asked in the course of a stage, and what it is told about the stage.

Knows the model of a stage; knows nothing of files, batches or the loop that calls the hooks.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class StageContext:
    """The stage that is being learnt.

    ``number``: 0 is the base stage; ``backbone``: the backbone with the adapter that is trained (a PEFT
    model; at stage 0 of a ``scratch`` backbone a plain one, all of its weights trained); ``total_steps``:
    optimiser steps of the stage.
    """

    number: int
    backbone: nn.Module
    total_steps: int


class Strategy:
    """How a stage is learnt. The defaults: every stage is learnt, from the adapter of the last, freely.

    A strategy overrides what it does differently; one object serves one stage after another. The order in
    a stage is ``learns``, ``begin``, for every step ``penalty`` and ``after_step``, ``end``.
    """

    def learns(self, stage: int) -> bool:
        """Whether the stage is trained on at all; where not, the last state answers for it too."""
        return True

    def begin(self, context: StageContext) -> None:
        """Before the first step. The backbone holds the adapter that the stage inherits: of a stage that
        was interrupted too, whose own progress is restored afterwards."""

    def penalty(self, context: StageContext) -> Tensor | None:
        """Called once in every step: what is added to the loss, weighted: 0-d, differentiable with respect
        to trained parameters. None: nothing."""
        return None

    def after_step(self, context: StageContext, learning_rate: float) -> None:
        """After the optimiser moved the parameters at this learning rate."""

    def end(self, context: StageContext) -> None:
        """After the last step. The backbone holds the state that the stage keeps."""
