"""``full``: every weight of the backbone fine-tuned, stage after stage. What an adapter is spared."""

from __future__ import annotations

from peso.training.strategies.strategy import Strategy


class FullFineTuning(Strategy):
    """All weights of the backbone, fine-tuned on every stage.

    ``single`` without an adapter: from stage 1 on all weights move; the base stage's adapter is merged into
    them first. Each stage stores a whole backbone.
    """

    name = "full"
    reads = frozenset({"backbone"})

    def trains_backbone(self, stage: int) -> bool:
        return True
