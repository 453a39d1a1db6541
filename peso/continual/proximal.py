"""Proximal terms for anyone's training loop: an anchor, and the penalty on moving away from it.

Knows adapters and anchors; knows nothing of stages, data, loops or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from peso.continual.groups import Source, check_same_groups, find_groups, shapes
from peso.continual.stacks import (
    Placement,
    Stack,
    placement,
    stack_anchors,
    stacked_softmax_kl,
    unstack_anchors,
)
from peso.errors import ConfigError, TrainingError


class SoftmaxKL:
    """λ · Σ_g KL( softmax(v⁽ᵍ⁾/τ) ‖ softmax(a⁽ᵍ⁾/τ) ): the proximal term of PESO (arXiv 2510.25093).

    A group is the flattened A, or the flattened B, of one module. Value and gradient are exact to 1e-5
    relative at any distance and whatever dtype the parameters have (``peso/continual/softmax_kl.py``).

        term = peso.SoftmaxKL(weight=2.0)
        term.anchor(model)                    # as it is now: the end of the previous stage
        loss = outputs.loss + term(model)     # 0 at the anchor

    The anchor is a copy on the device of the parameters and follows them when they are moved. The object
    can be pickled, anchor included.

    Args:
        weight: λ. Raw: what it does depends on sizes, rank and learning rate, see docs/proximal.md.
        reduction: ``sum`` over the groups (the paper's formula), or ``mean``: A and B of one module added,
            then divided by the number of modules (the paper's released code). Of plain tensors each is a
            module of its own.
        temperature: τ. At 1 the prior of a real adapter is nearly uniform.
        adapter: name of the PEFT adapter; None: the one that is active when the term is called.

    Raises:
        ConfigError: an impossible argument.
    """

    def __init__(
        self,
        weight: float = 2.0,
        reduction: Literal["mean", "sum"] = "mean",
        temperature: float = 1.0,
        adapter: str | None = None,
    ) -> None:
        if not weight >= 0:
            raise ConfigError(f"weight {weight} must be 0 or more")
        if reduction not in ("mean", "sum"):
            raise ConfigError(f"reduction {reduction!r} is neither 'mean' nor 'sum'")
        if not temperature > 0:
            raise ConfigError(f"temperature {temperature} must be above 0")
        self.weight = weight
        self.reduction = reduction
        self.temperature = temperature
        self.adapter = adapter
        self._anchored: dict[str, tuple[int, ...]] = {}  # name and shape of every group
        self._places: list[Placement] = []
        self._stacks: list[Stack] = []

    def anchor(self, source: Source) -> None:
        """Takes the parameters as they are now for the anchor; an earlier one is forgotten.

        Args:
            source: a model with a PEFT LoRA adapter, or a list of tensors.

        Raises:
            TrainingError: no LoRA adapter in the model, several active ones, or a temperature too small
                for the values.
        """
        groups = find_groups(source, self.adapter)
        self._places = [placement(group.tensor) for group in groups]
        self._stacks = stack_anchors([group.tensor for group in groups], self._places, self.temperature)
        self._anchored = shapes(groups)

    def term(self, source: Source) -> Tensor:
        """The weighted term: 0-d, float32 or better, differentiable once with respect to the parameters.

        Raises:
            TrainingError: before :meth:`anchor`, or for an adapter of other modules or another rank.
        """
        if not self._anchored:
            raise TrainingError("the proximal term has no anchor yet: call anchor(model) before training")
        groups = find_groups(source, self.adapter)
        check_same_groups(self._anchored, groups)
        tensors = [group.tensor for group in groups]
        places = [placement(tensor) for tensor in tensors]
        if places != self._places:  # the model was moved, or its precision changed
            self._stacks = stack_anchors(unstack_anchors(self._stacks), places, self.temperature)
            self._places = places
        modules = len({group.module for group in groups}) if self.reduction == "mean" else 1
        return stacked_softmax_kl(self._stacks, tensors, self.weight / modules)

    __call__ = term

    @staticmethod
    def value(current: Sequence[Tensor], anchor: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
        """Σ_g KL(softmax(current/τ) ‖ softmax(anchor/τ)) over two lists of tensors, unweighted.

        Differentiable once with respect to ``current``; the anchor counts as constant.
        """
        term = SoftmaxKL(1.0, "sum", temperature)
        term.anchor(anchor)
        return term(current)
