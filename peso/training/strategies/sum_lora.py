"""``sum_lora``: the frozen adapters of earlier stages, normalized and summed, plus a trained one.

The cumulative designs of Table 1 of arXiv 2510.25093: ``history`` all or latest, with or without ``inherit``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from peso.training.strategies.strategy import StageContext, Strategy

if TYPE_CHECKING:
    from peso.adapters.lora import Past

TINY = 1e-30  # keeps the division by a zero norm finite


class SumLora(Strategy):
    """A new adapter, added to the frozen and normalized adapters of earlier stages.

    The weights of stage t are W + s Σ_{i<t} B̄_i Ā_i + s B_t A_t, where s = alpha / rank, and Ā_i and B̄_i are
    the factors of an earlier stage, divided by their Frobenius norms. With history ``latest``, the sum has
    only i = t-1. A_t and B_t are newly initialized, or start from the values of the previous stage with
    ``inherit``.
    """

    name = "sum_lora"
    reads = frozenset({"past"})
    train_magnitudes: ClassVar[bool] = False

    class Options(Strategy.Options):
        history: Literal["all", "latest"] = Field(
            "all", description="which earlier adapters are added: all, or the latest"
        )
        inherit: bool = Field(False, description="start from the last adapter instead of a new one")

    options: Options

    def begin(self, context: StageContext) -> None:
        from peso.adapters.lora import Past, put_past, read_adapter, redraw_adapter

        last, past = read_adapter(context.backbone), Past.of_state(context.memory)
        if last.acts:  # otherwise the previous stage trained the backbone itself
            last = normalized(last)
            past = last if past is None or self.options.history == "latest" else past + last
        if past is not None:
            put_past(context.backbone, past, train_magnitudes=self.train_magnitudes)
        if not self.options.inherit:
            redraw_adapter(context.backbone, (context.seed, context.number))

    def end(self, context: StageContext) -> None:
        from peso.adapters.lora import read_past

        if (past := read_past(context.backbone)) is not None:
            context.memory.update(past.state())


def normalized(adapter: Past) -> Past:
    """The adapter with each factor divided by its Frobenius norm. A zero factor stays zero."""
    from peso.adapters.lora import Past

    return Past(
        {name: down / down.norm().clamp_min(TINY) for name, down in adapter.down.items()},
        {name: up / up.norm().clamp_min(TINY) for name, up in adapter.up.items()},
        adapter.ranks,
        adapter.magnitudes,
    )
