"""Autograd functions for penalties whose gradients are computed together with their values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peso.adapters.groups import Stack, placement
from peso.adapters.proximal.metrics import Metric, Prior, softmax_kl
from peso.errors import TrainingError


def stacked_penalty(
    stacks: Sequence[tuple[Stack, Metric]], scale: float, tensors: Sequence[Tensor]
) -> Tensor:
    """scale · Σ_g penalty, 0-d, differentiable once.

    Args:
        stacks: the stacks of groups with their metrics.
        scale: a factor.
        tensors: the current tensors.
    """
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    value: Tensor = _StackedPenalty.apply(stacks, scale, wanted, *tensors)  # type: ignore[no-untyped-call]
    return value


class _StackedPenalty(torch.autograd.Function):
    """scale · Σ_g penalty, on the device of the first tensor. The forward pass computes value and gradient
    together, and the backward pass only scales the saved gradient."""

    @staticmethod
    def forward(
        ctx: Any, stacks: Sequence[tuple[Stack, Metric]], scale: float, wanted: bool, *tensors: Tensor
    ) -> Tensor:
        total = tensors[0].new_zeros((), dtype=placement(tensors[0])[1])
        gradients = []
        for stack, metric in stacks:
            penalty, gradient = metric.penalty(stack.displacement(tensors))
            total = total + penalty.sum().to(total.device)
            if wanted:
                gradients.append(gradient)
        ctx.stacks, ctx.scale = stacks, scale
        ctx.places = [(tensor.device, tensor.dtype) for tensor in tensors]
        ctx.save_for_backward(*gradients)
        return total * scale

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative()
        gradients: list[Tensor | None] = [None] * len(ctx.places)
        for (stack, _), saved in zip(ctx.stacks, ctx.saved_tensors, strict=True):
            # not in place, because a retained graph may be used again
            rows = saved * (outer * ctx.scale).to(saved)
            here = (rows.device, rows.dtype)
            for number, value in stack.scatter(rows):
                place = ctx.places[number]
                gradients[number] = value if place == here else value.to(*place)
        return (None, None, None, *gradients)


def output_kl(
    current: tuple[Tensor, Tensor], anchor: tuple[Tensor, Tensor], x: Tensor, scaling: float
) -> Tensor:
    """Σ_tokens KL(softmax(s·B·A·x) ‖ softmax(s·B_a·A_a·x)) of one module, 0-d, differentiable once.

    Args:
        current: the current A (rank, in) and B (out, rank).
        anchor: A and B of the anchor.
        x: (tokens, in), the inputs, which count as constant.
        scaling: s.
    """
    value: Tensor = _OutputKL.apply(*current, *anchor, x, scaling)  # type: ignore[no-untyped-call]
    return value


class _OutputKL(torch.autograd.Function):
    """The KL of one module, summed over tokens. The forward pass computes value and gradients, and the
    backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, a_anchor: Tensor, b_anchor: Tensor, x: Tensor, scaling: float
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            dtype = a_anchor.dtype
            wide_a, wide_b, x = a.to(dtype), b.to(dtype), x.to(dtype)
            inner = x @ wide_a.T  # (tokens, rank)
            # s·(B·A − B_a·A_a)·x, without a difference of two nearly equal outputs
            moved = inner @ (wide_b - b_anchor).T + (x @ (wide_a - a_anchor).T) @ b_anchor.T
            prior = torch.softmax(scaling * ((x @ a_anchor.T) @ b_anchor.T), -1)  # (tokens, out)
            kl, outer = softmax_kl(moved.mul_(scaling), Prior(prior, prior.sum(-1, keepdim=True)))
            outer.mul_(scaling)
            ctx.save_for_backward((outer @ wide_b).T @ x, outer.T @ inner)
        ctx.dtypes = a.dtype, b.dtype
        return kl.sum()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative()
        of_a, of_b = ctx.saved_tensors
        return (of_a * outer).to(ctx.dtypes[0]), (of_b * outer).to(ctx.dtypes[1]), None, None, None, None


@torch.no_grad()
def output_trace(a: Tensor, b: Tensor, x: Tensor, scaling: float) -> Tensor:
    """The trace of the Hessian of KL(softmax(s·B·A·x) ‖ ·) at A and B, summed over the tokens, 0-d.

    With p = softmax(s·B·A·x), the Hessian in the output is F = diag(p) − p·pᵀ, and that in the parameters is
    JᵀFJ. Its trace is s²·‖A·x‖²·tr(F) for B, and s²·‖x‖²·Σ_k B_kᵀ·F·B_k over the columns of B for A.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(a.dtype)
        inner = x @ a.T  # (tokens, rank)
        p = torch.softmax(scaling * (inner @ b.T), -1)  # (tokens, out)
        of_b = inner.square().sum(-1) * (p * (1 - p)).sum(-1)
        of_a = x.square().sum(-1) * (p @ b.square() - (p @ b).square()).sum(-1)
        return scaling**2 * (of_a + of_b).sum()


def check_first_derivative() -> None:
    """Check, in a backward pass, that no second derivative is needed. It would be wrong (0), because the
    saved gradient counts as constant.

    Raises:
        TrainingError: a second derivative is needed.
    """
    if torch.is_grad_enabled():
        raise TrainingError(
            "a proximal term has only a first derivative: compute its gradient without create_graph=True"
        )
