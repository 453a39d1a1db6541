"""``sum_lora``: frozen adapters of earlier stages, normalised and summed, beside the one that learns.

The cumulative designs of Table 1 of arXiv 2510.25093: ``history`` all or latest, with or without ``inherit``.
"""

from __future__ import annotations

from typing import Literal

from peso.adapters.earlier import Past, put_past, read_adapter, read_past
from peso.adapters.lora import redraw_adapter
from peso.training.strategies.strategy import StageContext, Strategy

TINY = 1e-30  # a norm to divide by where there is none


class SumLora(Strategy):
    """Stage t answers with W + s Σ_{i<t} B̄_i Ā_i + s B_t A_t, each factor of the past divided by its
    Frobenius norm, s = alpha / rank; with history ``latest`` the sum holds the last stage's alone. A_t, B_t
    begin fresh, or with ``inherit`` where the last stage left them."""

    train_magnitudes = False

    def __init__(self, history: Literal["all", "latest"] = "all", inherit: bool = False) -> None:
        self.history = history
        self.inherit = inherit

    def begin(self, context: StageContext) -> None:
        last, past = read_adapter(context.backbone), Past.of_state(context.memory)
        if last.acts:  # else the last stage trained the backbone itself
            last = normalised(last)
            past = last if past is None or self.history == "latest" else past + last
        if past is not None:
            put_past(context.backbone, past, train_magnitudes=self.train_magnitudes)
        if not self.inherit:
            redraw_adapter(context.backbone, (context.seed, context.number))

    def end(self, context: StageContext) -> None:
        if (past := read_past(context.backbone)) is not None:
            context.memory.update(past.state())


def normalised(adapter: Past) -> Past:
    """Each factor divided by its Frobenius norm. A factor that is zero stays zero."""
    return Past(
        {name: down / down.norm().clamp_min(TINY) for name, down in adapter.down.items()},
        {name: up / up.norm().clamp_min(TINY) for name, up in adapter.up.items()},
        adapter.ranks,
        adapter.magnitudes,
    )


class SdLora(SumLora):
    """``sum_lora`` whose past adapters are each multiplied by a number that learns with the new one:
    W + Σ_{i<t} m_i B̄_i Ā_i + s B_t A_t. A magnitude begins at s = alpha / rank and goes on where the last
    stage left it."""

    train_magnitudes = True
