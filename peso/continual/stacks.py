"""Many groups as few matrices: groups of one size are stacked, so that a step takes a few fused operations.

Knows tensors, devices and autograd; knows nothing of models, modules or weights of the penalty.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from peso.continual.grouping import Unit
from peso.errors import TrainingError

# On a CPU a stack is no larger than its caches hold (0.5 MB a matrix): 1.5 times faster than one for all.
CPU_VALUES = 1 << 17

Placement = tuple[torch.device, torch.dtype]


class Metric(Protocol):
    """What it costs the groups of one stack to be away from their anchor."""

    def penalty(self, displacement: Tensor) -> tuple[Tensor, Tensor]:
        """Of v − a (groups, n), which may be overwritten: the penalty (groups,), its gradient (groups, n)."""
        ...

    def trace(self) -> Tensor:
        """Trace of the penalty's Hessian at the anchor, (groups,)."""
        ...

    def shrink(self, displacement: Tensor, rate: float) -> None:
        """The decoupled form pulls at v − a (groups, n), in place, for ``rate`` = lr · κ."""
        ...


M = TypeVar("M", bound=Metric, covariant=True)
Gather = Callable[[Sequence[Tensor]], Tensor]  # lays tensors out as the rows of a stack: (groups, n)


def placement(tensor: Tensor) -> Placement:
    """Where a group is computed: on its own device, in float32 or better whatever its own dtype."""
    return tensor.device, torch.promote_types(tensor.dtype, torch.float32)


