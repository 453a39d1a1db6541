"""``blend``: plain fine-tuning whose predictions are averaged with those of the previous stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from peso.training.strategies.strategy import StageContext, Strategy

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "blend."  # of names in StageContext.memory


class Blend(Strategy):
    """``single``, but predictions use the logits share · new + (1 - share) · previous.

    Training is the same: the new and the previous model are those of ``single``. Each stage also stores the
    adapter and vocabulary of the previous stage, and a prediction takes two forward passes.
    """

    name = "blend"
    reads = frozenset({"blend"})
    moves_one_adapter = True

    class Options(Strategy.Options):
        share: float = Field(0.5, ge=0, le=1, description="weight of the new stage's logits")

    options: Options

    @property
    def passes_per_answer(self) -> int:
        return 2

    def begin(self, context: StageContext) -> None:
        from peso.model.ensemble import stored

        assert context.vocabulary is not None
        context.memory.update(stored(context.backbone, context.vocabulary, PREFIX))

    def answer(self, model: Any, memory: Mapping[str, Tensor]) -> Any:
        from peso.model.ensemble import Ensemble, stored_twin

        last = stored_twin(model, memory, PREFIX)
        return model if last is None else Ensemble(model, last, self.options.share)
