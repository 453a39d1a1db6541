"""Small JSON files with a format number and their own sha256, replaced atomically."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peso.errors import WorkspaceError
from peso.runtime.files import digest, json_text, read_json_object, write_atomically


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
    if type(number) is int and number > newest:
        raise WorkspaceError(
            f"{path} was written by a newer version of peso (format {number}; this one reads up to "
            f"{newest}); update peso"
        )
    if number != newest or stated != digest(content):
        raise ValueError("its content does not match its own sha256")
    return content


def write_record(path: Path, number: int, content: dict[str, Any]) -> None:
    """Write content with format ``number``."""
    text = json_text({"format": number, **content, "sha256": digest(content)})
    write_atomically(path, text.encode())
