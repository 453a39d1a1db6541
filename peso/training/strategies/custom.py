"""``custom``: a class that Python can import, without being installed as a part of peso."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from pydantic import Field

from peso.config.parsing import shown
from peso.errors import ConfigError
from peso.training.strategies.strategy import Strategy


class Custom(Strategy):
    """A strategy of your own: ``module`` is a class that Python can import, made with ``arguments``."""

    name = "custom"

    class Options(Strategy.Options):
        module: str = Field(description="e.g. my_package.my_strategy.MyStrategy")
        arguments: dict[str, Any] = Field(default={}, description="given to it as keyword arguments")

        @property
        def foreign(self) -> list[str]:
            return [self.module]

        @property
        def keeper(self) -> str:
            return self.module

    @classmethod
    def of(cls, options: Any) -> Strategy:
        """
        Raises:
            ConfigError: a class that cannot be imported, is not a strategy, or takes other arguments.
        """
        module, _, name = options.module.rpartition(".")
        try:
            found = getattr(import_module(module or name), name)
        except Exception as error:  # whatever a module does when it is imported
            raise _refused(options, f"cannot be imported ({_cause(error)})") from error
        if not (isinstance(found, type) and issubclass(found, Strategy)):
            raise _refused(options, "is not a subclass of peso.training.strategies.strategy.Strategy")
        try:
            return found(**options.arguments)
        except Exception as error:
            why = f"cannot be made with {shown(options.arguments)} ({_cause(error)})"
            raise _refused(options, why) from error


def _refused(options: Any, why: str) -> ConfigError:
    return ConfigError(
        f"strategy.module: {options.module} {why}; name a strategy class that Python can import from here "
        "(PYTHONPATH), and in strategy.arguments the keyword arguments that it takes"
    )


def _cause(error: Exception) -> str:
    return str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
