"""Directions of layer inputs: which ones earlier inputs take up, and which of the rest new inputs use.

Pure linear algebra of DualGPM (Liang & Li, CVPR 2023 and 2024): tensors in, tensors out. Knows second moments
of inputs; knows nothing of layers, adapters or stages.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDING = 1e-10  # of all energy: directions with less of it are rounding


@dataclass(frozen=True)
class Protected:
    """A subspace of inputs, kept by a basis of itself or of what is left over, whichever is smaller.

    ``basis``: (width, directions), orthonormal columns; ``dual``: they span what is free instead.
    """

    basis: Tensor
    dual: bool

    @classmethod
    def nothing(cls, width: int) -> Protected:
        return cls(torch.zeros(width, 0), dual=False)

    @property
    def free(self) -> int:
        """Dimensions that are not protected."""
        width, directions = self.basis.shape
        return directions if self.dual else width - directions

    def within_free(self, moment: Tensor) -> Tensor:
        """P C P, P the projection onto what is free: (width, width), float64."""
        basis, result = self.basis.to(moment).double(), moment.double()
        onto = basis @ basis.T
        project = onto if self.dual else torch.eye(len(basis), dtype=onto.dtype, device=onto.device) - onto
        return project @ result @ project

    def grown(self, moment: Tensor, threshold: float) -> Protected:
        """With as many further directions, strongest first, as it takes for the share ``threshold`` of the
        energy of these inputs (the trace of their second moment) to lie in what is protected."""
        energies, directions = _strongest_first(self.within_free(moment))
        free_energy = energies.flip(0).cumsum(0).flip(0)  # left free if all before are protected
        allowed = (1 - threshold) * float(moment.double().trace())
        count = min(int((free_energy > allowed + ROUNDING * float(moment.double().trace())).sum()), self.free)
        if count == 0:
            return self
        new = directions[:, :count].cpu()
        basis = self.basis.double()
        if self.dual:
            # the free part is what is left of it: its own coordinates, the new directions taken out
            left = torch.linalg.qr(basis.T @ new, mode="complete")[0][:, count:]
            return Protected((basis @ left).float(), dual=True)
        basis = torch.cat([basis, new], dim=1)
        if basis.shape[1] <= len(basis) / 2:
            return Protected(_orthonormal(basis).float(), dual=False)
        complement = torch.linalg.qr(basis, mode="complete")[0][:, basis.shape[1] :]
        return Protected(complement.float(), dual=True)

    def free_directions(self, moment: Tensor, count: int) -> Tensor:
        """(count, width) orthonormal rows: the free directions in which these inputs have most energy. Rows
        beyond those in which they have any are zero: nothing could be learnt along them."""
        energies, directions = _strongest_first(self.within_free(moment))
        strong = energies[:count] > ROUNDING * float(moment.double().trace())
        return (directions[:, :count] * strong).T.float()


def _strongest_first(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n,), rounding below zero removed, and eigenvectors in columns."""
    values, vectors = torch.linalg.eigh(symmetric)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def _orthonormal(columns: Tensor) -> Tensor:
    """The same span; a chain of many stages would let rounding grow."""
    return torch.linalg.qr(columns)[0]
