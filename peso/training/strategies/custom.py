"""``custom``: a strategy class of your own, given by its import path."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from pydantic import Field

from peso.config.parsing import shown
from peso.errors import ConfigError
from peso.training.strategies.strategy import Strategy


class Custom(Strategy):
    """A strategy of your own: the class at the import path ``module``, created with ``arguments``."""

    name = "custom"

    class Options(Strategy.Options):
        module: str = Field(
            description="import path of the class, for example my_package.my_strategy.MyStrategy"
        )
        arguments: dict[str, Any] = Field(default={}, description="keyword arguments of the class")

        @property
        def foreign(self) -> list[str]:
            return [self.module]

        @property
        def keeper(self) -> str:
            return self.module

    @classmethod
    def of(cls, options: Any) -> Strategy:
        """Create an instance of the class that the options name.

        Raises:
            ConfigError: the class cannot be imported, is not a strategy, or does not accept the arguments.
        """
        module, _, name = options.module.rpartition(".")
        try:
            found = getattr(import_module(module or name), name)
        except Exception as error:  # importing a module can raise anything
            raise _refused(options, f"cannot be imported ({_cause(error)})") from error
        if not (isinstance(found, type) and issubclass(found, Strategy)):
            raise _refused(options, "is not a subclass of peso.training.strategies.strategy.Strategy")
        try:
            return found(**options.arguments)
        except Exception as error:
            why = f"cannot be created with {shown(options.arguments)} ({_cause(error)})"
            raise _refused(options, why) from error


def _refused(options: Any, why: str) -> ConfigError:
    return ConfigError(
        f"strategy.module: {options.module} {why}; give the import path of a strategy class, such as "
        "my_package.my_strategy.MyStrategy, and its keyword arguments in strategy.arguments. Add the folder "
        "of the package to PYTHONPATH if necessary"
    )


def _cause(error: Exception) -> str:
    return str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
