"""Small JSON files with a format number and their own sha256, replaced atomically."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from peso.errors import DataError, WorkspaceError
from peso.runtime.failures import first_line
from peso.runtime.files import digest, file_state, json_text, read_json_object, write_atomically

Entry = TypeVar("Entry", bound=BaseModel)
Value = TypeVar("Value")


def require_known_format(path: Path, number: object, newest: int) -> None:
    """Raise WorkspaceError if a file has a format number beyond the newest one that can be read."""
    if type(number) is int and number > newest:
        raise WorkspaceError(
            f"{path} was written by a newer version of peso "
            f"(format {number}; this one reads up to {newest}); update peso"
        )


def read_record(path: Path, newest: int) -> dict[str, Any]:
    """The content that :func:`write_record` wrote.

    Args:
        newest: the highest format number that can be read.

    Raises:
        WorkspaceError: a newer version wrote the file.
        DataError: the file is not readable or not JSON.
        ValueError: the content does not match its sha256.
    """
    content = read_json_object(path)
    number, stated = content.pop("format", None), content.pop("sha256", None)
    require_known_format(path, number, newest)
    if number != newest or stated != digest(content):
        raise ValueError("its content does not match its own sha256")
    return content


def write_record(path: Path, number: int, content: dict[str, Any]) -> None:
    """Replace a file by ``content``, the format number ``number`` and the sha256 of the content."""
    text = json_text({"format": number, **content, "sha256": digest(content)})
    write_atomically(path, text.encode())


def read_entries(path: Path, newest: int, entry: type[Entry], lost: str, cure: str) -> dict[str, Entry]:
    """The entries that :func:`write_entries` wrote, by item, in the same order. Without a file there are
    none.

    Args:
        newest: the highest format number that can be read.
        entry: the type of an entry.
        lost: what is unknown if the file is damaged, for the message.
        cure: what to do then, other than restoring the file from a copy.

    Raises:
        WorkspaceError: the file is damaged, or was written by a newer version.
    """
    if not os.path.lexists(path):
        return {}
    try:
        content = read_record(path, newest)
        if content.keys() != {"items"} or not isinstance(content["items"], dict):
            raise ValueError("it has other content than items")
        return {item: entry.model_validate(each) for item, each in content["items"].items()}
    except (DataError, ValidationError, ValueError) as error:
        raise WorkspaceError(
            f"{path} is damaged ({first_line(error)}), so {lost}; restore it from a copy, or {cure}"
        ) from None


def write_entries(path: Path, number: int, items: Mapping[str, BaseModel]) -> None:
    """Replace a file by the entries of items, with format ``number``."""
    write_record(
        path, number, {"items": {item: each.model_dump(mode="json") for item, each in items.items()}}
    )


class Reread(Generic[Value]):
    """The content of a file, which is read again when the file changes.

    Args:
        path: the file; it may be missing.
        read: a function that reads it. It must be picklable, because a workspace is sent to the other
            processes of a run.
    """

    def __init__(self, path: Path, read: Callable[[], Value]) -> None:
        self._path, self._read = path, read
        self._known: tuple[object, Value] | None = None

    def current(self) -> Value:
        """The content; the same object as long as the file does not change. Raises what ``read`` raises."""
        state = file_state(self._path)
        if self._known is None or self._known[0] != state:
            self._known = state, self._read()
        return self._known[1]
