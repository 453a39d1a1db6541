"""Many groups as few matrices: groups of one size are stacked, so that a step takes a few fused operations.

Knows tensors, devices and autograd; knows nothing of models, modules or weights of the penalty.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peso.continual.softmax_kl import Prior, softmax_kl
from peso.errors import TrainingError

# On a CPU a stack is no larger than its caches hold (0.5 MB a matrix): 1.5 times faster than one for all.
CPU_VALUES = 1 << 17

Placement = tuple[torch.device, torch.dtype]


def placement(tensor: Tensor) -> Placement:
    """Where a group is computed: on its own device, in float32 or better whatever its own dtype."""
    return tensor.device, torch.promote_types(tensor.dtype, torch.float32)


@dataclass(frozen=True)
class Stack:
    """Anchor of all groups of one size on one device.

    ``members``: which groups, in the order of the rows; ``anchor``: (groups, n); ``prior``: the same shape.
    """

    members: list[int]
    anchor: Tensor
    prior: Prior
    temperature: float

    def displacement(self, tensors: Sequence[Tensor]) -> Tensor:
        """(v − a)/τ of the members, a fresh (groups, n). Exact for small steps: float32 or better."""
        rows = torch.stack([tensors[member].detach().reshape(-1) for member in self.members])
        moved = rows.to(self.anchor.dtype).sub_(self.anchor)
        return moved if self.temperature == 1.0 else moved.div_(self.temperature)


def stack_anchors(anchors: Sequence[Tensor], places: Sequence[Placement], temperature: float) -> list[Stack]:
    """Copies of the anchors, stacked by size and by where their groups are computed."""
    alike = defaultdict(list)
    for number, (anchor, place) in enumerate(zip(anchors, places, strict=True)):
        alike[anchor.numel(), place].append(number)
    stacks = []
    for (size, (device, dtype)), numbers in alike.items():
        rows = max(1, CPU_VALUES // size) if device.type == "cpu" else len(numbers)
        for start in range(0, len(numbers), rows):
            members = numbers[start : start + rows]
            anchor = torch.stack(
                [anchors[member].detach().reshape(-1).to(device, dtype) for member in members]
            )
            stacks.append(Stack(members, anchor, Prior.of(anchor, temperature), temperature))
    return stacks


def unstack_anchors(stacks: Sequence[Stack]) -> list[Tensor]:
    """The flat anchors in the order of the groups (views)."""
    rows = {member: row for stack in stacks for member, row in zip(stack.members, stack.anchor, strict=True)}
    return [rows[number] for number in range(len(rows))]


def stacked_softmax_kl(stacks: Sequence[Stack], tensors: Sequence[Tensor], scale: float) -> Tensor:
    """scale · Σ_g KL(softmax(v/τ) ‖ softmax(a/τ)): a 0-d tensor on the device of the first group,
    differentiable once with respect to ``tensors``. Raises TrainingError where a second derivative is asked
    for."""
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return _StackedSoftmaxKL.apply(stacks, scale, wanted, *tensors)


class _StackedSoftmaxKL(torch.autograd.Function):
    """Forward finds value and gradient in one go; backward only scales what forward left."""

    @staticmethod
    def forward(ctx: Any, stacks: Sequence[Stack], scale: float, wanted: bool, *tensors: Tensor) -> Tensor:
        total = tensors[0].new_zeros((), dtype=placement(tensors[0])[1])
        gradients = []
        for stack in stacks:
            kl, gradient = softmax_kl(stack.displacement(tensors), stack.prior)
            total = total + kl.sum().to(total.device)
            if wanted:
                gradients.append(gradient)
        ctx.stacks, ctx.scale = stacks, scale
        ctx.like = [(tensor.shape, tensor.dtype) for tensor in tensors]
        ctx.save_for_backward(*gradients)
        return total * scale

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # the saved gradient counts as constant: a second derivative would be 0
            raise TrainingError(
                "the softmax-KL term has a first derivative only: take its gradient without create_graph=True"
            )
        gradients: list[Tensor | None] = [None] * len(ctx.like)
        for stack, saved in zip(ctx.stacks, ctx.saved_tensors, strict=True):
            # not in place: a graph that is kept may be run backward again
            rows = saved * (outer * (ctx.scale / stack.temperature)).to(saved)
            for member, row in zip(stack.members, rows.unbind(0), strict=True):
                shape, dtype = ctx.like[member]
                gradients[member] = row.view(shape).to(dtype)
        return (None, None, None, *gradients)
