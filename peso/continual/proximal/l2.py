"""``l2``: the squared distance to the anchor."""

from __future__ import annotations

from torch import Tensor

from peso.continual.proximal.anchored import AnchoredTerm
from peso.continual.proximal.metrics import DiagonalMetric
from peso.continual.proximal.term import Coupling, Reduction
from peso.continual.stacks import Gather, Metric


class L2(AnchoredTerm):
    """λ · ½ · Σ_g ‖v⁽ᵍ⁾ − a⁽ᵍ⁾‖², H = I: with the ½, so that λ is that of the general form (λ/2)·‖·‖²_H.

    The decoupled form is Δ ← Δ·exp(−lr·κ). How values are grouped makes no difference.

    Args:
        weight: λ. Neither it nor a strength given: strength 1.
        reduction, adapter, strength, coupling: see :class:`~peso.continual.proximal.term.Term`.

    Raises:
        ConfigError: an impossible argument.
    """

    def __init__(
        self,
        weight: float | None = None,
        reduction: Reduction = "sum",
        adapter: str | None = None,
        *,
        strength: float | None = None,
        coupling: Coupling = "loss",
    ) -> None:
        super().__init__(weight, reduction, adapter, strength=strength, coupling=coupling)

    def metric(self, anchor: Tensor, gather: Gather) -> Metric:
        return DiagonalMetric((anchor.shape[0], anchor.shape[1]))
