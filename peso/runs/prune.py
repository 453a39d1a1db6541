"""The weights of old stages removed from the disk: `peso prune`. What they were trained with, their tests and
their logs stay, so that lineage and reports are whole.

Kept are the weights that something still rests on: the newest stages, the stage that serves, the one that a
rollback leads to, and stage 0 where its backbone was trained there or where a hybrid is tested as it stood
then. What a strategy needs of earlier stages is stored with the newest (``state.safetensors``).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from peso.errors import DataError
from peso.runs.baselines import found_baselines
from peso.runs.place import SERVED_LOCK
from peso.runs.served import previous, serving_stage
from peso.runs.stage import FORMAT, PRUNED, RunStage
from peso.runs.workspace import Workspace
from peso.runtime.files import in_turn
from peso.runtime.manifest import take_out


@dataclass(frozen=True)
class Pruning:
    """What :func:`prune` removes.

    Attributes:
        stages: whose weights go.
        bytes: how much disk space they take; less is freed where another workspace shares the files.
        kept: why the other stages keep theirs, as far as they are not among the newest.
    """

    stages: list[int]
    bytes: int
    kept: dict[int, str]


def pruning(workspace: Workspace, keep: int) -> Pruning:
    """What is to be removed so that the newest ``keep`` stages keep their weights.

    Raises:
        DataError: ``keep`` is not positive.
        WorkspaceError: no stage is trained, or a file is damaged.
    """
    if keep < 1:
        raise DataError(f"keep = {keep}, but the newest stage is needed by the next update; keep 1 or more")
    newest = workspace.trained().number
    kept = _needed(workspace)
    old = [workspace.stage(number) for number in range(newest + 1 - keep)]
    gone = [stage for stage in old if stage.number not in kept and _files_there(stage)]
    size = sum(path.stat().st_size for stage in gone for path in _files_there(stage))
    return Pruning(
        [stage.number for stage in gone],
        size,
        {stage.number: kept[stage.number] for stage in old if stage.number in kept},
    )


def prune(workspace: Workspace, keep: int) -> Pruning:
    """Remove the weights of old stages; returns what was removed. The caller holds the workspace's lock.

    Nobody promotes a stage meanwhile. Interrupted, the call can be repeated.

    Raises: as :func:`pruning`.
    """
    with in_turn(workspace.root / SERVED_LOCK):
        removed = pruning(workspace, keep)
        for number in removed.stages:
            stage = workspace.stage(number)
            take_out(
                stage.directory,
                stage.weight_files,
                FORMAT,
                {PRUNED: {"time": datetime.now(UTC).isoformat(timespec="seconds")}},
            )
            for path in _files_there(stage):
                path.unlink()
    return removed


def _needed(workspace: Workspace) -> dict[int, str]:
    """Stages whose weights are needed whatever their age, and why."""
    needed = {}
    if (back := previous(workspace)) is not None:
        needed[back] = "a rollback leads to it"
    if workspace.config.backbone.trained_at_base:
        needed[0] = "the backbone was trained there"
    elif any(baseline.fused for baseline in [*workspace.config.baselines, *found_baselines(workspace)]):
        needed[0] = "a hybrid is tested as it stood then"
    needed[serving_stage(workspace).number] = "it serves"
    return needed


def _files_there(stage: RunStage) -> list[Path]:
    """Files of a stage's weights that are on the disk, also those of a pruning that was interrupted."""
    names = set(stage.weight_files) | set((stage.pruned or {}).get("files", {}))
    return [path for name in sorted(names) if (path := stage.directory / name).is_file()]
