"""Terms that are a sum over groups: anchors kept in stacks, on the device of the parameters.

Knows stacks and metrics; knows nothing of which metric it is.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor

from peso.continual.grouping import Grouping, find_units
from peso.continual.groups import Group, Source, check_same_groups, find_groups, shapes
from peso.continual.proximal.term import Coupling, Term, check_choice, check_trained
from peso.continual.stacks import (
    Gather,
    Metric,
    Placement,
    Stack,
    placement,
    shrink,
    stack_anchors,
    stacked_penalty,
    unstack_anchors,
)
from peso.errors import TrainingError


class AnchoredTerm(Term):
    """Σ_g of a metric of v⁽ᵍ⁾ − a⁽ᵍ⁾. A term of its own overrides ``metric``.

    The anchor is a copy on the device of the parameters and follows them when they are moved. The object can
    be pickled, anchor included.
    """

    def __init__(
        self,
        weight: float | None = None,
        reduction: Literal["mean", "sum"] = "sum",
        adapter: str | None = None,
        *,
        strength: float | None = None,
        coupling: Coupling = "loss",
        groups: Grouping = "factor",
        weight_by_default: float | None = None,
    ) -> None:
        super().__init__(
            weight,
            reduction,
            adapter,
            strength=strength,
            coupling=coupling,
            weight_by_default=weight_by_default,
        )
        check_choice("groups", groups, get_args(Grouping))
        self.groups = groups
        self._anchored: dict[str, tuple[int, ...]] = {}  # name and shape of every group
        self._modules = 0
        self._places: list[Placement] = []
        self._stacks: list[Stack[Metric]] = []

    @abstractmethod
    def metric(self, anchor: Tensor, gather: Gather) -> Metric:
        """The metric around an anchor (groups, n); ``gather`` lays other tensors out like it."""

    def anchor(self, source: Source) -> None:
        """Takes the parameters as they are now for the anchor; an earlier one and its calibration go.

        Args:
            source: a model with a PEFT LoRA adapter, a list of tensors, or a list of both, such as
                ``[model, vocabulary.input_rows]``.

        Raises:
            TrainingError: no LoRA adapter in the model, or several active ones.
        """
        groups = find_groups(source, self.adapter)
        self._stack(groups, [group.tensor for group in groups])
        self._anchored = shapes(groups)
        self._modules = len({group.module for group in groups})
        self._calibration = None

    def metric_trace(self) -> float:
        self._check_anchored()
        total = sum(float(stack.metric.trace().cpu().double().sum()) for stack in self._stacks)
        return total / self._divisor

    def value_at(self, source: Source, weight: float) -> Tensor:
        tensors = self._tensors(source)
        return stacked_penalty(self._stacks, tensors, weight / self._divisor)

    def pull(self, source: Source, rate: float) -> None:
        groups = self.groups_of(source)  # once: a walk over the modules costs as much as shrinking
        check_trained(groups)
        shrink(self._stacks, self._placed(groups), rate)

    def groups_of(self, source: Source) -> list[Group]:
        self._check_anchored()
        groups = find_groups(source, self.adapter)
        check_same_groups(self._anchored, groups)
        return groups

    def _tensors(self, source: Source) -> list[Tensor]:
        return self._placed(self.groups_of(source))

    def _placed(self, groups: Sequence[Group]) -> list[Tensor]:
        """The groups' tensors; stacks that are where they are now."""
        tensors = [group.tensor for group in groups]
        if [placement(tensor) for tensor in tensors] != self._places:  # moved, or the precision changed
            self._stack(groups, unstack_anchors(self._stacks))
        return tensors

    def _stack(self, groups: Sequence[Group], anchors: Sequence[Tensor]) -> None:
        self._places = [placement(group.tensor) for group in groups]
        units = find_units(groups, self.groups)
        self._stacks = stack_anchors(anchors, units, self._places, self.metric)

    @property
    def _divisor(self) -> int:
        return self._modules if self.reduction == "mean" else 1

    def _check_anchored(self) -> None:
        if not self._anchored:
            raise TrainingError("the proximal term has no anchor yet: call anchor(model) before training")
