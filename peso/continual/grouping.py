"""Which values make one group of a penalty: a factor, a module, a rank, or everything.

Knows which tensors belong to which module; knows nothing of penalties or anchors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from peso.continual.groups import Group
from peso.errors import TrainingError

Grouping = Literal["factor", "module", "rank", "all"]


@dataclass(frozen=True)
class Piece:
    """One tensor's share in a unit.

    ``tensor``: its number in the list of all tensors; ``rank_axis``: the axis along which it is cut into one
    row a rank; None: it is one row.
    """

    tensor: int
    shape: tuple[int, ...]
    rank_axis: int | None = None

    @property
    def height(self) -> int:
        return 1 if self.rank_axis is None else self.shape[self.rank_axis]

    @property
    def width(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count // self.height

    def rows(self, tensor: Tensor) -> Tensor:
        """(height, width), a view where the layout allows it."""
        if self.rank_axis is None:
            return tensor.reshape(1, -1)
        return tensor.movedim(self.rank_axis, 0).flatten(1)

    def restored(self, rows: Tensor) -> Tensor:
        """The inverse of :meth:`rows`: a view."""
        if self.rank_axis is None:
            return rows.view(self.shape)
        others = [size for axis, size in enumerate(self.shape) if axis != self.rank_axis]
        return rows.unflatten(-1, others).movedim(0, self.rank_axis)


Unit = tuple[Piece, ...]
"""Tensors whose rows, side by side, are groups: one group, or one a rank."""


def find_units(groups: Sequence[Group], grouping: Grouping) -> list[Unit]:
    """The groups of a penalty.

    ``factor``: each tensor is one; ``module``: A and B of a module flattened together; ``rank``: row i of A
    with column i of B, for every rank i of every module; ``all``: all values together. Tensors that belong
    to no LoRA module (rows of a vocabulary, say) are modules of their own; a single one has no ranks and
    stays whole.

    Raises:
        TrainingError: ``rank`` where no tensor belongs to a LoRA module.
    """
    if grouping == "factor":
        return [(Piece(number, tuple(group.tensor.shape)),) for number, group in enumerate(groups)]
    if grouping == "all":
        return [tuple(Piece(number, tuple(group.tensor.shape)) for number, group in enumerate(groups))]
    if grouping == "rank" and not any(group.factor for group in groups):
        raise TrainingError("groups='rank' needs a model with LoRA modules: plain tensors have no ranks")
    modules: dict[str, list[Piece]] = defaultdict(list)
    for number, group in enumerate(groups):
        # A is (rank, in, …), B (out, rank, …), of linear, embedding and convolution layers alike
        axis = {"A": 0, "B": 1}.get(group.factor) if grouping == "rank" else None
        modules[group.module].append(Piece(number, tuple(group.tensor.shape), axis))
    return [tuple(pieces) for pieces in modules.values()]
