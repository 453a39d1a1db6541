"""Which stage of a workspace serves: ``served.json``, replaced atomically by every promotion and rollback.

The file has its own lock, so that a promotion does not wait for an update in progress. Reading needs no lock.
"""

from __future__ import annotations

import os
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from peso.errors import DataError, WorkspaceError
from peso.runs.place import SERVED, SERVED_LOCK
from peso.runs.stage import RunStage
from peso.runs.workspace import Workspace
from peso.runtime.failures import sentence
from peso.runtime.files import in_turn
from peso.runtime.provenance import timestamp
from peso.runtime.records import read_record, write_record

FORMAT = 1  # of served.json; newer versions may write higher numbers
By = Literal["gate", "promote", "rollback"]


class Change(BaseModel):
    """One change of the serving stage.

    Attributes:
        stage: the stage that serves from then on.
        before: the stage that served until then; ``from`` in the file.
        time: of the change, ISO 8601 in UTC.
        by: the command, or the gate of an update.
        forced: whether the stage was promoted although the gate rejected it.
        pinned: whether the gate does not replace the stage until the next manual promotion.
        determined_by: the digest of the stage, to detect that it was trained again.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)

    stage: int = Field(ge=0)
    before: int | None = Field(ge=0, alias="from")
    time: str
    by: By
    reason: str | None = None
    forced: bool = False
    pinned: bool = False
    determined_by: str


class Served(BaseModel):
    """All changes of the serving stage, oldest first; none if no stage was promoted yet."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    changes: list[Change] = []

    @property
    def latest(self) -> Change | None:
        return self.changes[-1] if self.changes else None

    @property
    def current(self) -> int | None:
        """The recorded serving stage. None: no stage was promoted yet, so the newest trained one serves."""
        return self.changes[-1].stage if self.changes else None

    @property
    def pinned(self) -> bool:
        return bool(self.changes and self.changes[-1].pinned)

    @property
    def earlier(self) -> list[tuple[int, str | None]]:
        """The targets of successive rollbacks, each with its digest if known.

        A promotion adds the stage that it replaces; a rollback removes the stages that it skips.
        """
        digests: dict[int, str] = {}
        stack: list[tuple[int, str | None]] = []
        for change in self.changes:
            if change.by == "rollback":
                while stack and stack.pop()[0] != change.stage:
                    pass
            elif change.before is not None and change.before != change.stage:
                stack.append((change.before, digests.get(change.before)))
            digests[change.stage] = change.determined_by
        return stack[::-1]


def served(workspace: Workspace) -> Served:
    """Read ``served.json``.

    Raises:
        WorkspaceError: the file is damaged, or was written by a newer version.
    """
    path = workspace.root / SERVED
    if not os.path.lexists(path):
        return Served()
    try:
        return Served.model_validate(read_record(path, FORMAT))
    except (DataError, ValidationError, ValueError) as error:
        if isinstance(error.__cause__, OSError) and path.is_file():  # not readable now, but maybe intact
            raise WorkspaceError(sentence(error.__cause__)) from None
        raise WorkspaceError(
            f"{path} is damaged ({str(error).splitlines()[0]}), so it is not known which stage serves; "
            "restore it from a copy, or remove it and promote a stage: "
            f"`peso promote -w {workspace.root} --stage T`"
        ) from None


def is_lost(workspace: Workspace) -> bool:
    """Whether ``served.json`` is missing although the gate has judged a stage, which it records first. The
    newest stage must not serve then: it may be one that did not pass."""
    if os.path.lexists(workspace.root / SERVED):
        return False
    return any(workspace.stage(number).verdict is not None for number in workspace.finished_stages)


def _lost(workspace: Workspace) -> WorkspaceError:
    return WorkspaceError(
        f"{workspace.root / SERVED} is missing, although the gate has judged stages, so it is not known "
        f"which stage serves; restore it from a copy, or promote a stage: `peso promote -w {workspace.root} "
        "--stage T`"
    )


def serving_stage(workspace: Workspace) -> RunStage:
    """The serving stage: the recorded one, or the newest trained one if none was promoted yet.

    Raises:
        WorkspaceError: no stage is trained, the recorded one was removed or trained again, or the record is
            lost.
    """
    latest = served(workspace).latest
    if latest is None:
        newest = workspace.trained()
        if is_lost(workspace):
            raise _lost(workspace)
        return newest
    if not _is_there(workspace, latest.stage, latest.determined_by):
        raise WorkspaceError(
            f"stage {latest.stage} of {workspace.root} should serve, but was removed or trained again; "
            f"promote a stage: `peso promote -w {workspace.root} --stage T`"
        )
    return workspace.stage(latest.stage)


