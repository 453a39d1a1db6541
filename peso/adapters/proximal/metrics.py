"""The cost of a displacement from the anchor, its curvature at the anchor, and the decoupled form.

Everything is a plain matrix (groups, n). Softmax-KL is exact: value and gradient are in closed form, without
cancellation. With d = (v − a)/τ, p = softmax(a/τ) and s = softmax(v/τ) for a group v with anchor a:

    ℓ = log s − log p = d − log Σ p·eᵈ
    KL(s ‖ p) = Σ p·φ(ℓ),   φ(x) = x·eˣ − (eˣ − 1) = x²/2 + x³/3 + x⁴/8 + … ≥ 0
    ∂KL/∂d = s·(ℓ − KL)

The first line follows from s = p·eᵈ / Σ p·eᵈ, the second from KL = Σ s·ℓ and Σ p·(e^ℓ − 1) = Σ s − Σ p = 0.
This is the formula of the paper (arXiv 2510.25093) without a difference of two nearly equal sums. Every term
of the sum is positive, so its relative error is that of a single term.

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

# φ(x) / x² = Σ_{k ≥ 2} (k − 1)/k! · x^(k−2), highest power first. The closed form cancels near 0, because
# x·eˣ and eˣ − 1 agree to first order. At SERIES, it and the series of seventh order are both accurate to
# about 1e-6 in float32.
SERIES = 0.1
COEFFICIENTS = (1 / 840, 1 / 144, 1 / 30, 1 / 8, 1 / 3, 1 / 2)
# Up to this KL, and this largest |ℓ|, ℓ − KL does not cancel: KL is at most about the standard deviation of ℓ
# under s.
FLAT_KL, FLAT_RATIO = 0.5, 2.0

LEAST_TEMPERATURE = 1e-2
WIDEST = 60.0  # the largest span of a group over its temperature: e⁻⁶⁰ / n is still a normal float32


@dataclass(frozen=True)
class Prior:
    """p = softmax(anchor / τ) of each group, computed once per stage.

    Attributes:
        weights: p, (groups, n).
        total: (groups, 1), the sum of each group's rounded weights. Dividing by it instead of by 1 makes the
            KL of a group that has not moved exactly zero.
    """

    weights: Tensor
    total: Tensor

    @classmethod
    def of(cls, anchor: Tensor, temperature: float | Tensor = 1.0) -> Prior:
        """Compute p in float64, because a float32 sum over a million values has an error of 1e-5.

        Args:
            anchor: (groups, n), float32 or float64.
            temperature: τ, one for all groups or (groups, 1).

        Raises:
            TrainingError: a weight underflows in the dtype, so that its value would be ignored.
        """
        wide = _wide(anchor)
        scaled = wide / (temperature.to(wide) if isinstance(temperature, Tensor) else temperature)
        weights = torch.softmax(scaled, dim=-1).to(anchor)
        if bool((weights < torch.finfo(anchor.dtype).tiny).any()):
            spread = float((anchor.amax(-1) - anchor.amin(-1)).max())
            shown = float(temperature.min()) if isinstance(temperature, Tensor) else temperature
            raise TrainingError(
                f"temperature {shown:g} is too small for an anchor group whose values span {spread:g}: "
                f"some of its softmax weights underflow in {anchor.dtype}. Use a temperature above "
                f"{spread / WIDEST:.2g}"
            )
        return cls(weights, weights.sum(-1, keepdim=True))

    def centered(self, displacement: Tensor) -> Tensor:
        """Δ − μ with μ = Σ p·Δ of each group: (groups, n)."""
        return displacement - (self.weights * displacement).sum(-1, keepdim=True) / self.total


def automatic_temperature(anchor: Tensor) -> Tensor:
    """The standard deviation of each anchor group, at least 1e-2: (groups, n) → (groups, 1).

    The minimum is needed for a new B, which is zero. A group with outliers gets the smallest temperature at
    which none of its weights underflows, if that is higher.
    """
    wide = _wide(anchor)
    spread = wide.std(-1, correction=0, keepdim=True).clamp_min(LEAST_TEMPERATURE)
    span = wide.amax(-1, keepdim=True) - wide.amin(-1, keepdim=True)
    return torch.maximum(spread, span / WIDEST).to(anchor)


def _wide(anchor: Tensor) -> Tensor:
    """The anchor in float64. MPS has no float64, so its tensors are copied to the CPU."""
    return (anchor.cpu() if anchor.device.type == "mps" else anchor).double()


def softmax_kl(displacement: Tensor, prior: Prior) -> tuple[Tensor, Tensor]:
    """KL(softmax(a/τ + d) ‖ softmax(a/τ)) of every group, and its gradient with respect to d.

    In float32, the relative error of the value is about 1e-7 to 1e-6, from d of 1e-6, where the KL is 5e-13,
    to displacements that move all of the mass. In general, the error of the value is at most 1e-5 of it plus
    2⁻²³·max|d|·‖∂KL/∂d‖₁, and that of the gradient (in norm) at most 1e-5 of it plus 2⁻²³·max|d|·‖s‖. The
    second parts are the rounding of d itself. They matter where many values have moved by about the same
    large amount, for instance half of a group by 20 τ (a relative error of the gradient of 6e-4), or all of
    it by 20 τ ± 0.001 τ (of the value, too): the KL is then nearly flat, and depends on differences that
    float32 does not hold. The gradient with respect to v is the gradient with respect to d divided by τ.

    Args:
        displacement: d (groups, n), float32 or float64. It is overwritten.
        prior: the prior of the same groups.

    Returns:
        KL (groups,) and its gradient (groups, n).
    """
    p, total = prior.weights, prior.total
    on_cpu = displacement.device.type == "cpu"
    # if no value has moved far, a CPU skips a third of the computation; on a GPU the check would cost a sync
    near = on_cpu and float(displacement.abs().amax()) < SERIES / 2
    # log Σ p·eᵈ in two passes. The first subtracts the maximum, so that nothing overflows. Its absolute error
    # of 1e-7 is too large if d is 1e-6 (near the anchor, Σ p·d is an equally good estimate) ...
    if near:
        scratch = p * displacement
        log_ratio = displacement.sub_(scratch.sum(-1, keepdim=True) / total)  # |ℓ| < SERIES from here on
    else:
        top = displacement.amax(-1, keepdim=True)
        scratch = torch.sub(displacement, top).exp_().mul_(p)
        log_ratio = displacement.sub_(top + (scratch.sum(-1, keepdim=True) / total).log())
    # ... the second corrects the remainder to a relative error of 1e-7: Σ p·(e^ℓ − 1) must be 0.
    growth = torch.expm1(log_ratio)  # e^ℓ − 1
    left = torch.mul(p, growth, out=scratch).sum(-1, keepdim=True) / total
    log_ratio.sub_(left.log1p())
    growth.sub_(left).div_(1 + left)
    far = not near and (not on_cpu or float(torch.linalg.vector_norm(log_ratio, math.inf)) > FLAT_RATIO)

    moved = growth.mul_(p)  # s − p
    series = log_ratio * COEFFICIENTS[0]
    for coefficient in COEFFICIENTS[1:]:
        series.add_(coefficient).mul_(log_ratio)
    terms = series.mul_(log_ratio).mul_(p)
    if not near:
        # p·φ(ℓ) as ℓ·(s − p) − (s − p) + p·ℓ: the product p·(e^ℓ − 1) never overflows, but e^ℓ·ℓ could
        closed = torch.mul(log_ratio, moved, out=scratch).sub_(moved).addcmul_(p, log_ratio)
        terms = torch.where(log_ratio.abs() < SERIES, series, closed)
    kl = terms.sum(-1)
    if near or (not far and float(kl.amax()) < FLAT_KL):
        return kl, moved.add_(p).mul_(log_ratio.sub_(kl.unsqueeze(-1)))
    # If the values that have nearly all of the mass moved alike, ℓ and KL are nearly equal for them, and
    # s = (s − p) + p cancels for the others. Relative to the largest, whose own ℓ becomes 0, nothing cancels.
    shares = torch.exp(log_ratio, out=moved).mul_(p)
    seen = log_ratio.sub_(log_ratio.gather(-1, shares.argmax(-1, keepdim=True)))
    mean = torch.mul(shares, seen, out=scratch).sum(-1, keepdim=True) / shares.sum(-1, keepdim=True)
    return kl, shares.mul_(seen.sub_(mean))


def second_order(displacement: Tensor, prior: Prior) -> Tensor:
    """½·Var_p(d) of every group, which the KL approaches for small d: (groups, n) → (groups,)."""
    centered = prior.centered(prior.centered(displacement))  # twice, because a common shift may be large
    return 0.5 * (prior.weights * centered.square()).sum(-1)


def shrink(
    displacement: Tensor, weights: Tensor | float, rate: float, centered: Tensor | None = None
) -> None:
    """The decoupled pull in place: Δ ← Δ + (Δ − μ)·(exp(−rate·w) − 1), which is μ + (Δ − μ)·exp(−rate·w).

    It is computed as a change of Δ, because exp(−rate·w) would lose a small rate by rounding.

    Args:
        displacement: Δ (groups, n).
        weights: w, of the same shape or one value for all.
        rate: lr · κ divided by the mean of the weights.
        centered: Δ − μ; None if μ is 0.
    """
    if isinstance(weights, Tensor):
        displacement.addcmul_(
            displacement if centered is None else centered, torch.mul(weights, -rate).expm1_()
        )
    else:
        displacement.add_(displacement, alpha=math.expm1(-rate * weights))


@dataclass(frozen=True)
class Hessian:
    """The Hessian H of groups of the same size at the anchor: s·diag(w), or s·(diag(w) − w·wᵀ) if
    ``centered``.

    Values with w = 0 are not restrained and are left out.

    Attributes:
        weights: w (groups, n). In a centered group it sums to 1.
        scale: s, (groups, 1) or one value for all.
        centered: which of the two forms H has.
        mean: the mean of w over all anchored values, so that w / mean are the weights of the decoupled form.
    """

    weights: Tensor
    scale: Tensor | float = 1.0
    centered: bool = False
    mean: float = 1.0

    def double(self, divisor: int) -> Hessian:
        """H / divisor in float64, with scale (groups, 1) and with centered weights that sum to 1 in
        float64."""
        weights = self.weights.double()
        if self.centered:
            weights = weights / weights.sum(-1, keepdim=True)
        scale = torch.as_tensor(self.scale).double() / divisor * torch.ones_like(weights[:, :1])
        return replace(self, weights=weights, scale=scale)

    def of_groups(self, place: slice) -> Hessian:
        """The Hessian of some of the groups. ``scale`` must be a tensor, as after :meth:`double`."""
        assert isinstance(self.scale, Tensor)
        return replace(self, weights=self.weights[place], scale=self.scale[place])

    def trace(self) -> Tensor:
        """tr(H) of each group: (groups,)."""
        restrained = self.weights * (1 - self.weights) if self.centered else self.weights
        return (self.scale * restrained).sum(-1)

    def dual(self, gradients: Tensor) -> Tensor:
        """The duals t of gradients (…, groups, n). If ``centered``, they act on steps with wᵀd = 0."""
        if not self.centered:
            return torch.where(self.weights > 0, gradients, 0.0)
        return gradients - self.weights * gradients.sum(-1, keepdim=True)

    def step(self, duals: Tensor) -> Tensor:
        """The steps x with Hx = t, and with wᵀx = 0 if ``centered``: (…, groups, n)."""
        diagonal = self.scale * self.weights
        return torch.where(diagonal > 0, duals / diagonal, 0.0)

    def inner(self, one: Tensor, other: Tensor) -> Tensor:
        """⟨one, other⟩_H of two steps (groups, n), 0-d."""
        if self.centered:
            one = one - (self.weights * one).sum(-1, keepdim=True)
            other = other - (self.weights * other).sum(-1, keepdim=True)
        return (self.scale * self.weights * one * other).sum()


class Metric(Protocol):
    """The penalty of the groups of one stack for a displacement from their anchor."""

    def penalty(self, displacement: Tensor) -> tuple[Tensor, Tensor]:
        """The penalty (groups,) and its gradient (groups, n), given v − a (groups, n), which may be
        overwritten."""
        ...

    def hessian(self) -> Hessian:
        """The Hessian of the penalty at the anchor."""
        ...

    def shrink(self, displacement: Tensor, rate: float) -> None:
        """Apply the decoupled pull to v − a (groups, n) in place, with ``rate`` = lr · κ."""
        ...


@dataclass(frozen=True)
class SoftmaxMetric:
    """KL(softmax(v/τ) ‖ softmax(a/τ)), with H = (diag(p) − p·pᵀ)/τ². ``temperature`` is τ, one value or
    (groups, 1)."""

    prior: Prior
    temperature: float | Tensor

    @classmethod
    def of(cls, anchor: Tensor, temperature: float | str) -> SoftmaxMetric:
        """The metric around an anchor (groups, n), with a temperature or ``auto``."""
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
    """½·Σ h_i·Δ_i², with H = diag(h).

    Attributes:
        size: (groups, n).
        curvature: h (groups, n); None if it is 1 for all values.
        mean: the mean of h over all anchored values, so that w = h / mean has mean 1.
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
class Distance:
    """‖Δ‖ of each group. It is not smooth at the anchor, so it has neither a Hessian nor a decoupled form."""

    def penalty(self, displacement: Tensor) -> tuple[Tensor, Tensor]:
        distance = torch.linalg.vector_norm(displacement, dim=-1)
        # 0 at the anchor, as autograd has it
        return distance, displacement / distance.clamp_min(torch.finfo(distance.dtype).tiny).unsqueeze(-1)

    def hessian(self) -> Hessian:
        raise TrainingError("a distance that is not squared has no curvature at the anchor")

    def shrink(self, displacement: Tensor, rate: float) -> None:
        raise TrainingError("a distance that is not squared has no decoupled form")


