"""``released_orthogonal``: the overlap with the anchor's A and B, as in the released code of PESO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from peso.adapters.proximal.orthogonal import overlap
from peso.adapters.proximal.term import Coupling, Reduction, Term
from peso.errors import TrainingError

if TYPE_CHECKING:
    from torch import Tensor

    from peso.adapters.groups import Group, Source


class ReleasedOrthogonal(Term):
    """λ · Σ_modules (‖A·Âᵀ‖_F² + ‖Bᵀ·B̂‖_F²) / modules: the ablation "orthogonal" as the authors' code
    computes it.

    Unlike in :class:`Orthogonal`, the rows of the anchor's Â are not normalized, and B is penalized, too. The
    penalty is not a distance to the anchor: it is not 0 there, and it pulls the adapter toward zero, not
    toward the anchor. B of a new adapter is 0, so the part of B is then 0, too. The term takes a weight and
    no strength, and has no decoupled form.

    Args:
        weight: λ, by default 2.0, as for the paper's term.
        reduction: by default ``mean``, as in the released code. ``sum`` does not divide by the number of
            modules.
        adapter, coupling: see :class:`~peso.adapters.proximal.term.Term`.
    """

    name = "released_orthogonal"
    default_weight = 2.0
    is_distance = False
    has_curvature = False

    _anchors: Sequence[Tensor] = ()  # (rank, width) each: A, or B transposed

    def __init__(
        self,
        weight: float | None = None,
        reduction: Reduction = "mean",
        adapter: str | None = None,
        *,
        strength: float | None = None,
        coupling: Coupling = "loss",
    ) -> None:
        super().__init__(weight, reduction, adapter, strength=strength, coupling=coupling)

    def select(self, source: Source) -> list[Group]:
        groups = [group for group in super().select(source) if group.factor]
        if not groups:
            raise TrainingError("ReleasedOrthogonal needs a model with LoRA modules: plain tensors have no A")
        return groups

    def keep(self, groups: Sequence[Group]) -> None:
        self._anchors = [_by_rank(group).detach().clone() for group in groups]

    def penalty(self, groups: Sequence[Group], scale: float) -> Tensor:
        return overlap([_by_rank(group) for group in groups], self._anchors) * scale

    def trace(self) -> float:
        raise TrainingError("ReleasedOrthogonal has no curvature for a strength: give a weight")


def _by_rank(group: Group) -> Tensor:
    """A (rank, in), or B transposed (rank, out), in float32 or better."""
    from peso.adapters.groups import placement

    matrix = group.tensor.flatten(1)
    return (matrix if group.factor == "A" else matrix.T).to(placement(group.tensor)[1])
