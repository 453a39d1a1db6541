"""``peso``: one evolving adapter with a proximal term to its previous state (arXiv 2510.25093)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from peso.errors import ConfigError
from peso.training.strategies.strategy import ForwardPass, StageContext, Strategy

if TYPE_CHECKING:
    from torch import Tensor

    from peso.adapters.groups import Group, Source
    from peso.adapters.proximal.term import Term

Coupling = Literal["loss", "decoupled"]


class Peso(Strategy):
    """``single``, with a proximal term that penalizes the distance to the previous state.

    The anchor of a stage is the adapter at its start. Stage 0 has no anchor.
    """

    name = "peso"
    moves_one_adapter = True

    class Options(Strategy.Options):
        proximal: str = Field(
            "softmax_kl",
            description="name of a proximal term (docs/reference/proximal.md), or the import path of "
            "your own class: my_package.my_term.MyTerm",
        )
        strength: float | None = Field(None, ge=0, description="dimensionless; 1 unless a weight is given")
        weight: float | None = Field(
            None, ge=0, description="raw factor; its effect depends on model size and learning rate"
        )
        coupling: Coupling | None = Field(
            None, description="default: decoupled for a strength, loss for a weight"
        )
        reduction: Literal["sum", "mean"] = Field(
            "mean", description="sum over all groups, or mean over modules as in the released code"
        )
        temperature: float | Literal["auto"] = Field(
            1.0, description="softmax temperature of softmax_kl and per_rank_kl"
        )
        groups: Literal["factor", "module", "rank", "all"] = Field(
            "factor",
            description="values that share one softmax: each factor of a module, a module, each rank, "
            "or all modules",
        )
        vocabulary: bool = Field(False, description="anchor the rows of the semantic vocabulary too")
        examples: int = Field(64, ge=2, description="number of targets used to estimate ρ̄ and fisher")

        @model_validator(mode="before")
        @classmethod
        def _strength_is_default(cls, tree: Any) -> Any:
            """Fill in what is missing. If neither strength nor weight is given, the strength is 1; a term
            without curvature gets its default weight. If no coupling is given, a strength is decoupled and a
            weight is in the loss."""
            if not isinstance(tree, Mapping):
                return tree
            result, term = dict(tree), _built_in(tree.get("proximal"))
            if result.get("strength") is None and result.get("weight") is None:
                if term and not term.has_curvature:
                    result["weight"] = term.default_weight
                else:
                    result["strength"] = 1.0
            if result.get("coupling") is None:
                in_loss = result.get("weight") is not None or (term and not term.has_decoupled_form)
                result["coupling"] = "loss" if in_loss else "decoupled"
            return result

        @model_validator(mode="after")
        def _possible(self) -> Peso.Options:
            if self.strength is not None and self.weight is not None:
                raise ValueError("strength and weight both set the size of the penalty: give one of them")
            term = _built_in(self.proximal)
            if term and not term.has_curvature and self.strength is not None:
                raise ValueError(f"strength: {self.proximal} has no curvature at the anchor; give a weight")
            if term and not term.has_decoupled_form and self.coupling == "decoupled":
                raise ValueError(f"coupling: {self.proximal} has no decoupled form; use coupling: loss")
            if self.temperature != "auto" and not self.temperature > 0:
                raise ValueError(f"temperature {self.temperature} must be above 0")
            return self

        @property
        def foreign(self) -> list[str]:
            return [self.proximal] if "." in self.proximal else []

        @property
        def observing(self) -> str:
            term = _built_in(self.proximal)
            return f"strategy.proximal: {self.proximal}" if term and term.watches_outputs else ""

    options: Options
    term: Term
    _groups: list[Group]

    def __init__(self, **options: Any) -> None:
        from peso.adapters.proximal import find_term

        super().__init__(**options)
        chosen = self.options
        kind = find_term(chosen.proximal)
        own: dict[str, Any] = {name: getattr(chosen, name) for name in kind.options}
        own |= {"reduction": chosen.reduction, "strength": chosen.strength, "coupling": chosen.coupling}
        self.term = kind(chosen.weight, **own)
        self._groups = []

    def begin(self, context: StageContext) -> None:
        from peso.adapters.groups import find_groups

        if context.number == 0:
            return
        source, term, examples = self.anchored(context), self.term, context.examples
        self._groups = find_groups(source)
        if term.needs_losses:
            # the adapter still has the values of the previous stage
            assert examples is not None
            term.anchor(source, examples.losses(context.number - 1, self.options.examples))
        else:
            term.anchor(source)
        # calibrate also without a strength, to report ρ̄; but then only distances with a curvature
        if examples is not None and ((term.is_distance and term.has_curvature) or term.strength is not None):
            term.calibrate(source, examples.losses(context.number, self.options.examples), examples.tokens)
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
        # the rate of the first warm-up step is 0, so nothing moves
        if context.number > 0 and self.term.coupling == "decoupled" and learning_rate > 0:
            self.term.after_step(self._groups, learning_rate, context.total_rate)

    def end(self, context: StageContext) -> None:
        self.term.detach()

    def anchored(self, context: StageContext) -> Source:
        """The adapter, and with the option ``vocabulary`` the vocabulary's parameters."""
        if not self.options.vocabulary:
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


def _built_in(name: Any) -> type[Term] | None:
    """The class of a proximal term by its name. None for an import path, because reading a configuration must
    not run the code of others."""
    if not isinstance(name, str) or "." in name:
        return None
    from peso.adapters.proximal import find_term

    try:
        return find_term(name)
    except ConfigError as error:
        raise ValueError(f"strategy.proximal: {error}") from None
