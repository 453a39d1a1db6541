"""What a displacement from the anchor costs, its curvature there, and how the decoupled form shrinks it.

Everything is a plain matrix (groups, n). The softmax-KL is exact: value and gradient in closed form, nothing
lost to cancellation. With d = (v − a)/τ, p = softmax(a/τ) and s = softmax(v/τ) of a group v with anchor a:

    ℓ = log s − log p = d − log Σ p·eᵈ
    KL(s ‖ p) = Σ p·φ(ℓ),   φ(x) = x·eˣ − (eˣ − 1) = x²/2 + x³/3 + x⁴/8 + … ≥ 0
    ∂KL/∂d = s·(ℓ − KL)

The first line follows from s = p·eᵈ / Σ p·eᵈ, the second from Σ s·ℓ and Σ p·(e^ℓ − 1) = Σ s − Σ p = 0. This
is the formula of the paper (arXiv 2510.25093) without a difference of two nearly equal sums: every term of
the sum is positive, so its relative error is that of a single term.

ρ̄ = tr(Σ)/tr(H), the weight of strength 1, is estimated from gradients of single examples. Near the optimum
v* of the data the loss is ½(v − v*)ᵀΣ(v − v*), where Σ is the second moment of the gradients of single
target tokens. A penalty (λ/2)‖v − a‖²_H moves the solution to ρ/(ρ+λ)·v* + λ/(ρ+λ)·a along each generalized
eigendirection Σq = ρHq. So λ has to be compared with ρ, whose typical size is tr(Σ)/tr(H).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from peso.errors import TrainingError

# φ(x) / x² = Σ_{k ≥ 2} (k − 1)/k! · x^(k−2), highest power first. Below SERIES the seventh order and the
# closed form (which cancels: x·eˣ and eˣ − 1 agree to first order) are both good to about 1e-6 in float32.
SERIES = 0.1
COEFFICIENTS = (1 / 840, 1 / 144, 1 / 30, 1 / 8, 1 / 3, 1 / 2)
CONCENTRATED = 1.0  # a KL from which ℓ and KL may agree so closely that ℓ − KL cancels

LEAST_TEMPERATURE = 1e-2
WIDEST = 60.0  # span of a group over its temperature: e⁻⁶⁰ / n is still a normal float32


@dataclass(frozen=True)
class Prior:
    """p = softmax(anchor / τ) of each group, computed once per stage.

    ``weights``: (groups, n). ``total``: (groups, 1), the sum of a group's rounded weights; dividing by it
    instead of by 1 makes a group that has not moved exactly zero.
    """

    weights: Tensor
    total: Tensor

    @classmethod
    def of(cls, anchor: Tensor, temperature: float | Tensor = 1.0) -> Prior:
        """anchor: (groups, n) float32 or float64; temperature: one for all, or (groups, 1).

        The softmax is taken in float64: a float32 sum over a million values is itself off by 1e-5.

        Raises:
            TrainingError: a weight vanishes in the dtype, which would silently drop its value.
        """
        wide = _wide(anchor)
        scaled = wide / (temperature.to(wide) if isinstance(temperature, Tensor) else temperature)
        weights = torch.softmax(scaled, dim=-1).to(anchor)
        if bool((weights < torch.finfo(anchor.dtype).tiny).any()):
            spread = float((anchor.amax(-1) - anchor.amin(-1)).max())
            shown = float(temperature.min()) if isinstance(temperature, Tensor) else temperature
            raise TrainingError(
                f"temperature {shown:g} is too small for an anchor group whose values span {spread:g}: "
                f"its softmax weights vanish in {anchor.dtype}. Use a temperature above "
                f"{spread / WIDEST:.2g}"
            )
        return cls(weights, weights.sum(-1, keepdim=True))

    def centered(self, displacement: Tensor) -> Tensor:
        """Δ − μ, μ = Σ p·Δ of each group: (groups, n)."""
        return displacement - (self.weights * displacement).sum(-1, keepdim=True) / self.total


def automatic_temperature(anchor: Tensor) -> Tensor:
    """Standard deviation of each anchor group, at least 1e-2: (groups, n) → (groups, 1).

    The floor is for a fresh B, which is all zeros. A group with outliers gets the smallest temperature at
    which none of its weights vanishes, if that is higher.
    """
    wide = _wide(anchor)
    spread = wide.std(-1, correction=0, keepdim=True).clamp_min(LEAST_TEMPERATURE)
    span = wide.amax(-1, keepdim=True) - wide.amin(-1, keepdim=True)
    return torch.maximum(spread, span / WIDEST).to(anchor)


def _wide(anchor: Tensor) -> Tensor:
    """In float64, on the CPU where the device is MPS, which has no float64."""
    return (anchor.cpu() if anchor.device.type == "mps" else anchor).double()


def softmax_kl(displacement: Tensor, prior: Prior) -> tuple[Tensor, Tensor]:
    """KL(softmax(a/τ + d) ‖ softmax(a/τ)) of every group, and its gradient with respect to d.

    The relative error in float32 is about 1e-7 to 1e-6 (value, and gradient in norm) for any d: from 1e-6,
    where KL is 5e-13, to displacements that move all of the mass. The gradient with respect to v is that
    divided by τ.

    Args:
        displacement: (groups, n) d, float32 or float64. It is overwritten.
        prior: of the same shape.

    Returns:
        KL (groups,) and its gradient (groups, n).
    """
    p, total = prior.weights, prior.total
    on_cpu = displacement.device.type == "cpu"
    # where no value has moved far, a CPU skips a third of what follows; a GPU would have to wait to know
    near = on_cpu and float(displacement.abs().amax()) < SERIES / 2
    # log Σ p·eᵈ in two passes. The first subtracts the maximum, so nothing overflows, and is good to 1e-7
    # absolute, which is useless where d is 1e-6 (near the anchor Σ p·d is as good a guess) ...
    if near:
        scratch = p * displacement
        log_ratio = displacement.sub_(scratch.sum(-1, keepdim=True) / total)  # |ℓ| < SERIES from here on
    else:
        top = displacement.amax(-1, keepdim=True)
        scratch = torch.sub(displacement, top).exp_().mul_(p)
        log_ratio = displacement.sub_(top + (scratch.sum(-1, keepdim=True) / total).log())
    # ... the second corrects what is left, to 1e-7 relative: Σ p·(e^ℓ − 1) must be 0.
    growth = torch.expm1(log_ratio)  # e^ℓ − 1
    left = torch.mul(p, growth, out=scratch).sum(-1, keepdim=True) / total
    log_ratio.sub_(left.log1p())
    growth.sub_(left).div_(1 + left)

    moved = growth.mul_(p)  # s − p
    series = log_ratio * COEFFICIENTS[0]
    for coefficient in COEFFICIENTS[1:]:
        series.add_(coefficient).mul_(log_ratio)
    terms = series.mul_(log_ratio).mul_(p)
    if not near:
        # p·φ(ℓ) as ℓ·(s − p) − (s − p) + p·ℓ: the product p·(e^ℓ − 1) never overflows, e^ℓ·ℓ might
        closed = torch.mul(log_ratio, moved, out=scratch).sub_(moved).addcmul_(p, log_ratio)
        terms = torch.where(log_ratio.abs() < SERIES, series, closed)
    kl = terms.sum(-1)
    if near or (on_cpu and float(kl.amax()) < CONCENTRATED):
        return kl, moved.add_(p).mul_(log_ratio.sub_(kl.unsqueeze(-1)))
    # Where one value holds nearly all of the mass, s·(ℓ − KL) is that of two nearly equal numbers for it, and
    # s = (s − p) + p cancels for the others. Seen from that value, nothing cancels: its own ℓ becomes 0.
    shares = torch.exp(log_ratio, out=moved).mul_(p)
    seen = log_ratio.sub_(log_ratio.gather(-1, shares.argmax(-1, keepdim=True)))
    mean = torch.mul(shares, seen, out=scratch).sum(-1, keepdim=True) / shares.sum(-1, keepdim=True)
    return kl, shares.mul_(seen.sub_(mean))


def second_order(displacement: Tensor, prior: Prior) -> Tensor:
    """½·Var_p(d) of every group: what the KL tends to as d shrinks. (groups, n) → (groups,)."""
    centered = prior.centered(prior.centered(displacement))  # a common shift may dwarf the rest
    return 0.5 * (prior.weights * centered.square()).sum(-1)


def shrink(
    displacement: Tensor, weights: Tensor | float, rate: float, centered: Tensor | None = None
) -> None:
    """The decoupled pull, in place: Δ ← Δ + (Δ − μ)·(exp(−rate·w) − 1), which is μ + (Δ − μ)·exp(−rate·w).

    As a change to Δ: where the rate is small, exp(−rate·w) itself would lose it in rounding.

    Args:
        displacement: Δ (groups, n).
        weights: w of the same shape, or one for all.
        rate: lr · κ, divided by the mean of the weights.
        centered: Δ − μ; None: μ is 0.
    """
    if isinstance(weights, Tensor):
        displacement.addcmul_(
            displacement if centered is None else centered, torch.mul(weights, -rate).expm1_()
        )
    else:
        displacement.add_(displacement, alpha=math.expm1(-rate * weights))


@dataclass(frozen=True)
class Hessian:
    """H of groups of one size at the anchor: s·diag(w), or s·(diag(w) − w·wᵀ) where ``centered``.

    ``weights``: w (groups, n), summing to 1 in a centered group; ``scale``: s (groups, 1) or one for all;
    ``mean``: of w over all that is anchored, so that w / mean are the weights of the decoupled form. Values
    whose w is 0 are free, and left out.
    """

    weights: Tensor
    scale: Tensor | float = 1.0
    centered: bool = False
    mean: float = 1.0

    def double(self, divisor: int) -> Hessian:
        """H / divisor, in float64: scale (groups, 1), centered weights that sum to 1 in float64 too."""
        weights = self.weights.double()
        if self.centered:
            weights = weights / weights.sum(-1, keepdim=True)
        scale = torch.as_tensor(self.scale).double() / divisor * torch.ones_like(weights[:, :1])
        return replace(self, weights=weights, scale=scale)

    def of_groups(self, place: slice) -> Hessian:
        assert isinstance(self.scale, Tensor)
        return replace(self, weights=self.weights[place], scale=self.scale[place])

    def trace(self) -> Tensor:
        """tr(H) of each group: (groups,)."""
        restrained = self.weights * (1 - self.weights) if self.centered else self.weights
        return (self.scale * restrained).sum(-1)

    def dual(self, gradients: Tensor) -> Tensor:
        """t of gradients (…, groups, n): how they act on steps with wᵀd = 0 where ``centered``."""
        if not self.centered:
            return torch.where(self.weights > 0, gradients, 0.0)
        return gradients - self.weights * gradients.sum(-1, keepdim=True)

    def step(self, duals: Tensor) -> Tensor:
        """x with Hx = t, and wᵀx = 0 where ``centered``: (…, groups, n)."""
        diagonal = self.scale * self.weights
        return torch.where(diagonal > 0, duals / diagonal, 0.0)

    def inner(self, one: Tensor, other: Tensor) -> Tensor:
        """⟨one, other⟩_H of two steps (groups, n): 0-d."""
        if self.centered:
            one = one - (self.weights * one).sum(-1, keepdim=True)
            other = other - (self.weights * other).sum(-1, keepdim=True)
        return (self.scale * self.weights * one * other).sum()


class Metric(Protocol):
    """What it costs the groups of one stack to be away from their anchor."""

    def penalty(self, displacement: Tensor) -> tuple[Tensor, Tensor]:
        """Of v − a (groups, n), which may be overwritten: the penalty (groups,), its gradient (groups, n)."""
        ...

    def hessian(self) -> Hessian:
        """Of the penalty, at the anchor."""
        ...

    def shrink(self, displacement: Tensor, rate: float) -> None:
        """The decoupled pull on v − a (groups, n), in place, for ``rate`` = lr · κ."""
        ...


@dataclass(frozen=True)
class SoftmaxMetric:
    """KL(softmax(v/τ) ‖ softmax(a/τ)); H = (diag(p) − p·pᵀ)/τ². ``temperature``: τ, or (groups, 1)."""

    prior: Prior
    temperature: float | Tensor

    @classmethod
    def of(cls, anchor: Tensor, temperature: float | str) -> SoftmaxMetric:
        tau = automatic_temperature(anchor) if isinstance(temperature, str) else float(temperature)
        return cls(Prior.of(anchor, tau), tau)

    def scaled(self, rows: Tensor) -> Tensor:
        """rows / τ, in place."""
        unscaled = isinstance(self.temperature, float) and self.temperature == 1
        return rows if unscaled else rows.div_(self.temperature)

    def penalty(self, displacement: Tensor) -> tuple[Tensor, Tensor]:
        kl, gradient = softmax_kl(self.scaled(displacement), self.prior)
        return kl, self.scaled(gradient)

    def hessian(self) -> Hessian:
        p = self.prior.weights / self.prior.total
        return Hessian(p, 1 / self.temperature**2, centered=True, mean=1 / p.shape[-1])

    def shrink(self, displacement: Tensor, rate: float) -> None:
        """w = n·p, μ = Σ p·Δ."""
        p = self.prior.weights
        shrink(displacement, p, rate * p.shape[-1], self.prior.centered(displacement))


@dataclass(frozen=True)
class DiagonalMetric:
    """½·Σ h_i·Δ_i²; H = diag(h). ``curvature``: h (groups, n), or 1 for all, broadcast over ``size``.

    ``mean``: of h over everything that is anchored, so that w = h / mean has mean 1.
    """

    size: torch.Size
    curvature: Tensor | None = None
    mean: float = 1.0

    def penalty(self, displacement: Tensor) -> tuple[Tensor, Tensor]:
        gradient = displacement if self.curvature is None else displacement * self.curvature
        return 0.5 * torch.linalg.vecdot(gradient, displacement), gradient

    def hessian(self) -> Hessian:
        return Hessian(torch.ones(self.size) if self.curvature is None else self.curvature, mean=self.mean)

    def shrink(self, displacement: Tensor, rate: float) -> None:
        """w = h / mean, μ = 0."""
        shrink(displacement, 1.0 if self.curvature is None else self.curvature, rate / self.mean)


@dataclass(frozen=True)
class Calibration:
    """``rho``: ρ̄; ``standard_error``: its standard error over the ``examples``."""

    rho: float
    standard_error: float
    examples: int


def second_moment(
    tensors: Sequence[Tensor], losses: Iterable[Tensor], tokens: float = 1.0
) -> tuple[float, float, int]:
    """tr(Σ) = tokens · E‖∇ loss‖², each norm over ``tensors`` together.

    Args:
        losses: of one target each, 0-d with their graphs. An iterator is advanced only after the gradient of
            the previous loss was taken.
        tokens: how many tokens each loss is the mean of. Where the gradients g of a target's L tokens are
            uncorrelated with mean 0, ‖(1/L) Σ g‖² is on average 1/L of ‖g‖², and the factor L corrects for
            it. If they all agree, 1 is right, and the estimate with 1 is otherwise too small by up to L.

    Returns:
        The estimate, its standard error and the number of losses.

    Raises:
        TrainingError: fewer than two losses, one that does not depend on the tensors, or gradients that are
            all 0 or not finite.
    """
    squares = []
    for loss in losses:
        if not loss.requires_grad:
            raise TrainingError("a loss for the calibration has no graph: compute it outside torch.no_grad()")
        found = torch.autograd.grad(loss, list(tensors), allow_unused=True)
        gradients = [gradient for gradient in found if gradient is not None]
        if not gradients:
            raise TrainingError(
                "a loss for the calibration does not depend on any anchored parameter: "
                "compute it with the adapter that is anchored"
            )
        squares.append(sum(float(norm) ** 2 for norm in torch._foreach_norm(gradients)))
    if len(squares) < 2:
        raise TrainingError(f"{len(squares)} losses for the calibration: a standard error needs two or more")
    mean = math.fsum(squares) / len(squares)
    if not (math.isfinite(mean) and mean > 0):
        raise TrainingError(f"the mean squared gradient of the losses for the calibration is {mean}")
    variance = math.fsum((square - mean) ** 2 for square in squares) / (len(squares) - 1)
    return tokens * mean, tokens * math.sqrt(variance / len(squares)), len(squares)
