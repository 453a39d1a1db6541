"""A proximal term in the training loop of another library: the part that all callbacks share."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peso.adapters.anchor_report import AnchorMonitor, anchor_effect
from peso.adapters.groups import find_groups
from peso.adapters.proximal import Term
from peso.adapters.proximal.term import check_trained, is_number
from peso.errors import ConfigError, TrainingError

log = logging.getLogger("peso.integrations")
MEASURED_EVERY = 8  # steps between two measurements of norms, which take a copy of the adapter


def require_usable(term: object, total_learning_rate: object) -> None:
    """Check the arguments of a callback.

    Raises:
        ConfigError: the term is not an object of a class of terms, or must watch forward passes; or the sum
            of the learning rates is not a number above 0.
    """
    if not isinstance(term, Term):
        what = f"the class {term.__name__}" if isinstance(term, type) else repr(term)
        raise ConfigError(
            f"ProximalCallback needs a proximal term, not {what}; give an object, such as "
            "peso.SoftmaxKL(weight=2.0) or peso.L2(strength=1.0, coupling='decoupled')"
        )
    if term.watches_outputs:
        raise ConfigError(
            f"{type(term).__name__} watches forward passes, which a callback cannot add to the loss; add "
            "the term in your own compute_loss or training_step"
        )
    if total_learning_rate is not None and not is_number(total_learning_rate, above=0):
        raise ConfigError(f"total_learning_rate {total_learning_rate!r} must be a finite number above 0")


class Anchored:
    """A term during one stage: its gradient, its decoupled pull, and whether it restrains the adapter.

    Args:
        term: the term. Without an anchor, the adapter at the start of the stage becomes the anchor.
        model: a model with a PEFT LoRA adapter.
        steps: the number of optimizer steps of the stage.
        done: the number of steps before an interruption.
        stage: the number of the stage, for messages.

    Raises:
        TrainingError: the model has no such adapter, one that is frozen, or one that does not match the
            anchor, or the stage continues and the term has no anchor.
    """

    def __init__(self, term: Term, model: nn.Module, steps: int, done: int = 0, stage: int = 1) -> None:
        self._from_elsewhere = term.is_anchored
        if not term.is_anchored:
            if done:
                raise TrainingError(
                    f"training continues after step {done}, but the term has no anchor: call "
                    "term.anchor(model) with the adapter that the stage began with"
                )
            term.anchor(model)
        self.term, self.stage = term, stage
        self.groups = find_groups(model, term.adapter)
        anchored = term.groups_of(self.groups)
        check_trained(anchored)
        self.parameters = [group.tensor for group in anchored]
        self.records: list[dict[str, Any]] = []
        self._steps, self._done = steps, done
        self._monitor = AnchorMonitor(stage, steps, self._rho)
        self._start = _copies(self.parameters)
        self._before: list[Tensor] | None = None
        self._loss_norm: float | None = None
        self._penalty_norm: float | None = None
        self.value: float | None = None

    @property
    def is_measured(self) -> bool:
        """Whether norms are measured in the current step."""
        return len(self.records) % MEASURED_EVERY == 0

    @property
    def is_decoupled(self) -> bool:
        """Whether the adapter is pulled after each step, instead of adding a gradient."""
        return self.term.coupling == "decoupled"

    @property
    def _rho(self) -> float | None:
        return None if self.term.calibration is None else self.term.calibration.rho

    def gradients(self) -> list[Tensor | None]:
        """The gradients of the term for the parameters; all None if it is decoupled or has weight 0."""
        if self.is_decoupled:
            return [None] * len(self.parameters)
        value = self.term(self.groups)  # raises if the weight is not known
        if not self.term.weight:
            return [None] * len(self.parameters)
        found = torch.autograd.grad(value, self.parameters, allow_unused=True)
        self.value, self._penalty_norm = float(value.detach()), _norm(found)
        return [*found]

    def saw_loss(self, norm: float) -> None:
        """Remember the norm of the gradient of the loss alone over the parameters, for the record."""
        self._loss_norm = norm

    def before_step(self) -> None:
        """To be called before the optimizer's step."""
        if self.is_measured:
            self._before = _copies(self.parameters)

    def after_step(self, rate: float, total: float | None) -> str | None:
        """To be called after the optimizer's step; returns a warning at most once per stage.

        Args:
            rate: the learning rate of the step.
            total: the sum of the learning rates of the stage; needed for the strength of a decoupled term.
        """
        stepped = _copies(self.parameters) if self._before is not None else None
        if self.is_decoupled:
            self.term.after_step(self.groups, rate, total)
        record: dict[str, Any] = {
            "step": self._done + len(self.records) + 1,
            "learning_rate": rate,
            "gradient_norm": self._loss_norm or 0.0,
            "penalty_gradient_norm": self._penalty_norm if self._loss_norm else None,
        }
        if self._before is not None and stepped is not None:
            record["step_norm"] = _distance(stepped, self._before)
            record["pull_norm"] = _distance(self.parameters, stepped) if self.is_decoupled else 0.0
            record["distance"] = self._distance(record["pull_norm"], rate, total)
        self._before = self._loss_norm = None
        self.records.append(record)
        return self._monitor.add(record)

    def _distance(self, pull: float, rate: float, total: float | None) -> float:
        """The distance of the adapter from the anchor.

        If the anchor is not the adapter at the start, the distance follows from the length of a pull, which
        is distance · (exp(lr · κ) − 1); without a pull, the distance from the start is returned instead.
        """
        grown = math.expm1(rate * self.term.decay(total)) if self.is_decoupled else 0.0
        return pull / grown if self._from_elsewhere and grown else _distance(self.parameters, self._start)

    def figures(self) -> dict[str, float]:
        """The latest figures, for logs: ``proximal/value``, ``…/gradient_ratio``, ``…/distance``."""
        found = {} if self.value is None else {"proximal/value": self.value}
        for record in reversed(self.records):
            if "distance" in record:
                found["proximal/distance"] = record["distance"]
                if record["penalty_gradient_norm"] is not None:
                    found["proximal/gradient_ratio"] = (
                        record["penalty_gradient_norm"] / record["gradient_norm"]
                    )
                if self.is_decoupled and record["step_norm"]:
                    found["proximal/pull_ratio"] = record["pull_norm"] / record["step_norm"]
                break
        return found

    def effect(self) -> dict[str, Any]:
        """Whether the anchor restrained the adapter (:func:`peso.adapters.anchor_report.anchor_effect`)."""
        return anchor_effect(self.stage, self.records, self._rho)


def gradient_norm(parameters: Sequence[Tensor], less: Sequence[Tensor | None] | None = None) -> float:
    """The norm of the parameters' ``.grad``, after subtracting ``less``."""
    grads = [p.grad for p in parameters]
    if less is not None:
        grads = [g if g is None or h is None else g - h for g, h in zip(grads, less, strict=True)]
    return _norm(grads)


def _norm(tensors: Sequence[Tensor | None]) -> float:
    return math.sqrt(sum(float(t.detach().float().square().sum()) for t in tensors if t is not None))


def _copies(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def _distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return _norm([x.detach().float() - y.float() for x, y in zip(a, b, strict=True)])
