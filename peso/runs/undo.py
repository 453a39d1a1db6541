"""`peso undo`: removes the last stage: the training of the newest one, or an append that nothing was trained
on.

Afterwards, the same append and update give the same files as if the removed step had never existed.

While the removal is in progress, the file ``.undo`` in the workspace describes it, so that the command, if
repeated after a kill, does not remove a further step.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from peso.errors import WorkspaceError
from peso.events.append import shorten_stream
from peso.events.stream import Stream
from peso.items.semantic_ids import EARLIER
from peso.runs.place import SERVED_LOCK
from peso.runs.report import renew_report
from peso.runs.served import refuse_removal
from peso.runs.stage import FORMAT
from peso.runs.workspace import Workspace
from peso.runtime.files import commit_directory, in_turn, read_sealed, remove_directory, write_sealed
from peso.runtime.manifest import remove_folder
from peso.runtime.progress import Observer

UNDO = ".undo"


@dataclass(frozen=True)
class LastStep:
    """What :func:`undo` removes.

    Attributes:
        stages: the trained stage, or all stages of the append.
        appended: whether it is an append; ``events``, ``items`` and ``semantic_ids`` are the numbers removed
            with it.
        all_ids: whether all semantic IDs are removed, because they were made after the append and no stage
            was trained with them.
        gone: whether an undo that was killed has removed it already.
    """

    stages: range
    appended: bool
    events: int = 0
    items: int = 0
    semantic_ids: int = 0
    all_ids: bool = False
    gone: bool = False

    def __str__(self) -> str:
        name = stages_named(self.stages)
        if not self.appended:
            return f"the training of {name} and every test of it; its events stay"
        return (
            f"{name}, appended but not trained: {self.events:,} events, their {self.items:,} new items and "
            f"{'all ' * self.all_ids}{self.semantic_ids:,} semantic IDs"
        )


def stages_named(stages: range) -> str:
    """``stage 3``, ``stages 3 to 5``."""
    first, last = stages[0], stages[-1]
    return f"stage {first}" if first == last else f"stages {first} to {last}"


def last_step(workspace: Workspace) -> LastStep:
    """The step that :func:`undo` would remove, or that a killed undo has removed.

    Raises:
        WorkspaceError: there is no stream; only stage 0 and the ingested stream are left; the stage is
            recorded as serving; or the weights of the previous stage were pruned.
    """
    if not workspace.has_stream:
        raise WorkspaceError(f"{workspace.root} has no stream yet: there is nothing to undo")
    if (begun := _begun(workspace)) is not None and begun["left"] == _left(workspace):
        step = begun["step"]
        return LastStep(**{**step, "stages": range(*step["stages"]), "gone": True})
    stream, trained = workspace.stream, workspace.finished_stages
    newest = trained[-1] if trained else -1
    appended = stream.manifest.get("appended", [])
    if appended and (first := int(appended[-1]["first_stage"])) > newest:
        stages, known = range(first, stream.stages), stream.items_known(first - 1)
        events = sum(stream.counts[number]["events"] for number in stages)
        step = LastStep(stages, True, events, len(stream.items) - known)
        if not workspace.has_semantic_ids:
            return step
        ids = workspace.semantic_ids_manifest
        if ids["items"] <= known:
            return step
        if not trained and not any(before["items"] <= known for before in ids.get(EARLIER, [])):
            return replace(step, semantic_ids=ids["items"], all_ids=True)
        return replace(step, semantic_ids=ids["items"] - known)
    if newest > 0:
        refuse_removal(workspace, range(newest, newest + 1))
        if workspace.stage(newest - 1).pruned is not None:
            raise WorkspaceError(
                f"stage {newest} of {workspace.root} cannot be undone: the weights of stage {newest - 1}, "
                "from which it would be trained again, were removed by `peso prune`. Use an earlier copy of "
                "the workspace, or a new one (-w)"
            )
        return LastStep(range(newest, newest + 1), False)
    what = "stage 0 and the ingested stream" if trained else "the ingested stream"
    raise WorkspaceError(
        f"there is nothing to undo in {workspace.root}: {what} cannot be undone. To start over, use a new "
        f"workspace (-w), or remove {workspace.root}"
    )


def undo(workspace: Workspace, step: LastStep, observer: Observer) -> None:
    """Remove the last step, and write the report again if there was one. The caller holds the lock.

    If it is killed, the workspace stays usable, and the same call completes the removal.

    Args:
        step: the result of :func:`last_step`.

    Raises:
        WorkspaceError: a file is damaged, the disk is full, or the stage was promoted since. Nothing is
            removed.
    """
    begun = _begun(workspace) or {}
    had_report = workspace.report_directory.is_dir() or begun.get("report", False)
    with in_turn(workspace.root / SERVED_LOCK):  # promotions wait
        if not step.gone:
            _note(workspace, step, had_report)
        if not step.appended:
            _remove_traces(workspace, step.stages)
            remove_directory(workspace.stage(step.stages[0]).directory)
        elif not step.gone:
            _shorten(workspace, step)
    observer.note(f"removed: {step}")
    if had_report:
        renew_report(workspace, observer)
    (workspace.root / UNDO).unlink()


def _note(workspace: Workspace, step: LastStep, had_report: bool) -> None:
    """Write the file ``.undo``, after checking that the stage does not serve."""
    if not step.appended:
        refuse_removal(workspace, step.stages)
    stages, appends = _left(workspace)
    left = [stages, appends - 1] if step.appended else [stages - 1, appends]
    described = {**asdict(step), "stages": [step.stages.start, step.stages.stop]}
    content = json.dumps({"step": described, "left": left, "report": had_report})
    write_sealed(workspace.root / UNDO, content.encode())


def _begun(workspace: Workspace) -> dict[str, Any] | None:
    """The content of the file ``.undo`` of a killed undo, or None: ``step``, ``left`` (the value of
    :func:`_left` after the removal), and whether there was a ``report``.

    Raises:
        WorkspaceError: the file is damaged.
    """
    path = workspace.root / UNDO
    if not path.is_file():
        return None
    try:
        begun: dict[str, Any] = json.loads(read_sealed(path))
    except (OSError, ValueError, WorkspaceError):
        raise WorkspaceError(
            f"{path} is damaged, so it is not known what an interrupted undo was removing; remove {path}, "
            "then check with `peso status` what is left to undo"
        ) from None
    return begun


def _left(workspace: Workspace) -> list[int]:
    """The number of trained stages, and of appends in the stream."""
    appended = workspace.stream.manifest.get("appended", [])
    return [len(workspace.finished_stages), len(appended)]


def _shorten(workspace: Workspace, step: LastStep) -> None:
    """Remove the last append from the stream, with the IDs of its items and all results of its stages."""
    with commit_directory(workspace.stream_directory) as shorter:
        shorten_stream(workspace.stream_directory, shorter)
        if step.all_ids:
            remove_directory(workspace.semantic_ids_directory)
        elif step.semantic_ids or _refreshed(workspace, step.stages):
            from peso.items.earlier import shorten_semantic_ids

            ids = workspace.semantic_ids_directory
            with commit_directory(ids) as fewer:
                shorten_semantic_ids(Stream.open(shorter).items, step.stages[0], ids, fewer)
        # before the stream is replaced, so that no result ever refers to a missing stage
        _remove_traces(workspace, step.stages)


def _refreshed(workspace: Workspace, stages: range) -> bool:
    """Whether the codes were refreshed at one of these stages."""
    left = workspace.stream.stages - workspace.stages_without_refresh
    return workspace.config.items.refresh is not None and workspace.has_semantic_ids and left > stages[0]


def _remove_traces(workspace: Workspace, stages: range) -> None:
    """Remove tests of other models on these stages, results of baselines, checkpoints, and the report."""
    remove_directory(workspace.report_directory)
    root = workspace.root
    for stage in stages:
        for trained in workspace.stages:
            remove_folder(trained.directory, f"on={stage}", FORMAT)
    later = [path for path in root.glob("baselines/*/*") if path.name.isdecimal()]
    for directory in sorted(later, key=lambda path: int(path.name), reverse=True):
        if int(directory.name) >= stages[0]:  # a baseline's stage starts from the previous one
            remove_directory(directory)
    for unfinished in root.glob("stages/.*.unfinished"):
        remove_directory(unfinished)
