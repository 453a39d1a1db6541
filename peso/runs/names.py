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

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from peso.items.names import NONE_RENAMED, ItemNames
from peso.runs.place import NAMES, NAMES_LOCK
from peso.runtime.files import in_turn
from peso.runtime.records import Reread, read_entries, write_entries

FORMAT = 1  # of names.json; newer versions may write higher numbers
PATIENCE = 600.0  # seconds to wait for an append


class Renaming(BaseModel):
    """The current name of an item, its earlier names other than the stored id, oldest first, and when it got
    its name (ISO 8601 in UTC)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str
    earlier: list[str] = []
    time: str


def renamings(root: Path) -> dict[str, Renaming]:
    """The renamed items of a workspace, by stored id, in the order in which they were first renamed.

    Raises:
        WorkspaceError: ``names.json`` is damaged, or was written by a newer version.
    """
    lost, cure = "it is not known which items are renamed", "remove it and rename the items again"
    return read_entries(root / NAMES, FORMAT, Renaming, lost, cure)


def item_names(root: Path) -> ItemNames:
    """The names of the items of a workspace. Raises WorkspaceError as :func:`renamings`."""
    return as_names(renamings(root))


def as_names(items: Mapping[str, Renaming]) -> ItemNames:
    """The current name of each renamed item, and the item of each of its names."""
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
    write_entries(root / NAMES, FORMAT, items)


@contextmanager
def names_held(root: Path) -> Iterator[None]:
    """Within the context, no item is renamed by others.

    Raises:
        WorkspaceError: another process holds the names for more than ten minutes.
    """
    with in_turn(root / NAMES_LOCK, PATIENCE):
        yield


def current_names(root: Path) -> Reread[ItemNames]:
    """The names of the items of a workspace, read again when they change. Raises as :func:`renamings`."""
    return Reread(root / NAMES, partial(item_names, root))
