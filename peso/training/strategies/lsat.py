"""``lsat``: a long-term adapter on all data so far and a short-term one on the new stage (Shi et al. 2023,
arXiv 2312.15599)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from peso.training.strategies.strategy import StageContext, Strategy

if TYPE_CHECKING:
    from torch import Tensor

    from peso.events.histories import TargetSequence

LONG, SHORT = "long-term", "short-term"
PREFIX = "lsat."  # of names in StageContext.memory


class Lsat(Strategy):
    """A long-term adapter on all data so far and a short-term one on the new stage, fused (LSAT).

    A stage t has two trainings. In the long-term one, adapter and vocabulary are reset and trained on stages
    0 … t. In the short-term one, a new adapter is trained on stage t, and the vocabulary is trained further.
    With w = ``long_share``, predictions combine the two:

    - fusion ``outputs``: the logits w · long + (1 - w) · short, each with its own vocabulary. This takes two
      forward passes.
    - fusion ``arithmetic``: the weights W + w ΔW_long + (1 - w) ΔW_short. Vocabulary rows are averaged with
      the same weights.
    """

    name = "lsat"
    chooses_by_data = True

    class Options(Strategy.Options):
        fusion: Literal["outputs", "arithmetic"] = Field(
            "outputs", description="what is fused: the logits of two models, or the weights of two adapters"
        )
        long_share: float = Field(0.5, ge=0, le=1, description="weight of the long-term adapter")

    options: Options

    @property
    def passes_per_answer(self) -> int:
        return 2 if self.options.fusion == "outputs" else 1

    def phases(self, stage: int) -> Sequence[str]:
        return (LONG, SHORT)

    def starts_anew(self, phase: str) -> bool:
        return phase == LONG

    def choose(self, context: StageContext) -> Sequence[TargetSequence] | None:
        return context.everything() if context.phase == LONG else None

    def begin(self, context: StageContext) -> None:
        from peso.adapters.lora import redraw_adapter

        if context.phase == LONG:
            assert context.reset is not None
            context.reset()
            context.memory.clear()  # neither adapter of the last stage is needed
        else:
            redraw_adapter(context.backbone, (context.seed, context.number))

    def end(self, context: StageContext) -> None:
        from peso.model.ensemble import stored

        if context.phase == LONG:
            assert context.vocabulary is not None
            context.memory.update(stored(context.backbone, context.vocabulary, PREFIX))
        elif self.options.fusion == "arithmetic":
            self._fuse_weights(context)

    def _fuse_weights(self, context: StageContext) -> None:
        """Fuse in place: the long-term adapter becomes a frozen past adapter, and the short-term adapter is
        scaled."""
        from torch import no_grad

        from peso.adapters.groups import lora_layers
        from peso.adapters.lora import Past
        from peso.model.ensemble import read_stored

        found = read_stored(context.memory, PREFIX)
        assert found is not None
        long, rows = found
        w, vocabulary = self.options.long_share, context.vocabulary
        assert vocabulary is not None
        context.memory.clear()
        context.memory.update(Past(long.down, long.up, long.ranks, w * long.magnitudes).state())
        with no_grad():
            for layer in lora_layers(context.backbone).values():
                layer.lora_B["default"].weight.mul_(1 - w)
            for name, p in vocabulary.named_parameters():
                p.lerp_(rows[name].to(p), w)

    def answer(self, model: Any, memory: Mapping[str, Tensor]) -> Any:
        from peso.model.ensemble import Ensemble, stored_twin

        long = stored_twin(model, memory, PREFIX)
        return model if long is None else Ensemble(long, model, self.options.long_share)
