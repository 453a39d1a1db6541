"""ρ̄ = tr(Σ)/tr(H), the weight of strength 1, estimated from gradients of single examples.

Near the optimum v* of the data the loss is ½(v − v*)ᵀΣ(v − v*), where Σ is the second moment of the gradients
of single target tokens. A penalty (λ/2)‖v − a‖²_H moves the solution to ρ/(ρ+λ)·v* + λ/(ρ+λ)·a along each
generalized eigendirection Σq = ρHq. So λ has to be compared with ρ, whose typical size is tr(Σ)/tr(H).
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
