"""How later stages are learned: the section `strategy`, a name and the options of that strategy."""

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
DEFAULT, UNCHANGED = "peso", "none"  # where none is given; where no later stage is learned


class StrategyOptions(Options):
    """What a configuration says of a strategy. A strategy declares its own as a nested class ``Options``."""

    @property
    def foreign(self) -> list[str]:
        """Classes that these options name by where Python finds them: importing them runs their code."""
        return []

    @property
    def keeper(self) -> str:
        """By what name a stage's memory is known to be this strategy's own."""
        return self.name

    @property
    def observing(self) -> str:
        """The option by which every forward pass is observed, so that no module may run twice; or ""."""
        return ""


StrategyConfig = Annotated[
    SerializeAsAny[StrategyOptions],
    typed(STRATEGIES),
    BeforeValidator(lambda value: expand_strategy(value)),
]


def strategy_options(name: str) -> StrategyOptions:
    """The options of a strategy at their defaults."""
    options: StrategyOptions = STRATEGIES.options(name, {})
    return options


def expand_strategy(value: Any) -> Any:
    """The short forms of the section written out: a name, or `paper`."""
    if value == "paper":
        return {"name": "peso", "weight": 2.0, "reduction": "mean"}
    if isinstance(value, str):
        return {"name": value}
    return {"name": DEFAULT, **value} if isinstance(value, Mapping) else value
