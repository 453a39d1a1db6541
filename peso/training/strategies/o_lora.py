"""``o_lora``: a new adapter per stage, with a penalty on overlap with earlier ones (arXiv 2310.14152)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from peso.training.strategies.strategy import StageContext, Strategy

if TYPE_CHECKING:
    from torch import Tensor


class OLora(Strategy):
    """A new adapter, with a penalty on overlap of its A with those of earlier stages (O-LoRA).

    The weights of stage t are W + s Σ_{i<t} B_i A_i + s B_t A_t, and the penalty is
    weight · Σ_modules Σ_{i<t} ‖A_i A_tᵀ‖₁, where ‖·‖₁ is the sum of absolute values. The norm and the default
    weight are those of the authors' code. A_t and B_t are newly initialized.
    """

    name = "o_lora"
    reads = frozenset({"past"})

    class Options(Strategy.Options):
        weight: float = Field(0.5, ge=0, description="factor of the orthogonality penalty")

    options: Options
    # for each module, A of all earlier adapters (Σ ranks, in), and the trained A (rank, in)
    _pairs: list[tuple[Tensor, Tensor]]

    def begin(self, context: StageContext) -> None:
        from peso.adapters.groups import find_groups
        from peso.adapters.lora import start_new_adapter

        self._pairs = []
        past = start_new_adapter(context.backbone, context.memory, (context.seed, context.number))
        if past is not None:
            self._pairs = [
                (past.down[group.module].to(group.tensor), group.tensor)
                for group in find_groups(context.backbone)
                if group.factor == "A"
            ]

    def penalty(self, context: StageContext) -> Tensor | None:
        if not self._pairs:
            return None
        from torch import stack

        overlaps = [(before @ tensor.T).abs().sum() for before, tensor in self._pairs]
        return self.options.weight * stack(overlaps).sum()
