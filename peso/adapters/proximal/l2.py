"""``l2``: the squared distance to the anchor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peso.adapters.proximal.term import DistanceTerm

if TYPE_CHECKING:
    from peso.adapters.groups import Stack
    from peso.adapters.proximal.metrics import DiagonalMetric


class L2(DistanceTerm):
    """λ · ½ · Σ_g ‖v⁽ᵍ⁾ − a⁽ᵍ⁾‖², with H = I. The factor ½ makes λ the same as in the general form
    (λ/2)·‖·‖²_H.

    The decoupled form is Δ ← Δ·exp(−lr·κ). The grouping of values makes no difference. See
    :class:`~peso.adapters.proximal.term.Term` for the arguments.
    """

    name = "l2"

    def metric(self, stack: Stack) -> DiagonalMetric:
        from peso.adapters.proximal.metrics import DiagonalMetric

        return DiagonalMetric(stack.anchor.shape)
