"""``softmax_kl``: the KL divergence between groups, interpreted as distributions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from peso.adapters.proximal.term import Coupling, DistanceTerm, Reduction, is_number
from peso.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from peso.adapters.groups import Grouping, Stack
    from peso.adapters.proximal.metrics import SoftmaxMetric


class SoftmaxKL(DistanceTerm):
    """λ · Σ_g KL( softmax(v⁽ᵍ⁾/τ) ‖ softmax(a⁽ᵍ⁾/τ) ): the proximal term of PESO (arXiv 2510.25093).

    A group is the flattened A, or the flattened B, of one module. The relative error of the value and of the
    gradient is at most 1e-5 at any distance and for any dtype of the parameters, except where many values
    have moved far by the same amount (:func:`~peso.adapters.proximal.metrics.softmax_kl` has the bounds). ::

        term = peso.SoftmaxKL(weight=2.0)
        term.anchor(model)                    # the current state: the end of the previous stage
        loss = outputs.loss + term(model)     # the term is 0 at the anchor

    To second order it is (λ/2)·Σ_g ‖v − a‖²_H with H = (diag(p) − p·pᵀ)/τ² and p = softmax(a/τ). The
    decoupled form shrinks around μ = Σ p·Δ with the weights w = n·p, so a shift common to a group is not
    penalized, as in the KL. (If p is not uniform, μ itself changes slightly during shrinking; to first order
    in the rate, the plain mean of the displacement is conserved.)

    Args:
        weight: λ. With ``loss`` it is 2.0 by default, as in the paper, unless a strength is given.
        reduction: ``mean``, as in the paper's released code: A and B of a module are added, and the sum is
            divided by the number of modules. Or ``sum`` over the groups, as in the paper's formula.
        temperature: τ. At 1, the prior of a real adapter is nearly uniform. With ``auto``, it is the standard
            deviation of each anchor group, at least 1e-2.
        groups: the values that form a group. ``factor``: A and B of each module separately. ``module``: A and
            B together. ``rank``: row i of A and column i of B. ``all``: all values.
        adapter, strength, coupling: see :class:`~peso.adapters.proximal.term.Term`.

    Raises:
        ConfigError: an argument is not valid.
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
        if temperature != "auto" and not is_number(temperature, above=0):
            raise ConfigError(f"temperature {temperature!r} must be a finite number above 0, or 'auto'")
        self.temperature = temperature

    def metric(self, stack: Stack) -> SoftmaxMetric:
        from peso.adapters.proximal.metrics import SoftmaxMetric

        return SoftmaxMetric.of(stack.anchor, self.temperature)

    @staticmethod
    def value(
        current: Sequence[Tensor], anchor: Sequence[Tensor], temperature: float | Literal["auto"] = 1.0
    ) -> Tensor:
        """Σ_g KL(softmax(current/τ) ‖ softmax(anchor/τ)) for two lists of tensors, without a weight.

        It can be differentiated once with respect to ``current``. The anchor counts as constant.

        Args:
            current: the current tensors; each is a group.
            anchor: the anchor of each tensor.
            temperature: τ, or ``auto``.
        """
        term = SoftmaxKL(1.0, "sum", temperature)
        term.anchor(anchor)
        return term(current)
