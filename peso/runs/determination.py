"""What determines a stage: two stages of equal digest have equal files.

Reads configurations and manifests only, so that a command can look before it loads a model.
"""

from __future__ import annotations

from peso.config.shape import stage_shape
from peso.errors import WorkspaceError
from peso.events.stream import Stream, stage_file
from peso.items.index_files import read_semantic_ids
from peso.runs.workspace import Workspace
from peso.runtime.files import digest


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
