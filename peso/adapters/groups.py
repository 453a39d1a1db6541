"""The tensors of a model's PEFT adapter, and the groups that their values form.

Groups of the same size are stacked into one matrix, so that a step needs only a few fused operations.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peso.errors import TrainingError

PAST = "past"  # the adapter with the frozen adapters of earlier stages; it is never trained


@dataclass(frozen=True)
class Group:
    """A or B of one module.

    Attributes:
        module: the name of the module in the model without its wrappers, e.g. ``model.layers.0.mlp.up_proj``.
        factor: ``A`` or ``B``; empty for a plain tensor.
        tensor: the parameter itself, with its original shape.
    """

    module: str
    factor: str
    tensor: Tensor

    @property
    def name(self) -> str:
        return f"{self.module}.lora_{self.factor}" if self.factor else self.module

    def snapshot(self) -> Group:
        """A copy of the group that later steps do not change."""
        return Group(self.module, self.factor, self.tensor.detach().clone())


Source = nn.Module | Iterable[nn.Module | Tensor | Group]


def find_groups(source: Source, adapter: str | None = None) -> list[Group]:
    """The groups of a model in the order of ``named_modules``, A before B.

    Visiting all modules costs more than most penalties. So a training loop should find the groups once per
    stage and pass them instead of the model. They stay valid as long as the model keeps its adapter and
    parameters::

        groups = find_groups(model)
        loss = loss + term(groups)    # in every step

    Args:
        source: a model with PEFT LoRA layers anywhere in it (it may be wrapped by DDP or ``torch.compile``),
            a list of tensors, or a list of both, such as ``[model, vocabulary.input_rows]``. Each plain
            tensor is a group and a module by itself. Groups that were already found are returned unchanged.
        adapter: the name of the adapter; by default the active one. An adapter named ``past`` may also be
            active.

    Raises:
        TrainingError: there is no LoRA layer or no such adapter, several adapters are active, or a tensor is
            empty.
        TypeError: the source is neither a model nor a list of models and tensors.
    """
    if isinstance(source, list) and source and all(isinstance(part, Group) for part in source):
        return list(source)  # this happens in every step, so nothing else is checked
    groups: list[Group] = []
    tensors = 0
    for part in _parts(source):
        if isinstance(part, Group):
            groups.append(part)
        elif isinstance(part, nn.Module):
            groups.extend(_of_model(part, adapter))
        else:
            groups.append(Group(f"tensor {tensors}", "", part))
            tensors += 1
    for group in groups:
        if group.tensor.numel() == 0:
            raise TrainingError(
                f"{group.name} has no values. Gather parameters that are sharded or not materialized before "
                "anchoring them"
            )
    return groups


def find_layers(model: nn.Module, adapter: str | None = None) -> tuple[str, dict[str, Any]]:
    """The name of the adapter, and the PEFT layers that have it, by the name of their module.

    Raises:
        TrainingError: there is no LoRA layer or no such adapter, or several adapters are active.
    """
    layers = lora_layers(model)
    if not layers:
        raise TrainingError(
            f"no LoRA adapter found in {type(model).__name__}: "
            "attach one first with peft.get_peft_model(model, peft.LoraConfig(...))"
        )
    name = adapter or _active(layers.values())
    found = {
        path: layer for path, layer in layers.items() if name in (*layer.lora_A, *layer.lora_embedding_A)
    }
    if not found:
        known = sorted({n for layer in layers.values() for n in (*layer.lora_A, *layer.lora_embedding_A)})
        raise TrainingError(f"the model has no LoRA adapter {name!r}; it has {', '.join(known)}")
    return name, found


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """The PEFT LoRA layers of a model, by the name of their module without wrappers."""
    from peft.tuners.lora import LoraLayer  # PEFT is loaded only for models

    return {_plain(path): layer for path, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def shapes(groups: Sequence[Group]) -> dict[str, tuple[int, ...]]:
    """The name and shape of every group, in order. They must be the same for an anchor and a model."""
    return {group.name: tuple(group.tensor.shape) for group in groups}


def check_same_groups(anchored: dict[str, tuple[int, ...]], groups: Sequence[Group]) -> None:
    """Check that groups have the names and shapes of the anchor.

    Args:
        anchored: the :func:`shapes` of the anchor.
        groups: the current groups.

    Raises:
        TrainingError: they differ; the message names the first difference.
    """
    current = shapes(groups)
    if list(current.items()) == list(anchored.items()):
        return
    missing = [name for name in anchored if name not in current]
    added = [name for name in current if name not in anchored]
    if missing or added:
        raise TrainingError(
            "the anchor was taken from other modules: "
            f"it has {len(anchored)} groups, but the model has {len(current)}; "
            f"{_first('only in the anchor', missing)}{_first('only in the model', added)}"
            "call anchor(model) with the adapter that is trained now"
        )
    for name, shape in anchored.items():
        if shape != current[name]:
            raise TrainingError(
                f"the anchor of {name} has shape {shape}, but the model's has {current[name]}, because the "
                "rank or the backbone is different. Keep both for all stages, or call anchor(model) with the "
                "adapter that is trained now"
            )
    raise TrainingError(
        "the anchor's modules are in another order than the model's: call anchor(model) again"
    )


def _first(what: str, names: list[str]) -> str:
    return f"{what}: {names[0]}{' …' if len(names) > 1 else ''}; " if names else ""


def _parts(source: Source) -> list[nn.Module | Tensor | Group]:
    if isinstance(source, nn.Module):
        return [source]
    parts = list(source) if isinstance(source, Iterable) and not isinstance(source, Tensor | str) else []
    wrong = [part for part in parts if not isinstance(part, Tensor | nn.Module | Group)]
    if wrong or not parts:
        got = type(wrong[0] if wrong else source).__name__
        raise TypeError(f"expected a model or a list of models and tensors, got {got}")
    return parts


def _of_model(model: nn.Module, adapter: str | None) -> list[Group]:
    name, layers = find_layers(model, adapter)
    groups = []
    for module, layer in layers.items():
        for factor, holders in (
            ("A", (layer.lora_A, layer.lora_embedding_A)),
            ("B", (layer.lora_B, layer.lora_embedding_B)),
        ):
            for holder in holders:
                if name in holder:
                    matrix = holder[name]
                    groups.append(Group(module, factor, getattr(matrix, "weight", matrix)))
    return groups


def _active(layers: Iterable[Any]) -> str:
    active = sorted({name for layer in layers for name in layer.active_adapters})
    if len(active) > 1:
        active = [name for name in active if name != PAST]
    if len(active) != 1:
        raise TrainingError(
            f"{len(active)} adapters are active ({', '.join(active)}): "
            "activate one with model.set_adapter(name), or select one with adapter=name"
        )
    return active[0]


def _plain(path: str) -> str:
    """The path without the wrappers of PEFT, DDP and ``torch.compile``, so that an anchor that was taken
    before wrapping is still valid."""
    return path.rpartition("base_model.model.")[2].replace("_orig_mod.", "").removeprefix("module.")


# --- which values form a group of a penalty ---------------------------------------------------------------

Grouping = Literal["factor", "module", "rank", "all"]


@dataclass(frozen=True)
class Piece:
    """The part of the rows of a matrix that belongs to one tensor.

    Attributes:
        tensor: the index of the tensor in the list of all tensors.
        shape: its shape.
        rank_axis: the axis along which it is split into one row per rank; None if it is a single row.
    """

    tensor: int
    shape: tuple[int, ...]
    rank_axis: int | None = None

    @property
    def height(self) -> int:
        return 1 if self.rank_axis is None else self.shape[self.rank_axis]

    @property
    def width(self) -> int:
        return math.prod(self.shape) // self.height

    def rows(self, tensor: Tensor) -> Tensor:
        """The tensor as rows (height, width), as a view if possible."""
        if self.rank_axis is None:
            return tensor.reshape(1, -1)
        return tensor.movedim(self.rank_axis, 0).flatten(1)

    def restored(self, rows: Tensor) -> Tensor:
        """The inverse of :meth:`rows`: a view."""
        if self.rank_axis is None:
            return rows.view(self.shape)
        others = [size for axis, size in enumerate(self.shape) if axis != self.rank_axis]
        return rows.unflatten(-1, others).movedim(0, self.rank_axis)


Layout = tuple[Piece, ...]
"""Tensors whose rows, concatenated, are the groups of a penalty: one group, or one per rank."""


def layouts(groups: Sequence[Group], grouping: Grouping) -> list[Layout]:
    """How tensors form the groups of a penalty.

    Tensors outside of LoRA modules, such as the rows of a vocabulary, are modules by themselves, without
    ranks.

    Args:
        grouping: ``factor``: each tensor is a group. ``module``: A and B of a module are one group. ``rank``:
            row i of A and column i of B are a group, for every rank i of every module. ``all``: all values
            are one group.

    Raises:
        TrainingError: the grouping is ``rank``, but no tensor belongs to a LoRA module.
    """
    if grouping == "rank" and not any(group.factor for group in groups):
        raise TrainingError("groups='rank' needs a model with LoRA modules: plain tensors have no ranks")
    # A is (rank, in, …) and B is (out, rank, …), for linear, embedding and convolution layers
    axes = {"A": 0, "B": 1} if grouping == "rank" else {}
    members: dict[Any, list[Piece]] = defaultdict(list)
    for number, group in enumerate(groups):
        owner = {"factor": number, "all": "all"}.get(grouping, group.module)
        members[owner].append(Piece(number, tuple(group.tensor.shape), axes.get(group.factor)))
    return [tuple(pieces) for pieces in members.values()]


# On a CPU a stack fits in its caches (0.5 MB per matrix), which is 1.5 times faster than one stack for all.
CPU_VALUES = 1 << 17

Placement = tuple[torch.device, torch.dtype]


def placement(tensor: Tensor) -> Placement:
    """The device and dtype in which a group is computed: its own device, and at least float32."""
    return tensor.device, torch.promote_types(tensor.dtype, torch.float32)


class Stack:
    """Groups of the same size as the rows of one matrix, with a copy of their anchor (groups, n).

    Args:
        layouts: the layout of each row; all have the same form.
        place: the device and dtype of the matrix.
        anchors: the anchor of each tensor.
    """

    def __init__(self, layouts: Sequence[Layout], place: Placement, anchors: Sequence[Tensor]) -> None:
        self.layouts = layouts
        self.place = place
        self.anchor = self.gather(anchors).to(place[1]).clone()
        self._buffer: tuple[Tensor, list[int], list[Tensor]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_buffer": None}

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        """The tensors as rows (groups, n), in their own precision, possibly as a view."""
        columns = []
        for position in range(len(self.layouts[0])):
            parts = [layout[position] for layout in self.layouts]
            rows = [part.rows(tensors[part.tensor].detach()).to(self.place[0]) for part in parts]
            columns.append(rows[0] if len(rows) == 1 else torch.cat(rows))
        return columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1)

    def scatter(self, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The inverse of :meth:`gather` for contiguous rows: the index of each tensor, and its values in its
        shape."""
        _, numbers, views = self._laid_out()
        start = rows.storage_offset()
        for number, view in zip(numbers, views, strict=True):
            part = rows.as_strided(view.shape, view.stride(), start + view.storage_offset())
            yield number, part.contiguous()

    def lay_out(self, tensors: Sequence[Tensor]) -> Tensor:
        """The same as :meth:`gather`, in one operation and in the precision of the stack. The next call
        overwrites the result."""
        rows, numbers, views = self._laid_out()
        torch._foreach_copy_(views, [tensors[number] for number in numbers])
        return rows

    def put_back(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite the tensors with the values in the matrix that :meth:`lay_out` returned."""
        _, numbers, views = self._laid_out()
        torch._foreach_copy_([tensors[number] for number in numbers], views)

    @torch.no_grad()
    def displacement(self, tensors: Sequence[Tensor]) -> Tensor:
        """v − a in new memory, (groups, n). It is exact for small steps, in float32 or better."""
        return self.lay_out(tensors) - self.anchor

    def _laid_out(self) -> tuple[Tensor, list[int], list[Tensor]]:
        """A matrix for the groups, created once, with the index of each tensor and its view of the matrix."""
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
    """Copy the anchors, stacked by the size and placement of their groups.

    Args:
        anchors: the anchor of each tensor.
        layouts: the groups, see :func:`layouts`.
        places: the placement of each tensor. Groups of several tensors are computed on the device of the
            first tensor, in the highest precision.
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
    """The anchors in the order of the tensors, with their shapes."""
    found = dict(pair for stack in stacks for pair in stack.scatter(stack.anchor))
    return [found[number] for number in range(len(found))]
