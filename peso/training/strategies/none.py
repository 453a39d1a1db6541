"""``none``: no updates; the model of the base stage serves all later stages."""

from __future__ import annotations

from peso.training.strategies.strategy import Strategy


class NoUpdates(Strategy):
    """Only stage 0 is learned; later stages use its model unchanged.

    This is the lower reference of a comparison: the benefit of updates is measured against it.
    """

    name = "none"
    reference = "no updates"
    reads = frozenset({"past"})

    def learns(self, stage: int) -> bool:
        return stage == 0
