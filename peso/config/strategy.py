"""How later stages are learnt: the section `strategy`, one class a strategy with the options it takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from peso.config.section import Section


class NoneConfig(Section):
    """Only stage 0 is learnt; later stages inherit it unchanged."""

    name: Literal["none"]


class SingleConfig(Section):
    """One adapter, fine-tuned on every stage from where the last one left it."""

    name: Literal["single"]


class PesoConfig(Section):
    """``single``, held near its last state by the softmax-KL proximal term."""

    name: Literal["peso"]
    weight: float = Field(2.0, ge=0)
    reduction: Literal["sum", "mean"] = "mean"


StrategyConfig = NoneConfig | SingleConfig | PesoConfig


def expand_strategy(value: Any) -> Any:
    """The short forms of the section written out: a name, or `paper`."""
    if value == "paper":
        return {"name": "peso", "weight": 2.0, "reduction": "mean"}
    if isinstance(value, str):
        return {"name": value}
    return {"name": "peso", **value} if isinstance(value, Mapping) else value
