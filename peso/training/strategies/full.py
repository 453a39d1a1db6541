"""``full``: full fine-tuning of the backbone at every stage."""

from __future__ import annotations

from peso.training.strategies.strategy import Strategy


class FullFineTuning(Strategy):
    """All weights of the backbone, fine-tuned on every stage.

    This is ``single`` without an adapter. Stage 1 merges the base stage's adapter into the backbone, and
    trains all weights from there. Each stage stores a whole backbone.
    """

    name = "full"
    reads = frozenset({"backbone"})

    def trains_backbone(self, stage: int) -> bool:
        return True