def promote(
    workspace: Workspace,
    number: int,
    *,
    by: By = "promote",
    reason: str | None = None,
    force: bool = False,
    pinned: bool = False,
    instead_of: int | None = None,
) -> bool:
    """Make a stage the serving one.

    Args:
        by: what makes the change.
        reason: why, which is recorded.
        force: promote the stage even if it did not pass the gate.
        pinned: the gate does not replace the stage until the next manual promotion.
        instead_of: for the gate: the stage that was serving when it decided.

    Returns:
        False if nothing was changed and recorded: the stage serves already, or, for the gate, another stage
        than ``instead_of`` serves or is pinned.

    Raises:
        WorkspaceError: the stage is not trained, did not pass the gate, or has a damaged file; or
            ``served.json`` is damaged or cannot be written. The serving stage does not change.
    """
    stage = workspace.trained(number)
    determined_by, missed = stage.determined_by, _missed(stage)
    stage.require_intact_weights()
    if missed and not force:
        raise WorkspaceError(
            f"stage {number} of {workspace.root} did not pass its gate ({missed}); to promote it anyway, "
            f"which is recorded: `peso promote -w {workspace.root} --stage {number} --force`"
        )
    with in_turn(workspace.root / SERVED_LOCK):
        if not _is_there(workspace, number, determined_by):
            raise WorkspaceError(
                f"stage {number} of {workspace.root} was removed meanwhile; choose one of the stages that "
                f"`peso status -w {workspace.root}` shows"
            )
        known = served(workspace)
        latest = known.latest
        if by == "gate" and (latest is None or latest.pinned or latest.stage != instead_of):
            return False
        if latest is None:
            before = None if is_lost(workspace) else workspace.trained().number
        else:
            before = latest.stage
            if (number, pinned, determined_by) == (before, latest.pinned, latest.determined_by):
                return False
        _record(stage, known, before, by, reason, forced=missed is not None, pinned=pinned)
    return True


def serve_from_now(workspace: Workspace, reason: str) -> None:
    """Record the newest trained stage as the serving one, unless one is recorded, so that later stages have
    to pass the gate.

    Raises:
        WorkspaceError: no stage is trained, or the record is lost.
    """
    with in_turn(workspace.root / SERVED_LOCK):
        known, newest = served(workspace), workspace.trained()
        if known.current is None:
            if is_lost(workspace):
                raise _lost(workspace)
            _record(newest, known, None, "gate", reason)


def rollback(workspace: Workspace, *, reason: str | None = None, pinned: bool = False) -> Change:
    """Make the previous serving stage the serving one again; returns the recorded change. Repeated calls go
    back further. Stages that were removed, pruned or trained again are skipped.

    Args:
        reason, pinned: see :func:`promote`.

    Raises:
        WorkspaceError: no other stage served before; otherwise as :func:`promote`.
    """
    with in_turn(workspace.root / SERVED_LOCK):
        known = served(workspace)
        target = previous(workspace, known)
        if target is None:
            raise WorkspaceError(
                f"no other stage of {workspace.root} served before the current one; promote one by its "
                f"number: `peso promote -w {workspace.root} --stage T`"
            )
        workspace.stage(target).require_intact_weights()
        return _record(workspace.stage(target), known, known.current, "rollback", reason, pinned=pinned)


def previous(workspace: Workspace, known: Served | None = None) -> int | None:
    """The target of a rollback, or None."""
    known = known or served(workspace)
    for number, determined_by in known.earlier:
        if number != known.current and _is_there(workspace, number, determined_by):
            return number
    return None


def refuse_removal(workspace: Workspace, numbers: range) -> None:
    """Raise WorkspaceError if one of these stages is recorded as the serving one."""
    if (current := served(workspace).current) is not None and current in numbers:
        back = previous(workspace)
        cure = f"peso rollback -w {workspace.root}"
        if back is None:
            cure = f"peso promote -w {workspace.root} --stage T"
        raise WorkspaceError(
            f"stage {current} of {workspace.root} serves, so it cannot be removed; let another stage serve "
            f"first: `{cure}`"
        )


def _is_there(workspace: Workspace, number: int, determined_by: str | None) -> bool:
    stage = workspace.stage(number)
    return stage.is_trained and stage.pruned is None and determined_by in (None, stage.determined_by)


def _missed(stage: RunStage) -> str | None:
    """The gate's reason for rejecting a stage; None: it passed, or was not judged."""
    verdict = stage.verdict
    return None if verdict is None or verdict["decision"] == "passed" else str(verdict["says"])


def _record(
    stage: RunStage, known: Served, before: int | None, by: By, reason: str | None, **flags: bool
) -> Change:
    """Add the change to a stage to ``served.json``."""
    change = Change(
        stage=stage.number,
        before=before,
        time=timestamp(),
        by=by,
        reason=reason,
        determined_by=stage.determined_by,
        **flags,
    )
    changes = [each.model_dump(mode="json", by_alias=True) for each in (*known.changes, change)]
    write_record(stage.workspace.root / SERVED, FORMAT, {"changes": changes})
    return change
