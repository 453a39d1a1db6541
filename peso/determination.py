"""What determines a stage: two stages of equal digest have equal files.

Reads configurations and manifests only, so that a command can look before it loads a model.
"""

from __future__ import annotations

from typing import Any

from peso.config import Config
from peso.config.model import BUILT_IN
from peso.durable import digest
from peso.events.stream import Stream, stage_file
from peso.items.index_files import read_semantic_ids
from peso.workspace import Workspace

SHAPES_A_STAGE = ("backbone", "prompt", "adapter", "training")


def stage_shape(config: Config, stage: int) -> dict[str, Any]:
    """The part of a configuration that shapes one stage, the data apart, as plain values.

    The base stage is learnt alike by every strategy, at the unscaled learning rate; where it trains a whole
    backbone it has no adapter.
    """
    tree = config.model_dump(mode="json")
    tree["training"] = config.training.determining()
    shape: dict[str, Any] = {key: tree[key] for key in SHAPES_A_STAGE} | {"seed": config.seed_of_stage(stage)}
    if stage:
        return shape | {"strategy": tree["strategy"]}
    del shape["training"]["later_learning_rate_scale"]
    if config.backbone.name in BUILT_IN:
        del shape["adapter"]
    return shape


def determination(workspace: Workspace, stage: int) -> str:
    """Digest of all that determines a stage: configuration, its data, the codes, and the stages before.

    Stages of equal digest have equal files, on the same hardware and versions. Of the codes those count that
    the catalogue had when the stage came: items that are appended later change no earlier stage.
    """
    stream, ids = Stream.open(workspace.stream_directory), read_semantic_ids(workspace.semantic_ids_directory)
    result: str | None = None
    for number in range(stage + 1):
        shape = stage_shape(workspace.config, number)
        data = stream.manifest["files"][stage_file(number)]
        result = digest(shape, data, ids.fingerprint(stream.items_known(number)), result)
    assert result is not None
    return result
