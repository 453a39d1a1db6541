"""``peso``: one evolving adapter, held near its last state by a proximal term (arXiv 2510.25093)."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from peso.continual.groups import Found
from peso.continual.hooks import ForwardPass, StageContext, Strategy
from peso.continual.proximal import L2, Fisher, Orthogonal, OutputKL, PerRankKL, SoftmaxKL, Term


class Peso(Strategy):
    """``single`` with an anchor: the adapter that each stage from stage 1 on starts with.

    Args:
        proximal: which term holds it; ``strength``, ``weight``, ``coupling``, ``reduction``,
            ``temperature``, ``groups``: of the term.
        vocabulary: the rows of the semantic vocabulary are anchored too, input and output rows a group each.
        examples: single targets that ρ̄ (for a strength in the loss, and for the report) is estimated from.
    """

    def __init__(
        self,
        proximal: str = "softmax_kl",
        strength: float | None = None,
        weight: float | None = None,
        coupling: Literal["loss", "decoupled"] = "loss",
        reduction: Literal["sum", "mean"] = "mean",
        temperature: float | Literal["auto"] = 1.0,
        groups: Literal["factor", "module", "rank", "all"] = "factor",
        vocabulary: bool = False,
        examples: int = 64,
    ) -> None:
        how: dict[str, Any] = {"reduction": reduction, "strength": strength, "coupling": coupling}
        self.term: Term
        match proximal:
            case "softmax_kl":
                self.term = SoftmaxKL(weight, temperature=temperature, groups=groups, **how)
            case "per_rank_kl":
                self.term = PerRankKL(weight, temperature=temperature, **how)
            case "l2":
                self.term = L2(weight, **how)
            case "fisher":
                self.term = Fisher(weight, **how)
            case "orthogonal":
                self.term = Orthogonal(weight, **how)
            case "output_kl":
                self.term = OutputKL(weight, **how)
            case _:
                raise ValueError(f"no proximal term {proximal!r}")
        self.vocabulary = vocabulary
        self.examples = examples
        self._found = Found(())

    def begin(self, context: StageContext) -> None:
        if context.number == 0:
            return
        source, term, examples = self.held(context), self.term, context.examples
        self._found = Found.of(source)  # once a stage: their values change, they do not
        if isinstance(term, Fisher):
            # the adapter stands as the last stage left it: what mattered to that stage is asked now
            assert examples is not None
            term.anchor(source, examples.losses(context.number - 1, self.examples))
        else:
            term.anchor(source)
        # a penalty that is no distance to the anchor has no strength to tell unless one is asked for
        if examples is not None and not (isinstance(term, Orthogonal) and term.strength is None):
            term.calibrate(source, examples.losses(context.number, self.examples), examples.tokens)
        if isinstance(term, OutputKL) and term.weight != 0:
            term.attach(source)

    def penalty(self, context: StageContext) -> Tensor | None:
        in_loss = self.term.coupling == "loss" and not isinstance(self.term, OutputKL)
        held = context.number > 0 and in_loss and self.term.weight != 0
        return self.term(self._found) if held else None

    def output_penalty(self, context: StageContext, outputs: ForwardPass) -> Tensor | None:
        if context.number > 0 and isinstance(self.term, OutputKL) and self.term.weight != 0:
            return self.term.collected()
        return None

    def after_step(self, context: StageContext, learning_rate: float) -> None:
        # a stage of a single step is all warm-up: at rate 0 nothing moves
        if context.number > 0 and self.term.coupling == "decoupled" and learning_rate > 0:
            self.term.after_step(self._found, learning_rate, context.total_rate)

    def end(self, context: StageContext) -> None:
        if isinstance(self.term, OutputKL):
            self.term.detach()

    def held(self, context: StageContext) -> nn.Module | list[nn.Module | Tensor]:
        """What the term is given: the backbone, with the vocabulary's rows where these are anchored."""
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
