"""A sketch of Σ on a real adapter: gradients of single examples, laid out as the anchor of a term sees them.

Knows a term's groups and the gradients of losses; the mathematics is in ``peso/continual/directions.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peso.continual.directions import Directions, GroupMetric
from peso.continual.grouping import find_units
from peso.continual.groups import Group, Source
from peso.continual.proximal.anchored import AnchoredTerm
from peso.continual.proximal.metrics import DiagonalMetric, SoftmaxMetric
from peso.continual.proximal.term import check_trained
from peso.continual.stacks import Layout, Stack, stack_anchors
from peso.errors import TrainingError

BLOCK = 1 << 14  # values at a time in float64
ON_CPU = (torch.device("cpu"), torch.float32)


@dataclass(frozen=True)
class Part:
    """Groups of one size. ``gradients``: float32 (examples, groups, n); ``rates``: w of the decoupled
    form (groups, n)."""

    layout: Layout
    metric: GroupMetric
    rates: Tensor
    gradients: Tensor

    def blocks(self) -> Iterator[tuple[slice, GroupMetric, Tensor]]:
        """Some groups at a time: their place, metric and duals, float64."""
        _, groups, size = self.gradients.shape
        step = max(1, BLOCK // size)
        for start in range(0, groups, step):
            place = slice(start, start + step)
            metric = GroupMetric(self.metric.weights[place], self.metric.scale[place], self.metric.centred)
            yield place, metric, metric.dual(self.gradients[:, place].double())


@dataclass(frozen=True)
class Carried:
    """Of each direction: ``shares`` (k, tensors) of ‖q‖²_H = 1; ``inertia``: qᵀDq (k,), D what Adam divides
    gradients by; ``pull``: qᵀDWq (k,), W the weights of the decoupled form."""

    shares: Tensor
    inertia: Tensor
    pull: Tensor


class Sketch:
    """Gradients of ``examples`` losses, each of one target of ``tokens`` tokens. ``groups``: the anchor."""

    def __init__(self, groups: Sequence[Group], parts: Sequence[Part], tokens: float) -> None:
        self.groups = groups
        self.tokens = tokens
        self.parts = parts
        self.examples = len(parts[0].gradients)

    @classmethod
    def of(
        cls,
        term: AnchoredTerm,
        source: Source,
        losses: Iterable[Tensor],
        tokens: float,
        anchors: Sequence[Tensor] | None = None,
    ) -> Sketch:
        """
        Args:
            term: anchored.
            source: as given to its ``anchor``; gradients are taken where its parameters are now.
            losses: see :meth:`peso.continual.proximal.term.Term.calibrate`.
            anchors: where the term is anchored; None: where the parameters are now.

        Raises:
            TrainingError: a frozen group, or no losses.
        """
        groups = term.groups_of(source)
        check_trained(groups)
        tensors = [group.tensor for group in groups]
        anchors = [tensor.detach() for tensor in tensors] if anchors is None else anchors
        stacks = stack_anchors(anchors, find_units(groups, term.groups), [ON_CPU] * len(groups), term.metric)
        rows: list[list[Tensor]] = [[] for _ in stacks]
        for loss in losses:
            found = torch.autograd.grad(loss, tensors, allow_unused=True)
            gradients = [
                torch.zeros_like(tensor) if gradient is None else gradient
                for tensor, gradient in zip(tensors, found, strict=True)
            ]
            for place, stack in zip(rows, stacks, strict=True):
                place.append(stack.layout.gather(gradients).float().clone())
        if not rows[0]:
            raise TrainingError("there are no examples to take gradients of")
        divisor = len({group.module for group in groups}) if term.reduction == "mean" else 1
        parts = []
        for stack in stacks:
            parts.append(_part(stack, torch.stack(rows.pop(0)), divisor))
        kept = [
            Group(group.module, group.factor, anchor.detach().clone())
            for group, anchor in zip(groups, anchors, strict=True)
        ]
        return cls(kept, parts, tokens)

    def gram(self) -> Tensor:
        """K: float64 (examples, examples)."""
        total = torch.zeros(self.examples, self.examples, dtype=torch.float64)
        for part in self.parts:
            for _, metric, duals in part.blocks():
                total += duals.flatten(1) @ metric.step(duals).flatten(1).T
        return total

    def shifts(self) -> Tensor:
        """The gradients along steps that cost nothing: (examples, centred groups)."""
        columns = [part.gradients.double().sum(-1) for part in self.parts if part.metric.centred]
        return torch.cat(columns, dim=-1) if columns else torch.zeros(self.examples, 0, dtype=torch.float64)

    def rho(self) -> float:
        """ρ̄ = tr(Σ)/tr(H)."""
        squares = sum(float(part.gradients.double().square().sum()) for part in self.parts)
        trace = sum(float(part.metric.trace()) for part in self.parts)
        return self.tokens * squares / self.examples / trace

    def step(self, after: Sequence[Tensor]) -> list[Tensor]:
        """What moved from the anchor to ``after``, as the parts lay it out: float64 (groups, n) each."""
        before = [group.tensor for group in self.groups]
        return [
            (part.layout.gather(after).float() - part.layout.gather(before).float()).double()
            for part in self.parts
        ]

    def products(self, step: Sequence[Tensor]) -> Tensor:
        """Each example's gradient times the step in the gauge: (examples,)."""
        total = torch.zeros(self.examples, dtype=torch.float64)
        for part, moved in zip(self.parts, step, strict=True):
            for place, _, duals in part.blocks():
                total += duals.flatten(1) @ moved[place].flatten()
        return total

    def inner(self, one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
        """⟨one, other⟩_H of two steps."""
        return sum(float(part.metric.inner(a, b)) for part, a, b in zip(self.parts, one, other, strict=True))

    def carried(self, directions: Directions, batch: int) -> Carried:
        """
        Args:
            batch: targets whose gradients are averaged in a step: D² = ḡ² + Var(g)/batch.
        """
        count = directions.coefficients.shape[1]
        shares = torch.zeros(count, len(self.groups), dtype=torch.float64)
        inertia, pull = (torch.zeros(count, dtype=torch.float64) for _ in range(2))
        for part in self.parts:
            carried = torch.zeros(count, *part.gradients.shape[1:], dtype=torch.float64)
            for place, metric, duals in part.blocks():
                along = torch.einsum("ek,egn->kgn", directions.coefficients, duals)
                steps = metric.step(along)
                carried[:, place] = along * steps
                gradients = part.gradients[:, place].double()
                variance = gradients.var(0)
                mean_square = (gradients.mean(0).square() - variance / self.examples).clamp_min(0)
                weighted = (mean_square + variance / batch).sqrt() * steps.square()
                inertia += weighted.flatten(1).sum(1)
                pull += (weighted * part.rates[place]).flatten(1).sum(1)
            for number in range(count):
                for tensor, values in part.layout.scatter(carried[number]):
                    shares[number, tensor] += values.sum()
        return Carried(shares, inertia, pull)


def _part(stack: Stack, gradients: Tensor, divisor: int) -> Part:
    size = stack.anchor.shape[-1]
    metric = stack.metric
    ones = torch.ones(len(stack.anchor), 1, dtype=torch.float64)
    if isinstance(metric, SoftmaxMetric):
        weights = (metric.prior.weights / metric.prior.total).double()
        weights /= weights.sum(-1, keepdim=True)
        scale = ones / torch.as_tensor(metric.temperature).double() ** 2 / divisor
        return Part(stack.layout, GroupMetric(weights, scale, True), weights * size, gradients)
    if isinstance(metric, DiagonalMetric):
        held = metric.curvature
        weights = ones.expand(-1, size) if held is None else held.double()
        return Part(
            stack.layout, GroupMetric(weights, ones / divisor, False), weights / metric.mean, gradients
        )
    raise TrainingError(f"directions of {type(metric).__name__} are not known: it is no metric of the family")
