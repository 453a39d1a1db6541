"""``peso``: one evolving adapter, held near its last state by a proximal term (arXiv 2510.25093)."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from peso.continual.hooks import StageContext, Strategy
from peso.continual.proximal import L2, PerRankKL, SoftmaxKL, Term


class Peso(Strategy):
    """``single`` with an anchor: the adapter that each stage from stage 1 on starts with.

    Args:
        proximal: which term holds it; ``strength``, ``weight``, ``coupling``, ``reduction``,
            ``temperature``, ``groups``: of the term.
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
            case _:
                raise ValueError(f"no proximal term {proximal!r}")
        self.examples = examples

    def begin(self, context: StageContext) -> None:
        if context.number > 0:
            self.term.anchor(context.backbone)
            if context.examples is not None:
                losses = context.examples.losses(context.number, self.examples)
                self.term.calibrate(context.backbone, losses, context.examples.tokens)

    def penalty(self, context: StageContext) -> Tensor | None:
        held = context.number > 0 and self.term.coupling == "loss" and self.term.weight != 0
        return self.term(context.backbone) if held else None

    def after_step(self, context: StageContext, learning_rate: float) -> None:
        if context.number > 0 and self.term.coupling == "decoupled":
            self.term.after_step(context.backbone, learning_rate, context.total_rate)

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
