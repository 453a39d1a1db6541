"""The base classes of proximal terms: weight or strength, the two couplings, and the anchor.

Commands that only read a configuration import this module and the terms, so PyTorch is not imported here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from peso.config.registry import Registry
from peso.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from torch import Tensor

    from peso.adapters.groups import Group, Grouping, Placement, Source, Stack
    from peso.adapters.proximal.metrics import Calibration, Metric

TERMS = Registry(
    "proximal term",
    "peso.adapters.proximal",
    "peso.proximal_terms",
    "peso.adapters.proximal.term:Term",
    beside=["gradients", "metrics", "term"],
)
Coupling = Literal["loss", "decoupled"]
Reduction = Literal["mean", "sum"]


class Term(ABC):
    """A penalty on moving away from an anchor.

    To add a term, write a subclass with ``keep``, ``penalty`` and ``trace``, or a subclass of
    :class:`DistanceTerm` with ``metric``. If it has a class attribute ``name``, configurations can use it,
    see :func:`peso.adapters.proximal.find_term`.

    Args:
        weight: the raw weight λ: the term is (λ/2)·‖v − a‖²_H to second order. With ``decoupled`` it is κ,
            the rate per learning rate.
        reduction: ``sum`` over the groups; or ``mean``, the sum divided by the number of modules. Each tensor
            outside of LoRA modules counts as a module.
        adapter: the name of the PEFT adapter; by default the one that is active when the term is called.
        strength: a dimensionless alternative to the weight. With ``loss``, λ = strength · ρ̄ after
            :meth:`calibrate` has measured ρ̄; with ``decoupled``, κ = strength / Σ learning rates. If neither
            is given, the default weight of the term is used with ``loss``, if it has one, and otherwise
            strength 1.
        coupling: ``loss`` if the caller adds the term to the loss; ``decoupled`` if :meth:`after_step`
            shrinks the displacement after each optimizer step, as AdamW does with weights.

    Raises:
        ConfigError: an argument is not valid.
    """

    name: ClassVar[str] = ""
    """The name in configurations; empty if configurations cannot use the term."""
    options: ClassVar[tuple[str, ...]] = ()
    """Further arguments of the constructor that configurations can set: ``temperature``, ``groups``."""
    default_weight: ClassVar[float | None] = None
    """λ with ``loss`` if neither weight nor strength is given; None for strength 1."""
    has_decoupled_form: ClassVar[bool] = False
    """Whether ``coupling="decoupled"`` is supported."""
    is_distance: ClassVar[bool] = True
    """Whether the term is 0 at the anchor and grows away from it."""
    has_curvature: ClassVar[bool] = True
    """Whether the term has a Hessian at the anchor. Without one, a strength has no meaning."""
    needs_losses: ClassVar[bool] = False
    """Whether :meth:`anchor` needs losses of the stage that ends."""
    watches_outputs: ClassVar[bool] = False
    """Whether the term must watch forward passes, between :meth:`attach` and :meth:`detach`."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if name := cls.__dict__.get("name"):
            TERMS.add(name, cls)

    def __init__(
        self,
        weight: float | None = None,
        reduction: Reduction = "sum",
        adapter: str | None = None,
        *,
        strength: float | None = None,
        coupling: Coupling = "loss",
    ) -> None:
        check_choice("coupling", coupling, get_args(Coupling))
        check_choice("reduction", reduction, get_args(Reduction))
        if coupling == "decoupled" and not self.has_decoupled_form:
            raise ConfigError(
                f"{type(self).__name__} has no decoupled form: it is not a squared distance of each value "
                "from its anchor. Use coupling='loss'"
            )
        if weight is not None and strength is not None:
            raise ConfigError(f"weight {weight} and strength {strength} exclude each other: give only one")
        if strength is not None and not self.has_curvature:
            raise ConfigError(
                f"{type(self).__name__} has no curvature at the anchor, which a strength needs: give a weight"
            )
        for name, value in (("weight", weight), ("strength", strength)):
            if value is not None and not (is_number(value) and value >= 0):
                raise ConfigError(f"{name} {value!r} must be 0 or more, and finite")
        if weight is None and strength is None:
            weight = self.default_weight if coupling == "loss" else None
            strength = 1.0 if weight is None else None
        self.raw_weight = weight
        self.strength = strength
        self.coupling = coupling
        self.reduction = reduction
        self.adapter = adapter
        self._anchored: dict[str, tuple[int, ...]] = {}  # the name and shape of every group
        self._modules = 0
        self._calibration: Calibration | None = None

    @property
    def is_anchored(self) -> bool:
        """Whether there is an anchor."""
        return bool(self._anchored)

    @property
    def calibration(self) -> Calibration | None:
        """The result of :meth:`calibrate` at this anchor; None before it."""
        return self._calibration

    @property
    def weight(self) -> float | None:
        """λ (κ if decoupled), as given or computed from the strength; None if it is not known yet."""
        if self.raw_weight is not None or self.strength is None:
            return self.raw_weight
        if self.strength == 0:
            return 0.0
        if self.coupling == "loss" and self._calibration is not None:
            return self.strength * self._calibration.rho
        return None

    # --- what a new term defines ------------------------------------------------------------------------

    @abstractmethod
    def keep(self, groups: Sequence[Group]) -> None:
        """Store what the term needs of the groups' values, which are the anchor."""

    @abstractmethod
    def penalty(self, groups: Sequence[Group], scale: float) -> Tensor:
        """The term summed over the groups and multiplied by ``scale``: 0-d, differentiable once."""

    @abstractmethod
    def trace(self) -> float:
        """tr(H), the trace of the Hessian of the sum over the groups at the anchor."""

    def select(self, source: Source) -> list[Group]:
        """The groups of the source that the term applies to; by default all."""
        from peso.adapters.groups import find_groups

        return find_groups(source, self.adapter)

    # --- what all terms share ---------------------------------------------------------------------------

    def anchor(self, source: Source, losses: Iterable[Tensor] | None = None) -> None:
        """Use the current parameters as the anchor. An earlier anchor and its calibration are dropped.

        Args:
            source: a model with a PEFT LoRA adapter, a list of tensors, or a list of both, such as
                ``[model, vocabulary.input_rows]``; or groups that :func:`find_groups` returned.
            losses: losses of the stage that ends, for terms that need them, see :class:`Fisher`.

        Raises:
            TrainingError: the model has no LoRA adapter, or several active ones.
        """
        from peso.adapters.groups import shapes

        groups = self.select(source)
        self.keep(groups)
        self._anchored = shapes(groups)
        self._modules = len({group.module for group in groups})
        self._calibration = None

    def groups_of(self, source: Source) -> list[Group]:
        """The groups that the term applies to, after checking that they match the anchor."""
        from peso.adapters.groups import check_same_groups

        self._check_anchored()
        groups = self.select(source)
        check_same_groups(self._anchored, groups)
        return groups

    def attach(self, source: Source) -> None:  # noqa: B027 - most terms watch nothing
        """Start watching forward passes, if the term ``watches_outputs``."""

    def detach(self) -> None:  # noqa: B027
        """Stop watching forward passes."""

    def __call__(self, source: Source) -> Tensor:
        """The weighted term, to be added to the loss: 0-d, float32 or better, differentiable once.

        Raises:
            TrainingError: there is no anchor yet; the adapter has other modules or another rank than the
                anchor; a strength was given, but :meth:`calibrate` was not called; or the term is decoupled.
        """
        if self.coupling != "loss":
            raise TrainingError(
                "a decoupled term is not added to the loss: call after_step(model, learning_rate, "
                "total_learning_rate) after each optimizer step, or choose coupling='loss'"
            )
        if self.weight is None:
            raise TrainingError(
                f"strength {self.strength:g} has no weight yet: call calibrate(model, losses) after "
                "anchor(model), with the losses of some single targets; or set a weight, or use "
                "coupling='decoupled'"
            )
        return self.value_at(source, self.weight)

    def value_at(self, source: Source, weight: float) -> Tensor:
        """The term with this weight, regardless of its own weight and coupling."""
        return self.penalty(self.groups_of(source), weight / self.divisor)

    def metric_trace(self) -> float:
        """tr(H) of the unweighted term at the anchor, including the reduction."""
        self._check_anchored()
        return self.trace() / self.divisor

    @property
    def divisor(self) -> int:
        """The divisor of the sum over the groups: 1, or the number of modules."""
        return self._modules if self.reduction == "mean" else 1

    def calibrate(self, source: Source, losses: Iterable[Tensor], tokens: float = 1.0) -> Calibration:
        """Measure ρ̄ = tr(Σ)/tr(H) at the anchor. Afterwards the weight of a strength is strength · ρ̄.

        Norms are only over the anchored groups. The gradients of the parameters (``.grad``) do not change. A
        term with a raw weight can also be calibrated, but keeps its weight.

        Args:
            source: the source that was given to :meth:`anchor`.
            losses: training losses of single targets (means over their tokens), 0-d with their graphs,
                preferably without dropout. If it is an iterator, the next loss is requested only after the
                gradient of the previous one was computed.
            tokens: the number of tokens per target, see
                :func:`peso.adapters.proximal.metrics.second_moment`.

        Raises:
            TrainingError: there is no anchor, a group is frozen, or the losses cannot be used.
        """
        from peso.adapters.proximal.metrics import Calibration, second_moment

        groups = self.groups_of(source)
        check_trained(groups)
        moment, error, examples = second_moment([group.tensor for group in groups], losses, tokens)
        trace = self.metric_trace()
        if not trace > 0:
            raise TrainingError(
                f"{type(self).__name__} has no curvature at this anchor, which a strength needs: use a weight"
            )
        self._calibration = Calibration(moment / trace, error / trace, examples)
        return self._calibration

    def decay(self, total_learning_rate: float | None) -> float:
        """κ of a decoupled term. Raises TrainingError if a strength needs the total, but it is not given."""
        if self.strength is None:
            return self.raw_weight or 0.0
        if not (total_learning_rate is not None and total_learning_rate > 0):
            raise TrainingError(
                f"strength {self.strength:g} is spread over the stage: after_step needs its "
                f"total_learning_rate, the sum over all steps, not {total_learning_rate}"
            )
        return self.strength / total_learning_rate

    def after_step(
        self, source: Source, learning_rate: float, total_learning_rate: float | None = None
    ) -> None:
        """Apply the decoupled form in place: Δ_i ← μ + (Δ_i − μ)·exp(−lr·κ·w_i), where Δ = v − a.

        w has mean 1, and μ is 0 except for softmax-KL. The reduction has no effect. With strength or weight
        0, nothing changes.

        Args:
            source: the source that was given to :meth:`anchor`.
            learning_rate: the learning rate of the last step.
            total_learning_rate: the sum of the learning rates over the whole stage, for
                κ = strength / Σ lr. It is required for a strength; a raw weight is κ itself.

        Raises:
            TrainingError: there is no anchor, the adapter is a different one, a group is frozen, or the total
                is missing.
        """
        raise TrainingError("coupling='loss': add term(model) to the loss instead of calling after_step")

    def _check_anchored(self) -> None:
        if not self._anchored:
            raise TrainingError("the proximal term has no anchor yet: call anchor(model) before training")