@dataclass(frozen=True)
class Layout:
    """How units of one form become the rows of one matrix. ``place``: where that matrix is."""

    units: list[Unit]
    place: Placement

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        """(groups, n): the rows of the units, in the tensors' own precision. Perhaps a view."""
        columns = []
        for position in range(len(self.units[0])):
            pieces = [unit[position] for unit in self.units]
            rows = [piece.rows(tensors[piece.tensor].detach()).to(self.place[0]) for piece in pieces]
            columns.append(rows[0] if len(rows) == 1 else torch.cat(rows))
        return columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1)

    def scatter(self, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The inverse of :meth:`gather`: number of a tensor, its values in its shape."""
        for number, part in self.parts(rows):
            yield number, part.contiguous()

    def parts(self, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Number of a tensor, and the place of its values in the contiguous ``rows``: a view in its shape."""
        columns = rows.split([piece.width for piece in self.units[0]], dim=-1)
        for position, column in enumerate(columns):
            heights = column.split(self.units[0][position].height)
            for unit, part in zip(self.units, heights, strict=True):
                yield unit[position].tensor, unit[position].restored(part)


class Table:
    """A matrix (groups, n) that tensors are laid out in, again and again: its views are made once, so that a
    step takes one call and not a few operations a tensor."""

    def __init__(self, layout: Layout, rows: Tensor) -> None:
        self.rows = rows
        numbers, parts = zip(*layout.parts(rows), strict=True)
        self._numbers: list[int] = list(numbers)
        self._parts: list[Tensor] = list(parts)
        self._places = [(part.shape, part.stride(), part.storage_offset()) for part in self._parts]
        self._contiguous = all(part.is_contiguous() for part in self._parts)

    def lay_out(self, tensors: Sequence[Tensor]) -> Tensor:
        """The rows, overwritten with the tensors' values."""
        torch._foreach_copy_(self._parts, self.own(tensors))
        return self.rows

    def put_back(self, tensors: Sequence[Tensor]) -> None:
        """The tensors, overwritten with what the rows hold."""
        torch._foreach_copy_(self.own(tensors), self._parts)

    def own(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensors[number] for number in self._numbers]

    def parts_of(self, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
        """As :meth:`Layout.scatter`, of another contiguous matrix."""
        for number, place in zip(self._numbers, self._places, strict=True):
            part = rows.as_strided(*place)
            yield number, part if self._contiguous else part.contiguous()


@dataclass
class Stack(Generic[M]):
    """Anchor of groups of one size on one device. ``anchor``: (groups, n), float32 or better."""

    layout: Layout
    anchor: Tensor
    metric: M
    _table: Table | None = field(default=None, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_table": None}

    @property
    def table(self) -> Table:
        """Made when it is first needed; what it holds lasts until somebody else lays something out."""
        if self._table is None:
            self._table = Table(self.layout, torch.empty_like(self.anchor))
        return self._table

    @torch.no_grad()
    def displacement(self, tensors: Sequence[Tensor]) -> Tensor:
        """v − a, a fresh (groups, n). Exact for small steps: float32 or better."""
        return self.table.lay_out(tensors) - self.anchor


def stack_anchors(
    anchors: Sequence[Tensor],
    units: Sequence[Unit],
    places: Sequence[Placement],
    make_metric: Callable[[Tensor, Gather], M],
) -> list[Stack[M]]:
    """Copies of the anchors, stacked by size and by where their groups are computed.

    Args:
        places: of each tensor. A unit of several is computed where the first is, in the best precision.
        make_metric: of a stack's anchor (groups, n).
    """
    alike: dict[Any, list[Unit]] = defaultdict(list)
    for unit in units:
        device = places[unit[0].tensor][0]
        dtype = reduce(torch.promote_types, [places[piece.tensor][1] for piece in unit])
        alike[tuple((piece.height, piece.width) for piece in unit), (device, dtype)].append(unit)
    stacks = []
    for (form, place), members in alike.items():
        size = sum(height * width for height, width in form)
        count = max(1, CPU_VALUES // size) if place[0].type == "cpu" else len(members)
        for start in range(0, len(members), count):
            layout = Layout(members[start : start + count], place)
            anchor = layout.gather(anchors).to(place[1]).clone()
            stacks.append(Stack(layout, anchor, make_metric(anchor, layout.gather)))
    return stacks


def unstack_anchors(stacks: Sequence[Stack[Metric]]) -> list[Tensor]:
    """The anchors in the order of the tensors, each in its shape."""
    found = dict(pair for stack in stacks for pair in stack.layout.scatter(stack.anchor))
    return [found[number] for number in range(len(found))]


def stacked_penalty(stacks: Sequence[Stack[Metric]], tensors: Sequence[Tensor], scale: float) -> Tensor:
    """scale · Σ_g penalty: a 0-d tensor on the device of the first tensor, differentiable once with respect
    to ``tensors``. Raises TrainingError where a second derivative is asked for."""
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return _StackedPenalty.apply(stacks, scale, wanted, *tensors)


@torch.no_grad()
def shrink(stacks: Sequence[Stack[Metric]], tensors: Sequence[Tensor], rate: float) -> None:
    """The decoupled form, in place: every tensor becomes its anchor plus its shrunk displacement."""
    for stack in stacks:
        moved = stack.table.lay_out(tensors).sub_(stack.anchor)
        stack.metric.shrink(moved, rate)
        moved.add_(stack.anchor)
        stack.table.put_back(tensors)


class _StackedPenalty(torch.autograd.Function):
    """Forward finds value and gradient in one go; backward only scales what forward left."""

    @staticmethod
    def forward(
        ctx: Any, stacks: Sequence[Stack[Metric]], scale: float, wanted: bool, *tensors: Tensor
    ) -> Tensor:
        total = tensors[0].new_zeros((), dtype=placement(tensors[0])[1])
        gradients = []
        for stack in stacks:
            penalty, gradient = stack.metric.penalty(stack.displacement(tensors))
            total = total + penalty.sum().to(total.device)
            if wanted:
                gradients.append(gradient)
        ctx.stacks, ctx.scale = stacks, scale
        ctx.places = [(tensor.device, tensor.dtype) for tensor in tensors]
        ctx.save_for_backward(*gradients)
        return total * scale

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # the saved gradient counts as constant: a second derivative would be 0
            raise TrainingError(
                "a proximal term has a first derivative only: take its gradient without create_graph=True"
            )
        gradients: list[Tensor | None] = [None] * len(ctx.places)
        for stack, saved in zip(ctx.stacks, ctx.saved_tensors, strict=True):
            # not in place: a graph that is kept may be run backward again
            rows = saved * (outer * ctx.scale).to(saved)
            here = (rows.device, rows.dtype)
            for number, value in stack.table.parts_of(rows):
                place = ctx.places[number]
                gradients[number] = value if place == here else value.to(*place)
        return (None, None, None, *gradients)
