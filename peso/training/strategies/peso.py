"""``peso``: one evolving adapter, kept near its last state by a proximal term (arXiv 2510.25093)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peso.adapters.groups import Group, find_groups
from peso.adapters.proximal import find_term
from peso.config import PesoConfig
from peso.training.strategies.strategy import ForwardPass, StageContext, Strategy


class Peso(Strategy):
    """``single`` with an anchor: the adapter that each stage from stage 1 on starts with.

    Args:
        options: of :class:`peso.config.PesoConfig`, with its defaults: ``Peso()`` is ``strategy: peso``.

    Raises:
        pydantic.ValidationError: an unknown or impossible option.
    """

    def __init__(self, **options: Any) -> None:
        chosen = PesoConfig(name="peso", **options)
        kind = find_term(chosen.proximal)
        own: dict[str, Any] = {name: getattr(chosen, name) for name in kind.options}
        own |= {"reduction": chosen.reduction, "strength": chosen.strength, "coupling": chosen.coupling}
        self.term = kind(chosen.weight, **own)
        self.vocabulary = chosen.vocabulary
        self.examples = chosen.examples
        self._groups: list[Group] = []

    def begin(self, context: StageContext) -> None:
        if context.number == 0:
            return
        source, term, examples = self.anchored(context), self.term, context.examples
        self._groups = find_groups(source)  # once per stage: their values change, they do not
        if term.needs_losses:
            # the adapter is as the last stage left it: what mattered to that stage is measured now
            assert examples is not None
            term.anchor(source, examples.losses(context.number - 1, self.examples))
        else:
            term.anchor(source)
        # a penalty that is not a distance to the anchor is calibrated only if a strength is asked for
        if examples is not None and (term.is_distance or term.strength is not None):
            term.calibrate(source, examples.losses(context.number, self.examples), examples.tokens)
        if term.weight != 0:
            term.attach(source)

    def penalty(self, context: StageContext) -> Tensor | None:
        return None if self.term.watches_outputs else self._in_loss(context)

    def output_penalty(self, context: StageContext, outputs: ForwardPass) -> Tensor | None:
        return self._in_loss(context) if self.term.watches_outputs else None

    def _in_loss(self, context: StageContext) -> Tensor | None:
        acts = context.number > 0 and self.term.coupling == "loss" and self.term.weight != 0
        return self.term(self._groups) if acts else None

    def after_step(self, context: StageContext, learning_rate: float) -> None:
        # a stage of a single step is all warm-up: at rate 0 nothing moves
        if context.number > 0 and self.term.coupling == "decoupled" and learning_rate > 0:
            self.term.after_step(self._groups, learning_rate, context.total_rate)

    def end(self, context: StageContext) -> None:
        self.term.detach()

    def anchored(self, context: StageContext) -> nn.Module | list[nn.Module | Tensor]:
        """What the term is given: the backbone, and the vocabulary's rows if they are anchored."""
        if not self.vocabulary:
            return context.backbone
        assert context.vocabulary is not None
        return [context.backbone, *context.vocabulary.parameters()]

    def figures(self) -> dict[str, Any]:
        found = self.term.calibration
        if found is None:
            return {}
        return {
            "weight": self.term.weight,
            "strength": self.term.strength,
            "coupling": self.term.coupling,
            "rho": found.rho,
            "rho_standard_error": found.standard_error,
            "rho_examples": found.examples,
        }
