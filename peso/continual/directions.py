"""Generalised eigendirections Σq = ρHq of what the data ask for and what an anchor costs, from a sketch.

Knows gradients of single examples and the metric of a penalty as plain matrices; knows nothing of models,
strategies or files. Everything is float64, and nothing is larger than the sketch (examples × values).

Σ = (tokens/n) Σ_i g_i g_iᵀ has rank n at most, so its eigendirections lie in the span of H⁺g_1 … H⁺g_n, and
the eigenproblem of the values' size is one of the examples' size:

    K_ij = g_iᵀ H⁺ g_j,   K u = κ u   ⇒   q = Σ_i u_i H⁺g_i / √κ,   qᵀHq = 1,   Σq = ρHq,   ρ = tokens·κ/n

For softmax-KL a group's block of H is s·(diag(p) − p·pᵀ), s = 1/τ² (times 1/modules), which does not see a
shift common to the group: H·1 = 0. The gauge pᵀd = 0 picks one of the steps d + c·1 that cost the same. A
gradient g acts on such steps as its dual t = g − p·Σg does (tᵀd = gᵀd), whose values sum to 0; x = t/(s·p)
is the step with Hx = t, pᵀx = 0. So x = H⁺g in this gauge, and K_ij = Σ t_i·t_j/(s·p). The shifts are held
there; where they follow freely, as in the limit of endless training, see :func:`with_free_shifts`. A diagonal
H = s·diag(w) is the same without the gauge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from peso.errors import TrainingError

RANK = 1e-10  # eigenvalues below this share of the largest are rounding


@dataclass(frozen=True)
class GroupMetric:
    """H of groups of one size: s·diag(w), or s·(diag(w) − w·wᵀ) where ``centred`` (then w sums to 1).

    ``weights``: w (groups, n); ``scale``: s (groups, 1); both float64. Where w is 0 nothing is held and
    nothing is said: such values are left out.
    """

    weights: Tensor
    scale: Tensor
    centred: bool

    def dual(self, gradients: Tensor) -> Tensor:
        """t of gradients (examples, groups, n): what they say of steps in the gauge."""
        if not self.centred:
            return torch.where(self.weights > 0, gradients, 0.0)
        return gradients - self.weights * gradients.sum(-1, keepdim=True)

    def step(self, duals: Tensor) -> Tensor:
        """x with Hx = t, in the gauge: (…, groups, n)."""
        held = self.scale * self.weights
        return torch.where(held > 0, duals / held, 0.0)

    def gram(self, gradients: Tensor) -> Tensor:
        """K of gradients (examples, groups, n): (examples, examples)."""
        duals = self.dual(gradients.double())
        return duals.flatten(1) @ self.step(duals).flatten(1).T

    def inner(self, one: Tensor, other: Tensor) -> Tensor:
        """⟨one, other⟩_H of two steps (groups, n): 0-d."""
        if self.centred:
            one = one - (self.weights * one).sum(-1, keepdim=True)
            other = other - (self.weights * other).sum(-1, keepdim=True)
        return (self.scale * self.weights * one * other).sum()

    def trace(self) -> Tensor:
        """tr(H), 0-d."""
        held = self.weights * (1 - self.weights) if self.centred else self.weights
        return (self.scale * held).sum()


@dataclass(frozen=True)
class Directions:
    """The strongest directions of a sketch. ``support``: ρ (k,), descending; of the sample, so that the first
    ones are too large; ``coefficients``: (n, k), q_k = Σ_i coefficients_ik · H⁺g_i."""

    support: Tensor
    coefficients: Tensor

    def along(self, products: Tensor) -> Tensor:
        """⟨w, q_k⟩_H of a step w, from its products g_iᵀw in the gauge (= t_iᵀw): (n,) → (k,)."""
        return self.coefficients.T @ products


def strongest(gram: Tensor, count: int, tokens: float = 1.0) -> Directions:
    """The ``count`` strongest directions of K (n, n), fewer where the sketch's rank is lower.

    Raises:
        TrainingError: K is not finite, or 0: no gradient acts on what is held.
    """
    if not bool(gram.isfinite().all()):
        raise TrainingError("the gradients of the examples are not finite")
    kappa, u = torch.linalg.eigh(gram)
    kappa, u = kappa.flip(0), u.flip(1)
    kept = kappa > RANK * kappa[0].clamp_min(0)
    if not bool(kept.any()) or float(kappa[0]) <= 0:
        raise TrainingError("no gradient of the examples acts on what is anchored: there are no directions")
    count = min(count, int(kept.sum()))
    return Directions(tokens * kappa[:count] / len(gram), u[:, :count] / kappa[:count].sqrt())


@dataclass(frozen=True)
class HeldOut:
    """What fresh examples say of directions found without them: ``support`` (k,), its ``standard_error`` and
    ``mean_share`` (k,): how much of it is the mean gradient, a pull that all examples share."""

    support: Tensor
    standard_error: Tensor
    mean_share: Tensor


def held_out(gram: Tensor, count: int, tokens: float = 1.0, folds: int = 10, seed: int = 0) -> HeldOut:
    """Cross-validation: direction k of all folds but one, its support from the one left out.

    A direction that is found is never stronger than the strongest there is, so that in expectation the sums
    of the first k obey  held out ≤ true ≤ sample  (Ky Fan). The k-th of each fold counts as the k-th.

    Raises:
        TrainingError: fewer than two examples a fold.
    """
    n = len(gram)
    if n < 2 * folds:
        raise TrainingError(f"{n} examples are too few for a spread: use {2 * folds} or more")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    products = gram.new_zeros(n, count)  # qᵀg of each example with directions that did not see it
    for fold in order.chunk(folds):
        seen = torch.ones(n, dtype=torch.bool)
        seen[fold] = False
        found = strongest(gram[seen][:, seen], count)
        products[fold, : len(found.support)] = gram[fold][:, seen] @ found.coefficients
    squares = products.square()
    # a fold's directions have signs of their own, so that means are taken within folds; the error of a mean
    # of m examples, variance/m, is taken off its square
    mean_squares = []
    for fold in order.chunk(folds):
        mean, variance = products[fold].mean(0), products[fold].var(0)
        mean_squares.append((mean.square() - variance / len(fold)).clamp_min(0))
    support = squares.mean(0)
    shared = torch.stack(mean_squares).mean(0) / support.clamp_min(torch.finfo(support.dtype).tiny)
    return HeldOut(tokens * support, tokens * squares.std(0) / math.sqrt(n), shared.clamp(max=1.0))


def with_free_shifts(gram: Tensor, shifts: Tensor) -> Tensor:
    """K where steps that cost nothing follow freely: (I − Π)·K·(I − Π).

    min over c of ‖G(d + N·c)‖² is ‖(I − Π)·G·d‖², Π the projection onto the columns of G·N: what a shift can
    do for the data as well is no support for a reshuffle. Exact where the loss is the quadratic of Σ; it
    needs more examples than groups.

    Args:
        shifts: G·N, each example's gradient summed over each group: (n, groups).

    Raises:
        TrainingError: as many groups as examples or more, so that shifts alone could do everything.
    """
    n, groups = shifts.shape
    if n <= groups:
        raise TrainingError(f"{n} examples cannot tell {groups} free shifts from directions: use more")
    basis, _ = torch.linalg.qr(shifts.double())
    rest = torch.eye(n, dtype=torch.float64) - basis @ basis.T
    return rest @ gram @ rest


def limit_weight(support: Tensor, weight: float | Tensor) -> Tensor:
    """ρ/(ρ+λ): the share of the new optimum in the stationary solution."""
    return support / (support + weight)


def stage_weight(
    support: Tensor, weight: float | Tensor, inertia: Tensor, time: float, free_time: float | None = None
) -> Tensor:
    """How far a held stage gets along each direction, relative to a free stage that is as short.

    Training for a time T = Σ learning rates with an optimiser that divides gradients by D moves along q as
    D·Δ' = −Σ(Δ − Δ*) − λHΔ. With the inertia δ = qᵀDq (for H-orthonormal q), y = Tρ/δ and s = Tλ/δ

        Δ(T) = Δ*·y/(y+s)·(1 − e^−(y+s)),   free: Δ*·(1 − e^−y)

    and the ratio of the two is returned. It is ρ/(ρ+λ) in the limit of long stages, (1 − e^−s)/s for a
    direction without support. That q is an eigendirection of (Σ, D) too is an approximation: D is taken to
    be alike in all values that carry it.

    Args:
        free_time: T of the free stage, where it is another.
    """
    support = support.clamp_min(torch.finfo(support.dtype).eps * float(support.max()))  # the limit, not 0/0
    y, s = time * support / inertia, time * torch.as_tensor(weight) / inertia
    y_free = (time if free_time is None else free_time) * support / inertia
    held = y / (y + s) * -torch.expm1(-(y + s))
    return held / -torch.expm1(-y_free)
