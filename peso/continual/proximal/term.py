"""What every proximal term has in common: how strong it is, and where it acts.

Knows weights, strengths and the two couplings; knows nothing of what a term computes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Literal, get_args

from torch import Tensor

from peso.continual.calibration import Calibration, second_moment
from peso.continual.groups import Group, Source
from peso.errors import ConfigError, TrainingError

Coupling = Literal["loss", "decoupled"]
Reduction = Literal["mean", "sum"]


class Term(ABC):
    """A penalty on leaving an anchor. A term of its own overrides ``anchor``, ``value_at``, ``groups_of`` and
    ``metric_trace``, and ``pull`` or else ``has_decoupled_form``.

    Args:
        weight: λ, raw: (λ/2)·‖v − a‖²_H to second order. With ``decoupled`` κ, the rate per learning rate.
        strength: dimensionless, instead of a weight. With ``loss`` λ = strength · ρ̄, once :meth:`calibrate`
            has measured ρ̄; with ``decoupled`` κ = strength / Σ learning rates.
        coupling: ``loss``: added to the loss by the caller. ``decoupled``: :meth:`after_step` shrinks the
            displacement after each optimiser step, as AdamW does weights.
        reduction: ``sum`` over the groups, or ``mean``: that divided by the number of modules. Tensors that
            belong to no LoRA module are modules of their own.
        adapter: name of the PEFT adapter; None: the one that is active when the term is called.
        weight_by_default: λ with ``loss`` where neither weight nor strength is given; None: strength 1. With
            ``decoupled`` it is strength 1.

    Raises:
        ConfigError: an impossible argument.
    """

    has_decoupled_form = True

    def __init__(
        self,
        weight: float | None = None,
        reduction: Reduction = "sum",
        adapter: str | None = None,
        *,
        strength: float | None = None,
        coupling: Coupling = "loss",
        weight_by_default: float | None = None,
    ) -> None:
        check_choice("coupling", coupling, get_args(Coupling))
        check_choice("reduction", reduction, get_args(Reduction))
        if coupling == "decoupled" and not self.has_decoupled_form:
            raise ConfigError(
                f"{type(self).__name__} has no decoupled form: it is no squared distance of each value from "
                "its anchor. Use coupling='loss'"
            )
        if weight is not None and strength is not None:
            raise ConfigError(f"weight {weight} and strength {strength} exclude each other: give one")
        for name, value in (("weight", weight), ("strength", strength)):
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise ConfigError(f"{name} {value} must be 0 or more, and finite")
        if weight is None and strength is None:
            weight = weight_by_default if coupling == "loss" else None
            strength = 1.0 if weight is None else None
        self.raw_weight = weight
        self.strength = strength
        self.coupling = coupling
        self.reduction = reduction
        self.adapter = adapter
        self._calibration: Calibration | None = None

    @property
    def calibration(self) -> Calibration | None:
        """What :meth:`calibrate` found at this anchor."""
        return self._calibration

    @property
    def weight(self) -> float | None:
        """λ (κ where decoupled): as given, or what the strength came to; None while that is not known."""
        if self.raw_weight is not None:
            return self.raw_weight
        if self.strength == 0:
            return 0.0
        if self.coupling == "loss" and self._calibration is not None:
            return self._calibration.weight(self.strength or 0.0)
        return None

    # --- what a term of its own says --------------------------------------------------------------------

    @abstractmethod
    def anchor(self, source: Source) -> None:
        """Takes the parameters as they are now for the anchor; an earlier one and its calibration go."""

    @abstractmethod
    def value_at(self, source: Source, weight: float) -> Tensor:
        """The term times ``weight``: 0-d, differentiable once."""

    @abstractmethod
    def metric_trace(self) -> float:
        """tr(H): the trace of the Hessian of the unweighted term at the anchor, reduction included."""

    def pull(self, source: Source, rate: float) -> None:
        """The decoupled form for lr · κ = ``rate``, in place. Raises TrainingError for a frozen group, or
        where there is no such form."""
        raise TrainingError(f"{type(self).__name__} has no decoupled form: add term(model) to the loss")

    @abstractmethod
    def groups_of(self, source: Source) -> list[Group]:
        """The groups the term acts on, checked against the anchor."""

    # --- what all do alike ------------------------------------------------------------------------------

    def term(self, source: Source) -> Tensor:
        """The weighted term, to be added to the loss: 0-d, float32 or better, differentiable once.

        Raises:
            TrainingError: before :meth:`anchor`, for an adapter of other modules or another rank, before
                :meth:`calibrate` where a strength was given, or for a decoupled term.
        """
        return self.value_at(source, self.weight_in_loss())

    __call__ = term

    def weight_in_loss(self) -> float:
        """λ. Raises TrainingError where it is not known yet, or the term is decoupled."""
        if self.coupling != "loss":
            raise TrainingError(
                "a decoupled term is not added to the loss: call after_step(model, learning_rate, "
                "total_learning_rate) after each optimiser step, or choose coupling='loss'"
            )
        if self.weight is None:
            raise TrainingError(
                f"strength {self.strength:g} has no weight yet: call calibrate(model, losses) after "
                "anchor(model), with the losses of some single targets; or give a weight, or "
                "coupling='decoupled'"
            )
        return self.weight

    def calibrate(self, source: Source, losses: Iterable[Tensor], tokens: float = 1.0) -> Calibration:
        """Measures ρ̄ = tr(Σ)/tr(H) at the anchor; from then on a strength is the weight strength · ρ̄.

        Norms are over the anchored groups alone. Gradients of the parameters (``.grad``) stay as they are.
        A term with a raw weight is measured too, and keeps its weight.

        Args:
            source: as given to :meth:`anchor`.
            losses: each the training loss of one target (mean over its tokens), 0-d with its graph, best
                without dropout; an iterator is asked for the next only when the last is done with.
            tokens: tokens per target, see :func:`peso.continual.calibration.second_moment`.

        Raises:
            TrainingError: no anchor, a frozen group, or losses that cannot be used.
        """
        groups = self.groups_of(source)
        check_trained(groups)
        moment, error, examples = second_moment([group.tensor for group in groups], losses, tokens)
        trace = self.metric_trace()
        if not trace > 0:
            raise TrainingError("the term has no curvature at this anchor: a strength means nothing for it")
        self._calibration = Calibration(moment / trace, error / trace, examples)
        return self._calibration

    def after_step(
        self, source: Source, learning_rate: float, total_learning_rate: float | None = None
    ) -> None:
        """The decoupled form: Δ_i ← μ + (Δ_i − μ)·exp(−lr·κ·w_i), in place; Δ = v − a.

        w has mean 1, and μ is 0 but for softmax-KL. The reduction plays no part. At strength or weight 0
        nothing is touched.

        Args:
            learning_rate: of the step just made.
            total_learning_rate: Σ of the learning rates over the whole stage: κ = strength / Σ lr. Needed
                for a strength; a raw weight is κ itself.

        Raises:
            TrainingError: no anchor, another adapter, a frozen group, or a total that is missing.
        """
        if self.coupling != "decoupled":
            raise TrainingError("coupling='loss': add term(model) to the loss instead of calling after_step")
        kappa = self.raw_weight
        if self.strength is not None:
            if not (total_learning_rate is not None and total_learning_rate > 0):
                raise TrainingError(
                    f"strength {self.strength:g} is spread over the stage: after_step needs its "
                    f"total_learning_rate, the sum over all steps, not {total_learning_rate}"
                )
            kappa = self.strength / total_learning_rate
        if kappa and learning_rate:
            self.pull(source, learning_rate * kappa)


def check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        said = f"neither {known[0]!r} nor {known[1]!r}" if len(known) == 2 else f"none of {', '.join(known)}"
        raise ConfigError(f"{name} {value!r} is {said}")


def check_trained(groups: list[Group]) -> None:
    """Raises TrainingError that names the first group that is frozen."""
    for group in groups:
        if not group.tensor.requires_grad:
            raise TrainingError(
                f"{group.name} is anchored but frozen (requires_grad is False): "
                "train it, or anchor only what is trained"
            )
