"""``none``: the base stage alone is learned; its model answers for ever after, as stale as it gets."""

from __future__ import annotations

from peso.training.strategies.strategy import Strategy


class NoUpdates(Strategy):
    """Only stage 0 is learned; later stages inherit it unchanged.

    The lower end of every comparison: what updating is worth is measured against it.
    """

    name = "none"
    reference = "no updates"
    reads = frozenset({"past"})

    def learns(self, stage: int) -> bool:
        return stage == 0
