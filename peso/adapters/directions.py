"""The directions in which the data pull an adapter most strongly, relative to the curvature of a penalty.

They are the generalized eigenvectors q of Σq = ρHq, estimated from a sample; ρ is the support of q. Σ is the
second moment of the data's gradients, and H is the Hessian of a proximal term at its anchor. Everything is
float64, and no tensor is larger than the sample (examples × values).

Σ = (tokens/n) Σ_i g_i g_iᵀ has at most rank n, so its eigendirections are in the span of H⁺g_1 … H⁺g_n, and
the eigenproblem has the size of the number of examples instead of the number of values:

    K_ij = g_iᵀ H⁺ g_j,   K u = κ u   ⇒   q = Σ_i u_i H⁺g_i / √κ,   qᵀHq = 1,   Σq = ρHq,   ρ = tokens·κ/n

For softmax-KL, the block of H of a group is s·(diag(p) − p·pᵀ), s = 1/τ² (times 1/modules), which ignores a
shift common to the group: H·1 = 0. The gauge pᵀd = 0 selects one of the steps d + c·1, which all cost the
same. A gradient g acts on such steps like its dual t = g − p·Σg (tᵀd = gᵀd), whose values sum to 0;
x = t/(s·p) is the step with Hx = t, pᵀx = 0. So x = H⁺g in this gauge, and K_ij = Σ t_i·t_j/(s·p). Shifts are
fixed in this gauge, whereas in the limit of endless training they are free. For a diagonal H = s·diag(w), the
same holds without the gauge.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peso.adapters.groups import Group, Source, Stack, layouts, stack_anchors
from peso.adapters.proximal.metrics import Hessian
from peso.adapters.proximal.term import DistanceTerm, check_trained
from peso.errors import TrainingError

RANK = 1e-10  # eigenvalues below this share of the largest are rounding errors
BLOCK = 1 << 14  # the number of values to convert to float64 at a time
ON_CPU = (torch.device("cpu"), torch.float32)


@dataclass(frozen=True)
class Directions:
    """The strongest directions of a sample, those with the most support.

    Attributes:
        support: ρ (k,), descending. It is measured on the sample, so the first values are too large.
        coefficients: (n, k), where q_k = Σ_i coefficients_ik · H⁺g_i.
    """

    support: Tensor
    coefficients: Tensor

    def along(self, products: Tensor) -> Tensor:
        """⟨w, q_k⟩_H of a step w, from the products g_iᵀw in the gauge (= t_iᵀw): (n,) → (k,)."""
        return self.coefficients.T @ products


def strongest(gram: Tensor, count: int, tokens: float = 1.0) -> Directions:
    """The ``count`` strongest directions.

    Args:
        gram: K (n, n).
        count: the number of directions; there are fewer if the rank of K is lower.
        tokens: the number of tokens per example.

    Raises:
        TrainingError: K is not finite, or it is 0 because no gradient acts on the anchored parameters.
    """
    if not bool(gram.isfinite().all()):
        raise TrainingError("the gradients of the examples are not finite")
    kappa, u = torch.linalg.eigh(gram)
    kappa, u = kappa.flip(0), u.flip(1)
    kept = kappa > RANK * kappa[0].clamp_min(0)
    if not bool(kept.any()) or float(kappa[0]) <= 0:
        raise TrainingError(
            "no gradient of the examples acts on the anchored parameters, so there are no directions"
        )
    count = min(count, int(kept.sum()))
    return Directions(tokens * kappa[:count] / len(gram), u[:, :count] / kappa[:count].sqrt())


@dataclass(frozen=True)
class HeldOut:
    """Directions evaluated on examples that were not used to find them.

    Attributes:
        support: (k,), the support of each direction.
        standard_error: (k,), its standard error.
        mean_share: (k,), the share of the support that is due to the mean gradient, which all examples have
            in common.
    """

    support: Tensor
    standard_error: Tensor
    mean_share: Tensor


def held_out(gram: Tensor, count: int, tokens: float = 1.0, folds: int = 10, seed: int = 0) -> HeldOut:
    """Cross-validation: find direction k on all folds but one, and measure its support on that one.

    No direction is stronger than the true strongest one, so in expectation the sums of the first k satisfy
    held out ≤ true ≤ sample (Ky Fan). Results of the folds are combined by the rank k of the directions.

    Args:
        gram: K (n, n).
        count: the number of directions.
        tokens: the number of tokens per example.
        folds: the number of folds.
        seed: the seed of the assignment to folds.

    Raises:
        TrainingError: there are fewer than two examples per fold.
    """
    n = len(gram)
    if n < 2 * folds:
        raise TrainingError(f"{n} examples are too few for a standard error: use {2 * folds} or more")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    products = gram.new_zeros(n, count)  # qᵀg of each example with directions that did not see it
    for fold in order.chunk(folds):
        seen = torch.ones(n, dtype=torch.bool)
        seen[fold] = False
        found = strongest(gram[seen][:, seen], count)
        products[fold, : len(found.support)] = gram[fold][:, seen] @ found.coefficients
    squares = products.square()
    # the signs of directions differ between folds, so means are taken within folds; the variance of the mean
    # of m examples, variance/m, is subtracted from its square
    mean_squares = []
    for fold in order.chunk(folds):
        mean, variance = products[fold].mean(0), products[fold].var(0)
        mean_squares.append((mean.square() - variance / len(fold)).clamp_min(0))
    support = squares.mean(0)
    shared = torch.stack(mean_squares).mean(0) / support.clamp_min(torch.finfo(support.dtype).tiny)
    return HeldOut(tokens * support, tokens * squares.std(0) / math.sqrt(n), shared.clamp(max=1.0))


def limit_weight(support: Tensor, weight: float | Tensor) -> Tensor:
    """ρ/(ρ+λ): the share of the new optimum in the stationary solution."""
    return support / (support + weight)


def stage_weight(
    support: Tensor, weight: float | Tensor, inertia: Tensor, time: float, free_time: float | None = None
) -> Tensor:
    """How far an anchored stage moves along each direction, relative to a stage without an anchor.

    Training for a time T = Σ learning rates with an optimizer that divides gradients by D moves along q as
    D·Δ' = −Σ(Δ − Δ*) − λHΔ. With the inertia δ = qᵀDq (for H-orthonormal q), y = Tρ/δ and s = Tλ/δ,

        Δ(T) = Δ*·y/(y+s)·(1 − e^−(y+s)),   without an anchor: Δ*·(1 − e^−y)

    and the ratio of the two is returned. It is ρ/(ρ+λ) in the limit of long stages, and (1 − e^−s)/s for a
    direction without support. This assumes that q is also an eigendirection of (Σ, D), that is, that D is
    similar for all values with a share in q.

    Args:
        support: ρ of each direction.
        weight: λ.
        inertia: δ of each direction.
        time: T.
        free_time: T of the stage without an anchor, if it is different.
    """
    support = support.clamp_min(torch.finfo(support.dtype).eps * float(support.max()))  # the limit, not 0/0
    y, s = time * support / inertia, time * torch.as_tensor(weight) / inertia
    y_free = (time if free_time is None else free_time) * support / inertia
    anchored = y / (y + s) * -torch.expm1(-(y + s))
    return anchored / -torch.expm1(-y_free)


# --- gradients of single examples on an adapter -------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """Groups of the same size, with their Hessian in float64, including the term's reduction, and the
    gradients, float32 (examples, groups, n)."""

    stack: Stack
    hessian: Hessian
    gradients: Tensor

    def blocks(self) -> Iterator[tuple[slice, Hessian, Tensor]]:
        """Iterate over blocks of groups: their slice, their Hessian and their duals, in float64."""
        _, groups, size = self.gradients.shape
        step = max(1, BLOCK // size)
        for start in range(0, groups, step):
            place = slice(start, start + step)
            hessian = self.hessian.of_groups(place)
            yield place, hessian, hessian.dual(self.gradients[:, place].double())


@dataclass(frozen=True)
class Composition:
    """The composition of each direction.

    Attributes:
        shares: (k, tensors), the share of each tensor in ‖q‖²_H = 1.
        inertia: (k,), qᵀDq, where D is the divisor of gradients in Adam.
        pull: (k,), qᵀDWq, where W are the weights of the decoupled form.
    """

    shares: Tensor
    inertia: Tensor
    pull: Tensor


class ExampleGradients:
    """The gradients of the losses of single targets, in the layout of a term's anchor.

    Args:
        term: the term, which must have an anchor.
        source: the source that was given to ``term.anchor``. Gradients are taken at the current parameters.
        losses: see :meth:`peso.adapters.proximal.term.Term.calibrate`.
        tokens: the number of tokens per target.
        anchors: the values of the anchor; by default the current parameters.

    Attributes:
        examples: the number of losses.
        groups: the groups of the anchor.

    Raises:
        TrainingError: a group is frozen, or there are no losses.
    """

    def __init__(
        self,
        term: DistanceTerm,
        source: Source,
        losses: Iterable[Tensor],
        tokens: float,
        anchors: Sequence[Tensor] | None = None,
    ) -> None:
        groups = term.groups_of(source)
        check_trained(groups)
        tensors = [group.tensor for group in groups]
        anchors = [tensor.detach() for tensor in tensors] if anchors is None else anchors
        stacks = stack_anchors(anchors, layouts(groups, term.groups), [ON_CPU] * len(groups))
        rows: list[list[Tensor]] = [[] for _ in stacks]
        for loss in losses:
            found = torch.autograd.grad(loss, tensors, allow_unused=True)
            gradients = [
                torch.zeros_like(tensor) if gradient is None else gradient
                for tensor, gradient in zip(tensors, found, strict=True)
            ]
            for place, stack in zip(rows, stacks, strict=True):
                place.append(stack.gather(gradients).float().clone())
        if not rows[0]:
            raise TrainingError("there are no examples to compute gradients from")
        self.tokens = tokens
        self.examples = len(rows[0])
        self.groups = [
            Group(group.module, group.factor, anchor.detach().clone())
            for group, anchor in zip(groups, anchors, strict=True)
        ]
        self._parts = [
            _Part(stack, term.metric(stack).hessian().double(term.divisor), torch.stack(rows.pop(0)))
            for stack in stacks
        ]

    def gram(self) -> Tensor:
        """K: float64 (examples, examples)."""
        total = torch.zeros(self.examples, self.examples, dtype=torch.float64)
        for part in self._parts:
            for _, hessian, duals in part.blocks():
                total += duals.flatten(1) @ hessian.step(duals).flatten(1).T
        return total

    def rho(self) -> float:
        """ρ̄ = tr(Σ)/tr(H)."""
        squares = sum(float(part.gradients.double().square().sum()) for part in self._parts)
        trace = sum(float(part.hessian.trace().sum()) for part in self._parts)
        return self.tokens * squares / self.examples / trace

    def step(self, after: Sequence[Tensor]) -> list[Tensor]:
        """The displacement from the anchor to ``after``, float64 (groups, n) for each stack."""
        before = [group.tensor for group in self.groups]
        return [
            (part.stack.gather(after).float() - part.stack.gather(before).float()).double()
            for part in self._parts
        ]

    def products(self, step: Sequence[Tensor]) -> Tensor:
        """The product of each example's gradient and the step in the gauge: (examples,)."""
        total = torch.zeros(self.examples, dtype=torch.float64)
        for part, moved in zip(self._parts, step, strict=True):
            for place, _, duals in part.blocks():
                total += duals.flatten(1) @ moved[place].flatten()
        return total

    def inner(self, one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
        """⟨one, other⟩_H of two steps."""
        parts = zip(self._parts, one, other, strict=True)
        return sum(float(part.hessian.inner(a, b)) for part, a, b in parts)

    def composition(self, directions: Directions, batch: int) -> Composition:
        """The composition of directions.

        Args:
            batch: the number of targets whose gradients are averaged in a step: D² = ḡ² + Var(g)/batch.
        """
        count = directions.coefficients.shape[1]
        shares = torch.zeros(count, len(self.groups), dtype=torch.float64)
        inertia, pull = (torch.zeros(count, dtype=torch.float64) for _ in range(2))
        for part in self._parts:
            energy = torch.zeros(count, *part.gradients.shape[1:], dtype=torch.float64)
            for place, hessian, duals in part.blocks():
                along = torch.einsum("ek,egn->kgn", directions.coefficients, duals)
                steps = hessian.step(along)
                energy[:, place] = along * steps
                gradients = part.gradients[:, place].double()
                variance = gradients.var(0)
                mean_square = (gradients.mean(0).square() - variance / self.examples).clamp_min(0)
                weighted = (mean_square + variance / batch).sqrt() * steps.square()
                inertia += weighted.flatten(1).sum(1)
                pull += (weighted * (hessian.weights / hessian.mean)).flatten(1).sum(1)
            for number in range(count):
                for tensor, values in part.stack.scatter(energy[number]):
                    shares[number, tensor] += values.sum()
        return Composition(shares, inertia, pull)
