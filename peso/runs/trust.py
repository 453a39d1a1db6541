"""The strategy of a workspace. A custom class is imported only if the caller trusts it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peso.errors import ConfigError
from peso.training.strategies.strategy import Strategy, make_strategy

if TYPE_CHECKING:
    from peso.runs.workspace import Workspace


def strategy_of(workspace: Workspace) -> Strategy:
    """Create the configured strategy.

    Raises:
        ConfigError: a custom class that the caller does not trust, or that cannot be created.
    """
    for module in set(workspace.config.strategy.foreign) - workspace.trusted:
        raise ConfigError(
            f"strategy: {workspace.root} names the class {module}, and importing it runs its code. If "
            f"you trust it, allow it with --trust {module} (in Python: trust=[{module!r}])"
        )
    return make_strategy(workspace.config.strategy)
