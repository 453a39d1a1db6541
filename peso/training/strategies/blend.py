"""``blend``: plain fine-tuning that answers together with the stage before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from peso.training.strategies.strategy import StageContext, Strategy

if TYPE_CHECKING:
    from torch import Tensor

PREFIX, ROWS = "blend.", "blend.vocabulary."


class Blend(Strategy):
    """``single``, answering with the logits share · new + (1 - share) · last.

    The last stage's model is that which ``single`` would have: training is not affected. Adapter and
    vocabulary of the last stage are stored with each stage, and every answer takes two passes.
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
        from peso.adapters.lora import read_adapter

        assert context.vocabulary is not None
        last = {f"{PREFIX}{name}": t for name, t in read_adapter(context.backbone).state().items()}
        rows = context.vocabulary.state_dict().items()
        context.memory.update(last | {f"{ROWS}{name}": t.detach().cpu().clone() for name, t in rows})

    def answer(self, model: Any, memory: Mapping[str, Tensor]) -> Any:
        from peso.adapters.lora import Past, put_adapter
        from peso.model.ensemble import Ensemble, twin

        adapter = Past.of_state({name.removeprefix(PREFIX): t for name, t in memory.items()})
        if adapter is None:
            return model
        last = twin(model)
        put_adapter(last.backbone, adapter)
        last.vocabulary.load_state_dict(
            {name.removeprefix(ROWS): t for name, t in memory.items() if name.startswith(ROWS)}
        )
        return Ensemble(model, last, self.options.share)
