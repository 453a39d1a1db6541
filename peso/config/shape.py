"""The part of a configuration that shapes one stage: what its files depend on."""

from __future__ import annotations

from typing import Any

from peso.config.model import BUILT_IN
from peso.config.reading import leaves
from peso.config.tree import Config

SHAPES_A_STAGE = ("backbone", "prompt", "adapter", "training")


def is_later(key: str) -> bool:
    """Whether a key is about the stages after stage 0 alone."""
    return key == "training.later_learning_rate_scale" or key.startswith(("strategy.", "training.later."))


def stage_shape(config: Config, stage: int) -> dict[str, Any]:
    """The part of a configuration that shapes one stage, the data apart, as plain values.

    The base stage is trained alike by every strategy, at the unscaled learning rate; where it trains a whole
    backbone it has no adapter.
    """
    tree = config.model_dump(mode="json")
    tree["training"] = config.training.determining()
    shape: dict[str, Any] = {key: tree[key] for key in SHAPES_A_STAGE} | {"seed": config.seed_of_stage(stage)}
    if stage:
        later = config.model_dump(mode="json", include={"training": {"later"}})["training"]
        return shape | {"training": shape["training"] | later, "strategy": tree["strategy"]}
    del shape["training"]["later_learning_rate_scale"]
    if config.backbone.name in BUILT_IN:
        del shape["adapter"]
    return shape


def changed_shape(before: Config, now: Config, stage: int) -> dict[str, tuple[Any, Any]]:
    """Of dotted keys that shape a stage and differ: both values."""
    old, new = (dict(leaves(stage_shape(config, stage))) for config in (before, now))
    return {key: (old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)}
