"""``single``: one evolving adapter, fine-tuned on each stage from where the last one left it."""

from __future__ import annotations

from peso.training.strategies.strategy import Strategy


class SingleAdapter(Strategy):
    """One adapter, fine-tuned on every stage from where the last one left it.

    The defaults of every hook: all plasticity, no anchor.
    """

    name = "single"
    reference = "fine-tuning"
    moves_one_adapter = True
