"""Every strategy by its configuration. A new one is a file of its own in this folder and a case here.

Knows which strategies there are and which options each takes; knows nothing of what they do.
"""

from __future__ import annotations

from typing import assert_never

from peso.config import NoneConfig, PesoConfig, SingleConfig, StrategyConfig
from peso.continual.hooks import StageContext, Strategy
from peso.continual.none import NoUpdates
from peso.continual.peso import Peso
from peso.continual.single import SingleAdapter

__all__ = ["StageContext", "Strategy", "make_strategy"]


def make_strategy(config: StrategyConfig) -> Strategy:
    """A fresh strategy for one run. Unknown names and options are refused by the configuration."""
    match config:
        case NoneConfig():
            return NoUpdates()
        case SingleConfig():
            return SingleAdapter()
        case PesoConfig():
            return Peso(config.weight, config.reduction)
        case _:
            assert_never(config)
