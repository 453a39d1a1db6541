"""Proximal terms on small groups, and the metric of each written out by hand."""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch

import peso

TERMS = {
    "l2": lambda **options: peso.L2(**options),
    "softmax": lambda **options: peso.SoftmaxKL(**options),
    "auto": lambda **options: peso.SoftmaxKL(temperature="auto", **options),
    "mean": lambda **options: peso.SoftmaxKL(temperature=0.3, **{"reduction": "mean", **options}),
    "all": lambda **options: peso.SoftmaxKL(groups="all", temperature=0.5, **options),
}


SIZES = (12, 7, 12)


def tensors(seed: int, scale: float = 1.0, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(size, generator=generator, dtype=torch.float64) * scale for size in SIZES]
    return [value.to(dtype).requires_grad_() for value in values]


def flat(values) -> torch.Tensor:
    return torch.cat([value.reshape(-1) for value in values])


def known_metric(name: str, anchor: list[torch.Tensor]) -> np.ndarray:
    """H as design says: I, or (diag(p) − p·pᵀ)/τ² of every group."""
    if name == "l2":
        return np.eye(sum(SIZES))
    groups = [flat(anchor)] if name == "all" else anchor
    blocks = []
    for group in groups:
        values = group.detach().numpy()
        tau = {"softmax": 1.0, "auto": values.std(), "mean": 0.3, "all": 0.5}[name]
        p = np.exp(values / tau) / np.exp(values / tau).sum()
        blocks.append((np.diag(p) - np.outer(p, p)) / tau**2)
    return scipy.linalg.block_diag(*blocks) / len(SIZES)  # reduction: mean, over three modules
