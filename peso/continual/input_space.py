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

    def strongest_free(self, moment: Tensor) -> tuple[Tensor, Tensor]:
        """Energies (free,) of these inputs in what is free, strongest first; the directions, (width, free).

        In coordinates of the free space, so that nothing of a direction leaks into what is protected, however
        much stronger the inputs are there. float64, on the moment's device.
        """
        inside = self._free_basis().to(moment.device)
        energies, directions = torch.linalg.eigh(inside.T @ moment.double() @ inside)
        return energies.flip(0).clamp_min(0), inside @ directions.flip(1)

    def _free_basis(self) -> Tensor:
        """(width, free) orthonormal columns, float64; the stored float32 ones are so to 1e-7 only."""
        basis = self.basis.double()
        if self.dual:
            return _orthonormal(basis)
        return torch.linalg.qr(basis, mode="complete")[0][:, basis.shape[1] :]

    def grown(self, moment: Tensor, threshold: float) -> Protected:
        """With as many further directions, strongest first, as it takes for the share ``threshold`` of the
        energy of these inputs (the trace of their second moment) to lie in what is protected."""
        energies, directions = self.strongest_free(moment)
        free_energy = energies.flip(0).cumsum(0).flip(0)  # left free if all before are protected
        allowed = (1 - threshold) * float(moment.double().trace())
        count = int((free_energy > allowed + ROUNDING * float(moment.double().trace())).sum())
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
        energies, directions = self.strongest_free(moment)
        strong = energies[:count] > ROUNDING * float(moment.double().trace())
        rows = moment.new_zeros(count, len(moment), dtype=torch.float32)
        rows[: len(strong)] = (directions[:, :count] * strong).T.float()
        return rows


def _orthonormal(columns: Tensor) -> Tensor:
    """The same span; a chain of many stages would let rounding grow."""
    return torch.linalg.qr(columns)[0]
