"""Every strategy by its configuration.

Knows where a configuration says that a strategy lives; knows nothing of what strategies do.
"""

from __future__ import annotations

from importlib import import_module

from peso.config import CustomConfig, StrategyConfig
from peso.continual.hooks import ForwardPass, StageContext, Strategy
from peso.errors import ConfigError

__all__ = ["ForwardPass", "StageContext", "Strategy", "make_strategy"]


def make_strategy(config: StrategyConfig) -> Strategy:
    """A fresh strategy for one stage. Unknown names and options are refused by the configuration.

    Raises:
        ConfigError: a strategy of one's own that cannot be imported, is none, or takes other arguments.
    """
    if isinstance(config, CustomConfig):
        return _custom(config)
    module, _, name = config.home.rpartition(".")
    strategy: Strategy = getattr(import_module(module), name)(**config.options())
    return strategy


def _custom(config: CustomConfig) -> Strategy:
    module, _, name = config.module.rpartition(".")
    try:
        made = getattr(import_module(module or name), name)(**config.arguments)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"strategy.module: {config.module} cannot be made with {config.arguments} ({error}); name a "
            "class that Python can import from here (PYTHONPATH) and the keyword arguments that it takes"
        ) from error
    if not isinstance(made, Strategy):
        raise ConfigError(f"strategy.module: {config.module} is no peso.continual.strategy.Strategy")
    return made
