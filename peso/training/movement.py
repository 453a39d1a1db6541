"""How far each step moves the adapter: the optimiser's part, and what a strategy's ``after_step`` takes back.

Knows parameters before and after; knows nothing of strategies, losses or files.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from peso.training.penalty import MEASURED_EVERY


class Movement:
    """Measures one step out of ``MEASURED_EVERY`` (two copies of the adapter); the others cost nothing.

        movement = Movement(adapter)          # as the training began
        movement.begin(step)
        optimizer.step()
        movement.stepped()
        strategy.after_step(context, rate)
        movement.figures()                    # {} where the step was not measured

    Args:
        parameters: of the adapter, at the values that the training starts from.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = list(parameters)
        self._start = self._copies()
        self._before: list[Tensor] = []
        self._between: list[Tensor] = []

    def begin(self, step: int) -> None:
        measured = step % MEASURED_EVERY == 0
        self._before = self._copies() if measured else []

    def stepped(self) -> None:
        if self._before:
            self._between = self._copies()

    def figures(self) -> dict[str, float]:
        """``step_norm``: length of the optimiser's step; ``pull_norm``: of what came after it, 0 for most
        strategies; ``distance``: from the start, after both."""
        if not self._before:
            return {}
        return {
            "step_norm": _distance(self._between, self._before),
            "pull_norm": _distance(self._parameters, self._between),
            "distance": _distance(self._parameters, self._start),
        }

    def _copies(self) -> list[Tensor]:
        return [p.detach().clone() for p in self._parameters]


@torch.no_grad()
def _distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return float(get_total_norm(torch._foreach_sub(list(one), list(other))))
