"""Exact softmax-KL of stacked groups: value and gradient in closed form, nothing lost to cancellation.

Knows displacements and anchors as plain matrices; knows nothing of adapters, modules or autograd.

With d = (v − a)/τ the displacement of a group from its anchor a, p = softmax(a/τ) and s = softmax(v/τ):

    ℓ = log s − log p = d − log Σ p·eᵈ
    KL(s ‖ p) = Σ p·φ(ℓ),   φ(x) = x·eˣ − (eˣ − 1) = x²/2 + x³/3 + x⁴/8 + … ≥ 0
    ∂KL/∂d = s·(ℓ − KL)

The first line follows from s = p·eᵈ / Σ p·eᵈ, the second from Σ s·ℓ and Σ p·(e^ℓ − 1) = Σ s − Σ p = 0. It
is the formula of the paper (arXiv 2510.25093) with no difference of two nearly equal sums left in it: every
term of the sum is positive, so its relative error is that of a single term.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peso.errors import TrainingError

# φ(x) / x² = Σ_{k ≥ 2} (k − 1)/k! · x^(k−2), highest power first. Below SERIES the seventh order and the
# closed form (which cancels: x·eˣ and eˣ − 1 agree to first order) are both good to about 1e-6 in float32.
SERIES = 0.1
COEFFICIENTS = (1 / 840, 1 / 144, 1 / 30, 1 / 8, 1 / 3, 1 / 2)

LEAST_TEMPERATURE = 1e-2
WIDEST = 60.0  # span of a group over its temperature: e⁻⁶⁰ / n is still a normal float32


@dataclass(frozen=True)
class Prior:
    """p = softmax(anchor / τ) of each group, computed once and used for a whole stage.

    ``weights``: (groups, n). ``total``: (groups, 1), what the rounded weights of a group sum to (1 up to
    rounding); dividing by it, not by 1, makes a group that has not moved exactly zero.
    """

    weights: Tensor
    total: Tensor

    @classmethod
    def of(cls, anchor: Tensor, temperature: float | Tensor = 1.0) -> Prior:
        """anchor: (groups, n) float32 or float64; temperature: one for all, or (groups, 1).

        The softmax is taken in float64: a float32 sum over a million values is itself off by 1e-5.
        Raises TrainingError where a weight is too small for the dtype, which would drop its value unseen.
        """
        wide = anchor.cpu() if anchor.device.type == "mps" else anchor  # MPS has no float64
        scaled = wide.double() / (temperature.to(wide) if isinstance(temperature, Tensor) else temperature)
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


def automatic_temperature(anchor: Tensor) -> Tensor:
    """Standard deviation of each anchor group, at least 1e-2: (groups, n) → (groups, 1).

    The floor is for a fresh B, which is all zeros. A group with values very far from the rest gets the
    smallest temperature at which none of its weights vanishes, if that is higher.
    """
    wide = anchor.cpu() if anchor.device.type == "mps" else anchor
    wide = wide.double()
    spread = wide.std(-1, correction=0, keepdim=True).clamp_min(LEAST_TEMPERATURE)
    span = wide.amax(-1, keepdim=True) - wide.amin(-1, keepdim=True)
    return torch.maximum(spread, span / WIDEST).to(anchor)


def softmax_kl(displacement: Tensor, prior: Prior) -> tuple[Tensor, Tensor]:
    """KL(softmax(a/τ + d) ‖ softmax(a/τ)) of every group, and its gradient with respect to d.

    Relative error about 1e-7 in float32 (value, and gradient in norm) for any d: from 1e-6, where KL is
    5e-13, to displacements that move all of the mass. The gradient with respect to v is that to d, over τ.

    Args:
        displacement: (groups, n) d, float32 or float64. It is overwritten.
        prior: of the same shape.

    Returns:
        KL (groups,) and its gradient (groups, n).
    """
    p, total = prior.weights, prior.total
    # where no value has moved far a CPU is spared a third of what follows; a GPU would have to wait to know
    near = displacement.device.type == "cpu" and float(displacement.abs().amax()) < SERIES / 2
    # log Σ p·eᵈ in two passes. The first subtracts the maximum, so nothing overflows, and is good to 1e-7
    # absolute, which is worse than nothing where d is 1e-6 (near the anchor Σ p·d is as good a guess) ...
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
        terms = torch.where(log_ratio.abs() < SERIES, series, _closed(log_ratio, moved, p, scratch))
    kl = terms.sum(-1)
    gradient = moved.add_(p).mul_(log_ratio.sub_(kl.unsqueeze(-1)))
    return kl, gradient


def _closed(log_ratio: Tensor, moved: Tensor, p: Tensor, scratch: Tensor) -> Tensor:
    """p·φ(ℓ) without the series, into ``scratch``; ``moved``: s − p.

    As ℓ·(s − p) − (s − p) + p·ℓ: the product p·(e^ℓ − 1) never overflows, e^ℓ·ℓ might.
    """
    return torch.mul(log_ratio, moved, out=scratch).sub_(moved).addcmul_(p, log_ratio)


def second_order(displacement: Tensor, prior: Prior) -> Tensor:
    """½·Var_p(d) of every group: what the KL tends to as d shrinks. (groups, n) → (groups,)."""
    p, total = prior.weights, prior.total
    centred = displacement - (p * displacement).sum(-1, keepdim=True) / total
    centred = centred - (p * centred).sum(-1, keepdim=True) / total  # a common shift may dwarf the rest
    return 0.5 * (p * centred.square()).sum(-1)
