"""``softmax_kl``: the distance between groups read as distributions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from peso.adapters.proximal.term import Coupling, DistanceTerm, Reduction
from peso.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from peso.adapters.groups import Grouping, Stack
    from peso.adapters.proximal.metrics import SoftmaxMetric


class SoftmaxKL(DistanceTerm):
    """λ · Σ_g KL( softmax(v⁽ᵍ⁾/τ) ‖ softmax(a⁽ᵍ⁾/τ) ): the proximal term of PESO (arXiv 2510.25093).

    A group is the flattened A, or the flattened B, of one module. Value and gradient are exact to 1e-5
    relative at any distance and for any dtype of the parameters (``proximal/metrics.py``). ::

        term = peso.SoftmaxKL(weight=2.0)
        term.anchor(model)                    # as it is now: the end of the previous stage
        loss = outputs.loss + term(model)     # 0 at the anchor

    To second order it is (λ/2)·Σ_g ‖v − a‖²_H with H = (diag(p) − p·pᵀ)/τ², p = softmax(a/τ). The decoupled
    form shrinks around μ = Σ p·Δ with weights w = n·p: a shift common to a group stays, as it does in the KL.
    (μ itself moves a little as the rest shrinks where p is not uniform; what a shrinking displacement
    conserves is, to first order in the rate, its plain mean.)

    Args:
        weight: λ; 2.0, the paper's, with ``loss`` if neither it nor a strength is given.
        reduction: ``mean``, the paper's released code: A and B of one module added, then divided by the
            number of modules; or ``sum`` over the groups, the paper's formula.
        temperature: τ. At 1 the prior of a real adapter is nearly uniform. ``auto``: the standard deviation
            of each anchor group, at least 1e-2.
        groups: ``factor``: A and B of each module apart; ``module``: together; ``rank``: row i of A with
            column i of B; ``all``: everything one group.
        adapter, strength, coupling: see :class:`~peso.adapters.proximal.term.Term`.

    Raises:
        ConfigError: an impossible argument.
    """

    name = "softmax_kl"
    options: ClassVar[tuple[str, ...]] = ("temperature", "groups")
    default_weight = 2.0

    def __init__(
        self,
        weight: float | None = None,
        reduction: Reduction = "mean",
        temperature: float | Literal["auto"] = 1.0,
        adapter: str | None = None,
        *,
        strength: float | None = None,
        coupling: Coupling = "loss",
        groups: Grouping = "factor",
    ) -> None:
        super().__init__(weight, reduction, adapter, strength=strength, coupling=coupling, groups=groups)
        if temperature != "auto" and (isinstance(temperature, str) or not temperature > 0):
            raise ConfigError(f"temperature {temperature} must be above 0, or 'auto'")
        self.temperature = temperature

    def metric(self, stack: Stack) -> SoftmaxMetric:
        from peso.adapters.proximal.metrics import SoftmaxMetric

        return SoftmaxMetric.of(stack.anchor, self.temperature)

    @staticmethod
    def value(
        current: Sequence[Tensor], anchor: Sequence[Tensor], temperature: float | Literal["auto"] = 1.0
    ) -> Tensor:
        """Σ_g KL(softmax(current/τ) ‖ softmax(anchor/τ)) over two lists of tensors, unweighted.

        Differentiable once with respect to ``current``; the anchor counts as constant.
        """
        term = SoftmaxKL(1.0, "sum", temperature)
        term.anchor(anchor)
        return term(current)
