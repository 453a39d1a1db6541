"""Every strategy by its configuration.

Knows where a configuration says that a strategy lives; knows nothing of what strategies do.
"""

from __future__ import annotations

from importlib import import_module

from peso.config import CustomConfig, StrategyConfig
from peso.config.parsing import shown
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
        found = getattr(import_module(module or name), name)
    except Exception as error:  # whatever a module does when it is imported
        raise _refused(config, f"cannot be imported ({_cause(error)})") from error
    if not (isinstance(found, type) and issubclass(found, Strategy)):
        raise _refused(config, "is not a subclass of peso.continual.strategy.Strategy")
    try:
        return found(**config.arguments)
    except Exception as error:
        raise _refused(config, f"cannot be made with {shown(config.arguments)} ({_cause(error)})") from error


def _refused(config: CustomConfig, why: str) -> ConfigError:
    return ConfigError(
        f"strategy.module: {config.module} {why}; name a strategy class that Python can import from here "
        "(PYTHONPATH), and in strategy.arguments the keyword arguments that it takes"
    )


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
