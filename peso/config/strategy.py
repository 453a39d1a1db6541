"""The section `strategy`, which selects how later stages are trained: a name and the strategy's options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny

from peso.config.registry import Options, Registry, typed

STRATEGIES = Registry(
    "strategy",
    "peso.training.strategies",
    "peso.strategies",
    "peso.training.strategies.strategy:Strategy",
    beside=["strategy"],
)
DEFAULT, UNCHANGED = "peso", "none"  # the default, and the strategy that does not train later stages


class StrategyOptions(Options):
    """The options of a strategy. A strategy declares its own as a nested class ``Options``."""

    @property
    def foreign(self) -> list[str]:
        """The classes that these options refer to by import path. Importing them runs their code."""
        return []

    @property
    def keeper(self) -> str:
        """The name that identifies a stage's memory as belonging to this strategy."""
        return self.name

    @property
    def observing(self) -> str:
        """The option for which every forward pass is observed, so that no module may run twice in a step; ""
        if there is none."""
        return ""


StrategyConfig = Annotated[
    SerializeAsAny[StrategyOptions], typed(STRATEGIES), BeforeValidator(lambda value: expand_strategy(value))
]


def strategy_options(name: str) -> StrategyOptions:
    """The options of a strategy at their defaults."""
    options: StrategyOptions = STRATEGIES.options(name, {})
    return options


def expand_strategy(value: Any) -> Any:
    """Expand the short forms of the section: a name, or `paper`."""
    if value == "paper":
        return {"name": "peso", "weight": 2.0, "reduction": "mean"}
    if isinstance(value, str):
        return {"name": value}
    return {"name": DEFAULT, **value} if isinstance(value, Mapping) else value
