"""``orthogonal``: the adapter shall not use the directions that the anchor reads."""

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
    """λ · Σ_modules ‖A·Âᵀ‖_F², Â the anchor's A with rows of length 1.

    The penalty of O-LoRA (Wang et al. 2023, arXiv 2310.14152; there Â is not normalized and belongs to
    another, frozen adapter) on the one evolving adapter, as in the ablation of PESO (arXiv 2510.25093). It is
    not a distance to the anchor: it is not 0 there, and descending it leads away. Only A matters; B and
    tensors outside LoRA modules are left alone. It has no decoupled form.

    Args:
        weight: λ; 0.5, O-LoRA's, if neither it nor a strength is given.
        strength: λ = strength · ρ̄ with tr(H) = Σ_modules 2·r·‖Â‖_F²: it sets the scale, but there is no
            interpolation to the anchor.
        reduction, adapter, coupling: see :class:`~peso.adapters.proximal.term.Term`.
    """

    name = "orthogonal"
    default_weight = 0.5
    is_distance = False

    _directions: Sequence[Tensor] = ()  # (rank, in) each, rows of length 1, or 0 where A has none

    def select(self, source: Source) -> list[Group]:
        groups = [group for group in super().select(source) if group.factor == "A"]
        if not groups:
            raise TrainingError("Orthogonal needs a model with LoRA modules: plain tensors have no A")
        return groups

    def keep(self, groups: Sequence[Group]) -> None:
        from torch.nn.functional import normalize

        self._directions = [normalize(_rows(group.tensor.detach()), dim=-1) for group in groups]

    def penalty(self, groups: Sequence[Group], scale: float) -> Tensor:
        import torch

        from peso.adapters.groups import placement

        alike = defaultdict(list)  # one product for all modules of a size
        for group, directions in zip(groups, self._directions, strict=True):
            rows = _rows(group.tensor)
            alike[rows.shape, placement(rows)].append((rows, directions.to(rows)))
        parts = []
        for pairs in alike.values():
            rows, directions = (torch.stack(side) for side in zip(*pairs, strict=True))
            with torch.autocast(rows.device.type, enabled=False):
                parts.append(torch.bmm(rows, directions.mT).square().sum())
        return sum((part.to(parts[0].device) for part in parts[1:]), parts[0]) * scale

    def trace(self) -> float:
        return sum(2 * len(rows) * float(rows.square().sum()) for rows in self._directions)


def _rows(matrix: Tensor) -> Tensor:
    """(rank, in) in float32 or better."""
    from peso.adapters.groups import placement

    return matrix.flatten(1).to(placement(matrix)[1])
