"""``single``: sequential fine-tuning of one adapter."""

from __future__ import annotations

from peso.training.strategies.strategy import Strategy


class SingleAdapter(Strategy):
    """One adapter, fine-tuned on every stage, starting from the state after the previous one.

    It uses the default of every hook, so nothing restrains the update.
    """

    name = "single"
    reference = "fine-tuning"
    moves_one_adapter = True
