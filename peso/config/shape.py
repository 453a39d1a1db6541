"""The part of a configuration that determines a stage, and the changes that existing files do not fit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from peso.config.data import DataConfig, SimulateConfig
from peso.config.model import BUILT_IN, OF_ITEMS, is_path
from peso.config.reading import leaves
from peso.config.tree import Config

SHAPES_A_STAGE = ("backbone", "prompt", "adapter", "training")
FOR_NEW_ITEMS = ("vectors", "index")  # keys of `items` with names of files, which may grow or be moved
Changes = dict[str, tuple[Any, Any]]  # the earlier and the current value of each dotted key that differs


def is_later(key: str) -> bool:
    """Whether a key affects only the stages after stage 0."""
    return key == "training.later_learning_rate_scale" or key.startswith(("strategy.", "training.later."))


def stage_shape(config: Config, stage: int) -> dict[str, Any]:
    """The part of a configuration that determines one stage, except for the data, as plain values.

    Stage 0 is trained in the same way for every strategy, with the unscaled learning rate. If it trains a
    whole backbone, it has no adapter.
    """
    tree = config.model_dump(mode="json")
    tree["training"] = config.training.determining()
    shape: dict[str, Any] = {key: tree[key] for key in SHAPES_A_STAGE} | {"seed": config.seed_of_stage(stage)}
    if not shape["backbone"].get("dropout"):  # earlier versions did not have this key
        shape["backbone"].pop("dropout", None)
    if config.head.name == "items":
        # as above
        shape["head"] = {key: value for key, value in tree["head"].items() if value or key not in OF_ITEMS}
    if stage:
        later = config.model_dump(mode="json", include={"training": {"later"}})["training"]
        return shape | {"training": shape["training"] | later, "strategy": tree["strategy"]}
    del shape["training"]["later_learning_rate_scale"]
    if config.backbone.trained_at_base:
        del shape["adapter"]
    return shape


def moved(config: Config, now: Config) -> Config:
    """A configuration with the locations of another one, which may change without affecting a stage: the
    device, the sharding and, if it is a directory, the backbone. (Weights are compared when they are loaded.)

    Args:
        now: the configuration whose locations are used.
    """
    here, there = config.backbone, now.backbone
    names = here.name, there.name
    is_directory = any(map(_is_directory, names)) and not set(names) & set(BUILT_IN)
    backbone = here.model_copy(
        update={
            "name": there.name if is_directory else here.name,
            "pretrained": there.pretrained if here.pretrained and there.pretrained else here.pretrained,
        }
    )
    where = {"device": now.training.device, "sharding": now.training.sharding}
    training = config.training.model_copy(update=where)
    return config.model_copy(update={"backbone": backbone, "training": training})


def changed_shape(before: Config, now: Config, stage: int) -> Changes:
    """The changes that affect a stage. A new location of the backbone and another device do not count."""
    changes = _changes(stage_shape(before, stage), stage_shape(moved(now, before), stage))
    return {
        key: (_value(before, key) if old is None else old, _value(now, key) if new is None else new)
        for key, (old, new) in changes.items()
    }


def _value(config: Config, key: str) -> Any:
    """The value of a dotted key, also of one that is not written because it is the default."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part, None)
    return value


def changed_data(stream: Mapping[str, Any], config: Config) -> Changes:
    """The changes of ``data`` since a stream was made, according to the manifest of the stream."""
    if not isinstance(stream.get("source"), Mapping):
        return {}
    source = dict(stream["source"])
    seed = source.pop("seed", config.seed_of_data)
    if source.get("format") == "simulate":
        sizes = {name: source.pop(name) for name in SimulateConfig.model_fields if name in source}
        source |= {"simulate": sizes, "split": stream.get("split", "natural")}
    try:
        before = DataConfig.model_validate(source)
    except ValidationError:  # an earlier version had other keys
        return {}
    any_engine = {"engine"}  # every engine makes the same stream
    changes = _changes(
        {"data": before.model_dump(mode="json", exclude=any_engine)},
        {"data": config.data.model_dump(mode="json", exclude=any_engine)},
    )
    return changes | _changed_seed(seed, config)


def changed_items(ids: Mapping[str, Any], config: Config) -> Changes:
    """The changes of ``items`` since semantic IDs were made, according to the manifest of the IDs."""
    made_with = ids.get("config")
    if made_with is None:  # imported, either from a file or with the data
        imported = ids.get("made_by") == "import" and config.data.format != "peso-release"
        return {"items.index": (ids["source"], None)} if imported and config.items.index is None else {}
    # `behavior` and `refresh` are written only if they are given
    now = config.items.model_dump(mode="json", include={*made_with, "behavior", "refresh"})
    changes = _changes({"items": made_with}, {"items": now})
    files = [f"items.{name}" for name in FOR_NEW_ITEMS]
    changes = {key: both for key, both in changes.items() if key not in files}
    if config.items.index is not None:
        changes["items.index"] = (None, config.items.index)
    return changes | _changed_seed(ids.get("seed", config.seed_of_data), config)


def _changed_seed(before: int, config: Config) -> Changes:
    key = "seed" if config.data_seed is None else "data_seed"
    return {} if before == config.seed_of_data else {key: (before, config.seed_of_data)}


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    old, new = dict(leaves(before)), dict(leaves(now))
    return {key: (old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)}


def _is_directory(name: str) -> bool:
    return is_path(name) or os.path.isdir(name)
