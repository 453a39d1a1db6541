"""The metrics of the family: what a displacement costs, its curvature, and how the decoupled form shrinks it.

Knows displacements and anchors as plain matrices (groups, n); knows nothing of adapters or weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from peso.continual.softmax_kl import Prior, automatic_temperature, softmax_kl


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
        if isinstance(self.temperature, float) and self.temperature == 1:
            return rows
        return rows.div_(self.temperature)

    def penalty(self, displacement: Tensor) -> tuple[Tensor, Tensor]:
        kl, gradient = softmax_kl(self.scaled(displacement), self.prior)
        return kl, self.scaled(gradient)

    def trace(self) -> Tensor:
        p = self.prior.weights / self.prior.total
        return (p * (1 - p)).sum(-1, keepdim=True).div_(self.temperature).div_(self.temperature).squeeze(-1)

    def shrink(self, displacement: Tensor, rate: float) -> None:
        """Δ ← μ + (Δ − μ)·exp(−rate·n·p), μ = Σ p·Δ."""
        p, total = self.prior.weights, self.prior.total
        centred = displacement - (p * displacement).sum(-1, keepdim=True) / total
        # Δ plus a change: where the rate is small, exp(−rate) itself would lose it in rounding
        change = torch.mul(p, -rate * p.shape[-1]).expm1_()
        displacement.addcmul_(centred, change)


@dataclass(frozen=True)
class DiagonalMetric:
    """½·Σ h_i·Δ_i²; H = diag(h). ``curvature``: h (groups, n), or None for 1 everywhere.

    ``mean``: of h over everything that is anchored, so that w = h / mean has mean 1.
    """

    size: tuple[int, int]
    curvature: Tensor | None = None
    mean: float = 1.0

    def penalty(self, displacement: Tensor) -> tuple[Tensor, Tensor]:
        gradient = displacement if self.curvature is None else displacement * self.curvature
        return 0.5 * torch.linalg.vecdot(gradient, displacement), gradient

    def trace(self) -> Tensor:
        if self.curvature is None:
            return torch.full((self.size[0],), float(self.size[1]))
        return self.curvature.sum(-1)

    def shrink(self, displacement: Tensor, rate: float) -> None:
        """Δ ← Δ·exp(−rate·w), w = h / mean."""
        if self.curvature is None:
            displacement.add_(displacement, alpha=math.expm1(-rate))
        else:
            displacement.addcmul_(displacement, torch.expm1(self.curvature * (-rate / self.mean)))
