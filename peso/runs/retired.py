"""Items that are no longer recommended: ``retired.json``, replaced atomically by every change.

Retired items stay in the stream, in histories and in the model; they are only excluded from recommendations.
The file has its own lock, so that a change does not wait for an update in progress. Reading needs no lock.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from peso.errors import DataError
from peso.runs.place import RETIRED, RETIRED_LOCK
from peso.runs.workspace import Workspace
from peso.runtime.failures import listed
from peso.runtime.files import in_turn
from peso.runtime.provenance import timestamp
from peso.runtime.records import Reread, read_entries, write_entries

FORMAT = 1  # of retired.json; newer versions may write higher numbers


class Retirement(BaseModel):
    """When (ISO 8601 in UTC) and why an item was retired."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    time: str
    reason: str | None = None


def retired(root: Path) -> dict[str, Retirement]:
    """The retired items of a workspace by their ids in the stream, in the order in which they were retired.

    Raises:
        WorkspaceError: ``retired.json`` is damaged, or was written by a newer version.
    """
    lost, cure = "it is not known which items are retired", "remove it and retire the items again"
    return read_entries(root / RETIRED, FORMAT, Retirement, lost, cure)


def retired_items(root: Path) -> Reread[frozenset[str]]:
    """The ids of the retired items in the stream, read again when they change. Raises as :func:`retired`."""
    return Reread(root / RETIRED, partial(_ids, root))


def _ids(root: Path) -> frozenset[str]:
    return frozenset(retired(root))


def retire(workspace: Workspace, items: Sequence[str], reason: str | None = None) -> list[str]:
    """Retire items, given by any of their names, with immediate effect; returns those that were not retired
    before.

    Args:
        reason: why, which is recorded.

    Raises:
        DataError: an item is not in the stream, or no item would be left. Nothing is changed.
        WorkspaceError: there is no stream, or ``retired.json`` is damaged.
    """
    known, names = workspace.stream.item_ids, workspace.names
    _require_known(workspace, items, known, f"not in the stream of {workspace.root}", "check the ids")
    with in_turn(workspace.root / RETIRED_LOCK):
        before = retired(workspace.root)
        new = [item for item in dict.fromkeys(map(names.in_files, items)) if item not in before]
        if len(set(known) - {*before, *new}) == 0:
            raise DataError(
                f"all {len(known):,} items of {workspace.root} would be retired; keep at least one"
            )
        entry = Retirement(time=timestamp(), reason=reason)
        if new:
            _write(workspace.root, {**before, **dict.fromkeys(new, entry)})
    return [names.now(item) for item in new]


def restore(workspace: Workspace, items: Sequence[str]) -> list[str]:
    """Recommend retired items again; returns them.

    Raises:
        DataError: an item is not retired. Nothing is changed.
        WorkspaceError: ``retired.json`` is damaged.
    """
    names = workspace.names
    with in_turn(workspace.root / RETIRED_LOCK):
        before = retired(workspace.root)
        cure = f"`peso items list -w {workspace.root}` shows those that are"
        _require_known(workspace, items, before, "not retired", cure)
        gone = [*dict.fromkeys(map(names.in_files, items))]
        _write(workspace.root, {item: entry for item, entry in before.items() if item not in gone})
    return [names.now(item) for item in gone]


def _require_known(
    workspace: Workspace, items: Sequence[str], known: Collection[str], what: str, cure: str
) -> None:
    known, names = frozenset(known), workspace.names
    if others := [item for item in items if names.in_files(item) not in known]:
        shown = listed(map(repr, others))
        raise DataError(f"{len(others):,} of {len(items):,} items are {what}: {shown}; {cure}")


def _write(root: Path, items: dict[str, Retirement]) -> None:
    write_entries(root / RETIRED, FORMAT, items)