class DistanceTerm(Term):
    """A term that is the sum over groups of a metric of v⁽ᵍ⁾ − a⁽ᵍ⁾. A new term of this kind only defines
    ``metric``.

    The anchor is a copy on the device of the parameters and moves with them. The object can be pickled,
    including its anchor.

    Args:
        groups: the values that form a group, see :func:`peso.adapters.groups.layouts`. The other arguments
            are those of :class:`Term`.
    """

    has_decoupled_form = True

    _places: Sequence[Placement] = ()
    _stacks: Sequence[tuple[Stack, Metric]] = ()

    def __init__(
        self,
        weight: float | None = None,
        reduction: Reduction = "sum",
        adapter: str | None = None,
        *,
        strength: float | None = None,
        coupling: Coupling = "loss",
        groups: Grouping = "factor",
    ) -> None:
        from peso.adapters.groups import Grouping

        super().__init__(weight, reduction, adapter, strength=strength, coupling=coupling)
        check_choice("groups", groups, get_args(Grouping))
        self.groups: Grouping = groups

    @abstractmethod
    def metric(self, stack: Stack) -> Metric:
        """The metric around ``stack.anchor`` (groups, n). ``stack.gather`` converts other tensors to the same
        layout."""

    def keep(self, groups: Sequence[Group]) -> None:
        self._stack(groups, [group.tensor for group in groups])

    def trace(self) -> float:
        return sum(float(metric.hessian().trace().cpu().double().sum()) for _, metric in self._stacks)

    def penalty(self, groups: Sequence[Group], scale: float) -> Tensor:
        from peso.adapters.proximal.gradients import stacked_penalty

        return stacked_penalty(self._stacks, scale, self._placed(groups))

    def after_step(
        self, source: Source, learning_rate: float, total_learning_rate: float | None = None
    ) -> None:
        import torch

        if self.coupling != "decoupled":
            super().after_step(source, learning_rate, total_learning_rate)
        rate = learning_rate * self.decay(total_learning_rate)
        if not rate:
            return
        groups = self.groups_of(source)
        check_trained(groups)
        with torch.no_grad():
            tensors = self._placed(groups)
            for stack, metric in self._stacks:
                moved = stack.lay_out(tensors).sub_(stack.anchor)
                metric.shrink(moved, rate)
                moved.add_(stack.anchor)
                stack.put_back(tensors)

    def _placed(self, groups: Sequence[Group]) -> list[Tensor]:
        """The groups' tensors, after moving the stacks to the same device and precision if necessary."""
        from peso.adapters.groups import placement, unstack_anchors

        tensors = [group.tensor for group in groups]
        if [placement(tensor) for tensor in tensors] != self._places:  # moved, or the precision changed
            self._stack(groups, unstack_anchors([stack for stack, _ in self._stacks]))
        return tensors

    def _stack(self, groups: Sequence[Group], anchors: Sequence[Tensor]) -> None:
        from peso.adapters.groups import layouts, placement, stack_anchors

        self._places = [placement(group.tensor) for group in groups]
        stacks = stack_anchors(anchors, layouts(groups, self.groups), self._places)
        self._stacks = [(stack, self.metric(stack)) for stack in stacks]


def is_number(value: object, above: float = -math.inf) -> bool:
    """Whether an argument is a finite number above a bound. The digits of a number, as text, are not."""
    try:
        return bool(math.isfinite(value) and value > above)  # type: ignore[arg-type, operator]
    except TypeError:
        return False


def check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    """Raise ConfigError if the value of an argument is not one of the known ones."""
    if value not in known:
        raise ConfigError(f"{name} {value!r} is not one of {', '.join(known)}")


def check_trained(groups: Iterable[Group]) -> None:
    """Check that all groups are trained.

    Raises:
        TrainingError: a group is frozen; the message names the first one.
    """
    for group in groups:
        if not group.tensor.requires_grad:
            raise TrainingError(
                f"{group.name} is anchored but frozen (requires_grad is False): "
                "train it, or anchor only trained parameters"
            )
