"""``none``: the base stage alone is learnt; its model answers for ever after, as stale as it gets."""

from __future__ import annotations

from peso.training.strategies.strategy import Strategy


class NoUpdates(Strategy):
    """The lower end of every comparison: what updating is worth is measured against it."""

    def learns(self, stage: int) -> bool:
        return stage == 0
