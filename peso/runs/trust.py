"""The strategy of a workspace. Its class is imported only if the user named it in this call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peso.errors import ConfigError
from peso.training.strategies.strategy import Strategy, make_strategy

if TYPE_CHECKING:
    from peso.runs.workspace import Workspace


def strategy_of(workspace: Workspace) -> Strategy:
    """A fresh strategy, as configured.

    Raises:
        ConfigError: a class of somebody's own that nobody has named in this call, or that cannot be made.
    """
    for module in set(workspace.config.strategy.foreign) - workspace.trusted:
        raise ConfigError(
            f"strategy: {workspace.root} names the class {module}, and importing it runs its code. If "
            f"you trust it, name it: --trust {module} (in Python: trust=[{module!r}])"
        )
    return make_strategy(workspace.config.strategy)
