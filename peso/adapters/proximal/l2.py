"""``l2``: the squared distance to the anchor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peso.adapters.proximal.term import DistanceTerm

if TYPE_CHECKING:
    from peso.adapters.groups import Stack
    from peso.adapters.proximal.metrics import DiagonalMetric


class L2(DistanceTerm):
    """λ · ½ · Σ_g ‖v⁽ᵍ⁾ − a⁽ᵍ⁾‖², H = I: with the ½, so that λ is that of the general form (λ/2)·‖·‖²_H.

    The decoupled form is Δ ← Δ·exp(−lr·κ). How values are grouped makes no difference. For the arguments see
    :class:`~peso.adapters.proximal.term.Term`.
    """

    name = "l2"

    def metric(self, stack: Stack) -> DiagonalMetric:
        from peso.adapters.proximal.metrics import DiagonalMetric

        return DiagonalMetric(stack.anchor.shape)
