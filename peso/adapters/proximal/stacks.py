"""Groups of one size stacked into one matrix, so that a step takes a few fused operations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from peso.adapters.groups import Layout

# On a CPU a stack is no larger than its caches hold (0.5 MB a matrix): 1.5 times faster than one for all.
CPU_VALUES = 1 << 17

Placement = tuple[torch.device, torch.dtype]


def placement(tensor: Tensor) -> Placement:
    """Where a group is computed: on its own device, in float32 or better whatever its own dtype."""
    return tensor.device, torch.promote_types(tensor.dtype, torch.float32)


class Stack:
    """Groups of one size as the rows of one matrix, and a copy of their anchor: (groups, n).

    Args:
        layouts: how the tensors fill the rows; all of one form.
        place: device and dtype of the matrix.
        anchors: one of each tensor.
    """

    def __init__(self, layouts: Sequence[Layout], place: Placement, anchors: Sequence[Tensor]) -> None:
        self.layouts = layouts
        self.place = place
        self.anchor = self.gather(anchors).to(place[1]).clone()
        self._buffer: tuple[Tensor, list[int], list[Tensor]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_buffer": None}

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        """The tensors as rows (groups, n), in their own precision. Possibly a view."""
        columns = []
        for position in range(len(self.layouts[0])):
            parts = [layout[position] for layout in self.layouts]
            rows = [part.rows(tensors[part.tensor].detach()).to(self.place[0]) for part in parts]
            columns.append(rows[0] if len(rows) == 1 else torch.cat(rows))
        return columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1)

    def scatter(self, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The inverse of :meth:`gather`, of contiguous rows: number of a tensor, its values in its shape."""
        _, numbers, views = self._laid_out()
        start = rows.storage_offset()
        for number, view in zip(numbers, views, strict=True):
            part = rows.as_strided(view.shape, view.stride(), start + view.storage_offset())
            yield number, part.contiguous()

    def lay_out(self, tensors: Sequence[Tensor]) -> Tensor:
        """As :meth:`gather` in one operation, at the stack's precision, into memory that the next call
        overwrites."""
        rows, numbers, views = self._laid_out()
        torch._foreach_copy_(views, [tensors[number] for number in numbers])
        return rows

    def put_back(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite the tensors with what was laid out."""
        _, numbers, views = self._laid_out()
        torch._foreach_copy_([tensors[number] for number in numbers], views)

    @torch.no_grad()
    def displacement(self, tensors: Sequence[Tensor]) -> Tensor:
        """v − a, a fresh (groups, n). Exact for small steps: float32 or better."""
        return self.lay_out(tensors) - self.anchor

    def _laid_out(self) -> tuple[Tensor, list[int], list[Tensor]]:
        """A matrix, and of each tensor its number and its view of the matrix: made once."""
        if self._buffer is None:
            rows = torch.empty_like(self.anchor)
            columns = rows.split([part.width for part in self.layouts[0]], dim=-1)
            numbers, views = [], []
            for position, column in enumerate(columns):
                heights = column.split(self.layouts[0][position].height)
                for layout, part in zip(self.layouts, heights, strict=True):
                    numbers.append(layout[position].tensor)
                    views.append(layout[position].restored(part))
            self._buffer = rows, numbers, views
        return self._buffer


def stack_anchors(
    anchors: Sequence[Tensor], layouts: Sequence[Layout], places: Sequence[Placement]
) -> list[Stack]:
    """Copies of the anchors, stacked by size and by where their groups are computed.

    Args:
        places: of each tensor. Tensors that share groups are computed where the first is, in the best
            precision.
    """
    alike: dict[Any, list[Layout]] = defaultdict(list)
    for layout in layouts:
        device = places[layout[0].tensor][0]
        dtype = reduce(torch.promote_types, [places[part.tensor][1] for part in layout])
        alike[tuple((part.height, part.width) for part in layout), (device, dtype)].append(layout)
    stacks = []
    for (form, place), members in alike.items():
        size = sum(height * width for height, width in form)
        count = max(1, CPU_VALUES // size) if place[0].type == "cpu" else len(members)
        for start in range(0, len(members), count):
            stacks.append(Stack(members[start : start + count], place, anchors))
    return stacks


def unstack_anchors(stacks: Sequence[Stack]) -> list[Tensor]:
    """The anchors in the order of the tensors, each in its shape."""
    found = dict(pair for stack in stacks for pair in stack.scatter(stack.anchor))
    return [found[number] for number in range(len(found))]
