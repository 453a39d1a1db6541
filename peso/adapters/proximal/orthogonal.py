"""``orthogonal``: a penalty on using the same input directions as the anchor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from peso.adapters.proximal.term import Term
from peso.errors import TrainingError

if TYPE_CHECKING:
    from torch import Tensor

    from peso.adapters.groups import Group, Source


class Orthogonal(Term):
    """λ · Σ_modules ‖A·Âᵀ‖_F², where Â is the anchor's A with rows of length 1.

    This is the penalty of O-LoRA (Wang et al. 2023, arXiv 2310.14152), applied to the single evolving adapter
    as in the ablation of PESO (arXiv 2510.25093). In O-LoRA, Â is not normalized and belongs to another,
    frozen adapter. The penalty is not a distance to the anchor: it is not 0 there, and it pushes the adapter
    away from it. It affects only A, not B or tensors outside of LoRA modules. It has no decoupled form.

    Args:
        weight: λ. By default 0.5, as in O-LoRA, unless a strength is given.
        strength: λ = strength · ρ̄ with tr(H) = Σ_modules 2·r·‖Â‖_F². It sets the scale, but there is no
            interpolation with the anchor.
        reduction, adapter, coupling: see :class:`~peso.adapters.proximal.term.Term`.
    """

    name = "orthogonal"
    default_weight = 0.5
    is_distance = False

    _directions: Sequence[Tensor] = ()  # (rank, in) each, with rows of length 1, or 0 if the row of A is 0

    def select(self, source: Source) -> list[Group]:
        groups = [group for group in super().select(source) if group.factor == "A"]
        if not groups:
            raise TrainingError("Orthogonal needs a model with LoRA modules: plain tensors have no A")
        return groups

    def keep(self, groups: Sequence[Group]) -> None:
        from torch.nn.functional import normalize

        self._directions = [normalize(_rows(group.tensor.detach()), dim=-1) for group in groups]

    def penalty(self, groups: Sequence[Group], scale: float) -> Tensor:
        return overlap([_rows(group.tensor) for group in groups], self._directions) * scale

    def trace(self) -> float:
        return sum(2 * len(rows) * float(rows.square().sum()) for rows in self._directions)


def overlap(current: Sequence[Tensor], anchors: Sequence[Tensor]) -> Tensor:
    """Σ ‖X·X̂ᵀ‖_F² over pairs of matrices (rank, width) each, 0-d, differentiable with respect to X."""
    import torch

    from peso.adapters.groups import placement

    alike = defaultdict(list)  # one product for all modules of the same size
    for rows, directions in zip(current, anchors, strict=True):
        alike[rows.shape, placement(rows)].append((rows, directions.to(rows)))
    parts = []
    for pairs in alike.values():
        rows, directions = (torch.stack(side) for side in zip(*pairs, strict=True))
        with torch.autocast(rows.device.type, enabled=False):
            parts.append(torch.bmm(rows, directions.mT).square().sum())
    return sum((part.to(parts[0].device) for part in parts[1:]), parts[0])


def _rows(matrix: Tensor) -> Tensor:
    """The matrix as (rank, in), in float32 or better."""
    from peso.adapters.groups import placement

    return matrix.flatten(1).to(placement(matrix)[1])