@dataclass(frozen=True)
class Calibration:
    """ρ̄ (``rho``), with its standard error over the ``examples``."""

    rho: float
    standard_error: float
    examples: int


def second_moment(
    tensors: Sequence[Tensor], losses: Iterable[Tensor], tokens: float = 1.0
) -> tuple[float, float, int]:
    """Estimate tr(Σ) = tokens · E‖∇ loss‖², where the norm is over all ``tensors``.

    Args:
        tensors: the parameters.
        losses: losses of single targets, 0-d with their graphs. If it is an iterator, the next loss is
            requested only after the gradient of the previous one was computed.
        tokens: the number of tokens that each loss is the mean of. If the gradients g of a target's L tokens
            are uncorrelated with mean 0, ‖(1/L) Σ g‖² is on average 1/L of ‖g‖², and the factor L corrects
            for this. If they are all equal, 1 is correct. Otherwise, the estimate with 1 is too small by a
            factor of up to L.

    Returns:
        The estimate, its standard error, and the number of losses.

    Raises:
        TrainingError: there are fewer than two losses, a loss does not depend on the tensors, or gradients
            are all 0 or not finite.
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
        raise TrainingError(
            f"there are {len(squares)} losses for the calibration, but a standard error needs two or more"
        )
    mean = math.fsum(squares) / len(squares)
    if not (math.isfinite(mean) and mean > 0):
        raise TrainingError(f"the mean squared gradient of the losses for the calibration is {mean}")
    variance = math.fsum((square - mean) ** 2 for square in squares) / (len(squares) - 1)
    return tokens * mean, tokens * math.sqrt(variance / len(squares)), len(squares)
