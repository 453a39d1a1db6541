"""ρ̄ = tr(Σ)/tr(H): what one unit of strength is in raw weight, estimated from gradients of single examples.

Knows losses and the tensors they depend on; knows nothing of terms, models or data.

Near the optimum v* of the data the loss is ½(v − v*)ᵀΣ(v − v*), with Σ the second moments of the gradients of
single target tokens. A penalty (λ/2)‖v − a‖²_H moves the solution to ρ/(ρ+λ)·v* + λ/(ρ+λ)·a along each
generalised eigendirection Σq = ρHq, so λ is to be read against ρ, and tr(Σ)/tr(H) is the size that ρ has.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peso.errors import TrainingError


@dataclass(frozen=True)
class Calibration:
    """``rho``: ρ̄, the weight that strength 1 is; ``standard_error``: of it, over the ``examples``."""

    rho: float
    standard_error: float
    examples: int

    def weight(self, strength: float) -> float:
        """λ = s · ρ̄."""
        return strength * self.rho


def second_moment(
    tensors: Sequence[Tensor], losses: Iterable[Tensor], tokens: float = 1.0
) -> tuple[float, float, int]:
    """tr(Σ) = tokens · E‖∇ loss‖², each norm over ``tensors`` together.

    Args:
        losses: 0-d each, with its graph, of one target each; computed one after another if it is an iterator.
        tokens: how many tokens each loss is the mean of. Where the gradients g of a target's L tokens are
            uncorrelated with mean 0, ‖(1/L) Σ g‖² is on average 1/L of ‖g‖², and L makes up for it. With 1
            the estimate is that of the target's own curvature if they all agree: too small by up to L.

    Returns:
        The estimate, its standard error and the number of losses.

    Raises:
        TrainingError: fewer than two losses, one that does not depend on the tensors, or no finite gradient
            other than 0.
    """
    squares = []
    for loss in losses:
        if not loss.requires_grad:
            raise TrainingError("a loss to calibrate with has no graph: compute it outside torch.no_grad()")
        found = torch.autograd.grad(loss, list(tensors), allow_unused=True)
        gradients = [gradient for gradient in found if gradient is not None]
        if not gradients:
            raise TrainingError(
                "a loss to calibrate with does not depend on any anchored parameter: "
                "compute it with the adapter that is anchored"
            )
        squares.append(sum(float(norm) ** 2 for norm in torch._foreach_norm(gradients)))
    if len(squares) < 2:
        raise TrainingError(f"{len(squares)} losses to calibrate with: a spread needs two or more")
    mean = math.fsum(squares) / len(squares)
    if not (math.isfinite(mean) and mean > 0):
        raise TrainingError(f"the mean squared gradient of the losses to calibrate with is {mean}")
    variance = math.fsum((square - mean) ** 2 for square in squares) / (len(squares) - 1)
    return tokens * mean, tokens * math.sqrt(variance / len(squares)), len(squares)
