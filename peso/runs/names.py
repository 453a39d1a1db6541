"""The names of renamed items: ``names.json``, replaced atomically by every change.

In all other files, a renamed item keeps the id under which it entered the stream. Names are translated where
they come in (logs, product tables, received events, requests) and where they go out (answers, exports, the
semantic IDs that a workspace hands out). So a renaming is one small file, which takes effect at once, also in
a running server. Rewriting the Parquet files instead would change the digests of all stages, which rest on
them, and stream and semantic IDs would have to be replaced together.

The file has its own lock, which an append holds from reading the names until the stream is replaced: no name
can be given to an item while an append adds an item with this name. Training does not hold it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from peso.errors import DataError, WorkspaceError
from peso.items.names import NONE_RENAMED, ItemNames
from peso.runs.place import NAMES, NAMES_LOCK
from peso.runtime.files import in_turn
from peso.runtime.records import read_record, write_record

FORMAT = 1  # of names.json; newer versions may write higher numbers
PATIENCE = 600.0  # seconds to wait for an append


class Renaming(BaseModel):
    """The current name of an item, its earlier names other than the stored id, oldest first, and when it got
    its name (ISO 8601 in UTC)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str
    earlier: list[str] = []
    time: str


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    items: dict[str, Renaming] = {}


def renamings(root: Path) -> dict[str, Renaming]:
    """The renamed items of a workspace, by stored id, in the order in which they were first renamed.

    Raises:
        WorkspaceError: ``names.json`` is damaged, or was written by a newer version.
    """
    path = root / NAMES
    if not os.path.lexists(path):
        return {}
    try:
        return _File.model_validate(read_record(path, FORMAT)).items
    except (DataError, ValidationError, ValueError) as error:
        raise WorkspaceError(
            f"{path} is damaged ({str(error).splitlines()[0]}), so it is not known which items are renamed; "
            "restore it from a copy, or remove it and rename the items again"
        ) from None


def item_names(root: Path) -> ItemNames:
    """The names of the items of a workspace. Raises WorkspaceError as :func:`renamings`."""
    return as_names(renamings(root))


def as_names(items: Mapping[str, Renaming]) -> ItemNames:
    """The names in both directions."""
    if not items:
        return NONE_RENAMED
    stored = {
        name: item
        for item, renaming in items.items()
        for name in (*renaming.earlier, renaming.name)
        if name != item
    }
    return ItemNames({item: renaming.name for item, renaming in items.items()}, stored)


def write_renamings(root: Path, items: Mapping[str, Renaming]) -> None:
    """Replace ``names.json``. The caller holds :func:`names_held`."""
    write_record(root / NAMES, FORMAT, _File(items=dict(items)).model_dump(mode="json"))


@contextmanager
def names_held(root: Path) -> Iterator[None]:
    """Within the context, no item is renamed by others.

    Raises:
        WorkspaceError: another process holds the names for more than ten minutes.
    """
    with in_turn(root / NAMES_LOCK, PATIENCE):
        yield


class CurrentNames:
    """The names of the items of a workspace, read again when the file changes."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._read: tuple[object, ItemNames] = (None, NONE_RENAMED)

    @property
    def stamp(self) -> tuple[int, int, int] | None:
        """Identifies the state of the file; None if there is none."""
        try:
            state = os.stat(self._root / NAMES)
        except FileNotFoundError:
            return None
        return state.st_ino, state.st_mtime_ns, state.st_size

    def current(self) -> ItemNames:
        """The names; the same object as long as the file does not change. Raises WorkspaceError as
        :func:`renamings`."""
        stamp, (known, names) = self.stamp, self._read
        if stamp != known:
            names = item_names(self._root)
            self._read = stamp, names
        return names
