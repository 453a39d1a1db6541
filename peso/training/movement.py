"""How far each step moves the adapter: the optimizer's part, and the part that ``after_step`` takes back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peso.training.penalty import MEASURED_EVERY


class Movement:
    """Measures one step out of ``MEASURED_EVERY`` (three copies of the adapter); the others cost nothing.

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
        self._parameters = [p.detach() for p in parameters]
        self._measured = False
        self._start, self._one, self._other = (_Snapshot(self._parameters) for _ in range(3))
        self._start.take()

    def begin(self, step: int) -> None:
        self._measured = step % MEASURED_EVERY == 0 and bool(self._parameters)
        if self._measured:
            self._one.take()

    def stepped(self) -> None:
        if self._measured:
            self._other.take()

    def figures(self) -> dict[str, float]:
        """``step_norm``: length of the optimizer's step; ``pull_norm``: of what came after it, 0 for most
        strategies; ``distance``: from the start, after both."""
        if not self._measured:
            return {}
        stepped = self._other.distance(self._one)
        self._one.take()
        return {
            "step_norm": stepped,
            "pull_norm": self._one.distance(self._other),
            "distance": self._one.distance(self._start),
        }


class _Snapshot:
    """Values of many tensors, one behind the other, so that a distance takes two operations and not two a
    tensor. Float32 or better, where the first tensor is."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = list(parameters)
        sizes = [p.numel() for p in parameters]
        first = parameters[0] if parameters else torch.zeros(0)
        dtype = torch.promote_types(first.dtype, torch.float32)
        self.values = torch.zeros(sum(sizes), dtype=dtype, device=first.device)
        parts = self.values.split(sizes)
        self._parts = [part.view(p.shape) for part, p in zip(parts, parameters, strict=True)]

    def take(self) -> None:
        """As the tensors stand now."""
        if self._parts:
            torch._foreach_copy_(self._parts, self._parameters)

    def distance(self, other: _Snapshot) -> float:
        return float(torch.linalg.vector_norm(self.values - other.values))
