"""`peso prune`: removes the weights of old stages. Their manifests, tests and logs stay, so that lineage and
reports are complete.

Weights that are still needed are kept: those of the newest stages, of the serving stage, of the target of a
rollback, and of stage 0 if the backbone was trained there or a hybrid is tested in its state after stage 0.
What a strategy needs of earlier stages is stored with the newest one (``state.safetensors``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from peso.errors import DataError, WorkspaceError
from peso.runs.baselines import found_baselines
from peso.runs.place import SERVED_LOCK
from peso.runs.served import previous, serving_stage
from peso.runs.stage import FORMAT, PRUNED, RunStage
from peso.runs.workspace import Workspace
from peso.runtime.files import in_turn
from peso.runtime.manifest import take_out
from peso.runtime.provenance import timestamp


@dataclass(frozen=True)
class Pruning:
    """What :func:`prune` removes.

    Attributes:
        stages: the stages whose weights are removed.
        bytes: size of the files; less disk space is freed if another workspace shares them.
        kept: reasons why other old stages keep their weights, by stage.
    """

    stages: list[int]
    bytes: int
    kept: dict[int, str]


def pruning(workspace: Workspace, keep: int) -> Pruning:
    """The weights to remove if the newest ``keep`` stages keep theirs.

    Args:
        keep: the number of newest stages that keep their weights.

    Raises:
        DataError: ``keep`` is not positive.
        WorkspaceError: no stage is trained, or a file is damaged; also if the weights of a stage that keeps
            them are, because older ones may be the last that can be used.
    """
    if keep < 1:
        raise DataError(f"keep = {keep}, but the newest stage is needed by the next update; keep 1 or more")
    newest = workspace.trained().number
    kept = _needed(workspace)
    old = [workspace.stage(number) for number in range(newest + 1 - keep)]
    gone = [stage for stage in old if stage.number not in kept and _existing_files(stage)]
    if gone:
        _require_intact([*sorted(kept), *range(max(0, newest + 1 - keep), newest + 1)], workspace)
    size = sum(path.stat().st_size for stage in gone for path in _existing_files(stage))
    return Pruning(
        [stage.number for stage in gone],
        size,
        {stage.number: kept[stage.number] for stage in old if stage.number in kept},
    )


def prune(workspace: Workspace, keep: int) -> Pruning:
    """Remove the weights of old stages; returns what was removed. The caller holds the workspace's lock.

    Promotions wait meanwhile. If interrupted, the call can be repeated.

    Raises:
        PesoError: as :func:`pruning`.
    """
    with in_turn(workspace.root / SERVED_LOCK):
        removed = pruning(workspace, keep)
        for number in removed.stages:
            stage = workspace.stage(number)
            take_out(stage.directory, stage.weight_files, FORMAT, {PRUNED: {"time": timestamp()}})
            for path in _existing_files(stage):
                path.unlink()
    return removed


def _require_intact(numbers: Iterable[int], workspace: Workspace) -> None:
    for number in dict.fromkeys(numbers):
        stage = workspace.stage(number)
        if stage.pruned is None:  # an earlier call with a smaller `keep` may have removed them
            try:
                stage.require_intact_weights()
            except WorkspaceError as error:
                raise WorkspaceError(
                    f"nothing was removed, because the weights of stage {number}, which are kept, cannot be "
                    f"used: {error}"
                ) from None


def _needed(workspace: Workspace) -> dict[int, str]:
    """Stages whose weights are needed regardless of their age, and the reasons."""
    needed = {}
    if (back := previous(workspace)) is not None:
        needed[back] = "it is the target of a rollback"
    if workspace.config.backbone.trained_at_base:
        needed[0] = "the backbone was trained there"
    elif any(baseline.fused for baseline in [*workspace.config.baselines, *found_baselines(workspace)]):
        needed[0] = "a hybrid is tested in its state after this stage"
    needed[serving_stage(workspace).number] = "it serves"
    return needed


def _existing_files(stage: RunStage) -> list[Path]:
    """The existing files of a stage's weights, including those left by an interrupted call."""
    names = set(stage.weight_files) | set((stage.pruned or {}).get("files", {}))
    return [path for name in sorted(names) if (path := stage.directory / name).is_file()]
