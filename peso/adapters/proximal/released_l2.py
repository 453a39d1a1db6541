"""``released_l2``: the distance to the anchor, not squared, as in the released code of PESO."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peso.adapters.proximal.term import Coupling, DistanceTerm, Reduction

if TYPE_CHECKING:
    from peso.adapters.groups import Stack
    from peso.adapters.proximal.metrics import Distance


class ReleasedL2(DistanceTerm):
    """λ · Σ_modules (‖A − Â‖_F + ‖B − B̂‖_F) / modules: the ablation "L2" as the authors' code computes it.

    The text of the paper (arXiv 2510.25093) suggests a squared distance, which is :class:`L2`. Without the
    square, the gradient of each group has length λ / modules wherever the adapter is, so the term restrains
    small steps as much as large ones, and acts at a weight at which the released softmax-KL has no effect. At
    the anchor itself the gradient is 0. It has no Hessian there, so it takes a weight and no strength, and it
    has no decoupled form.

    Args:
        weight: λ, by default 2.0, as for the paper's term.
        reduction: by default ``mean``, as in the released code. ``sum`` does not divide by the number of
            modules.
        adapter, strength, coupling, groups: see :class:`~peso.adapters.proximal.term.Term` and
            :class:`~peso.adapters.proximal.term.DistanceTerm`.
    """

    name = "released_l2"
    default_weight = 2.0
    has_decoupled_form = False
    has_curvature = False

    def __init__(
        self,
        weight: float | None = None,
        reduction: Reduction = "mean",
        adapter: str | None = None,
        *,
        strength: float | None = None,
        coupling: Coupling = "loss",
        **options: Any,
    ) -> None:
        super().__init__(weight, reduction, adapter, strength=strength, coupling=coupling, **options)

    def metric(self, stack: Stack) -> Distance:
        from peso.adapters.proximal.metrics import Distance

        return Distance()
