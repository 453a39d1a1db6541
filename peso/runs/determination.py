"""What determines a stage: two stages of equal digest have equal files.

Reads configurations and manifests only, so that a command can look before it loads a model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peso.config import Config
from peso.config.model import BUILT_IN
from peso.config.reading import leaves
from peso.errors import WorkspaceError
from peso.events.stream import Stream, stage_file
from peso.items.index_files import read_semantic_ids
from peso.runtime.files import digest

if TYPE_CHECKING:
    from peso.runs.workspace import Workspace

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


def determination(workspace: Workspace, stage: int) -> str:
    """Digest of all that determines a stage: configuration, its data, the codes, and the stage before.

    Stages of equal digest have equal files, on the same hardware and versions. Of the codes those count that
    the catalogue had when the stage came: items that are appended later change no earlier stage.
    """
    before: str | None = None
    if stage and stage - 1 in workspace.finished_stages:
        before = workspace.stage_manifest(stage - 1)["determined_by"]
    elif stage:
        before = determination(workspace, stage - 1)
    stream, ids = Stream.open(workspace.stream_directory), read_semantic_ids(workspace.semantic_ids_directory)
    data = stream.manifest["files"][stage_file(stage)]
    codes = ids.fingerprint(stream.items_known(stage))
    return digest(stage_shape(workspace.config, stage), data, codes, before)


def require_as_determined(workspace: Workspace, stage: int) -> None:
    """Raise WorkspaceError if data, semantic IDs, configuration or stage before are not those that a finished
    stage was trained with."""
    known = workspace.stage_manifest(stage)["determined_by"]
    if known != determination(workspace.as_trained(stage), stage):
        raise WorkspaceError(
            f"{workspace.stage_directory(stage)} was not trained with the stream, the semantic IDs and the "
            f"stages before it that are in {workspace.root}: a part was exchanged or edited. Restore it, or "
            "remove the stage and those after it, and train again"
        )
