"""``single``: one evolving adapter, fine-tuned on each stage from where the last one left it."""

from __future__ import annotations

from peso.training.strategies.strategy import Strategy


class SingleAdapter(Strategy):
    """Plain sequential fine-tuning, the defaults of every hook: all plasticity, nothing held."""
