"""Manifests beside data files: the number of the format, what was counted, the sha256 of every file.

Knows JSON and checksums; knows nothing of what the files hold or of who writes them safely.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peso.durable import checksum, checksums, json_text, write_atomically
from peso.errors import WorkspaceError

MANIFEST = "manifest.json"


def write_manifest(directory: Path, number: int, content: Mapping[str, Any]) -> None:
    """Write ``manifest.json`` last: ``content``, then the format's number and the files' checksums."""
    whole = {**content, "format": number, "files": checksums(directory)}
    write_atomically(directory / MANIFEST, json_text(whole).encode())


def read_manifest(directory: Path, number: int) -> dict[str, Any]:
    """Read the manifest of a directory whose format this version knows up to ``number``.

    Raises:
        WorkspaceError: there is none, it is damaged, or a newer version wrote it.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        written = manifest["format"]
        files = manifest["files"]
    except FileNotFoundError:
        raise WorkspaceError(f"{path} is missing; remove {directory} and make it again") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WorkspaceError(
            f"{path} is damaged ({type(error).__name__}: {error}); remove {directory} and make it again"
        ) from None
    if not isinstance(written, int) or written > number:
        raise WorkspaceError(
            f"{path} was written by a newer version of peso (format {written}; this one reads "
            f"up to {number}); update peso"
        )
    if not isinstance(files, dict):
        raise WorkspaceError(f"{path} is damaged (no checksums); remove {directory} and make it again")
    return manifest


def intact(directory: Path, name: str, manifest: Mapping[str, Any]) -> Path:
    """The path of a file whose checksum is the manifest's.

    Raises:
        WorkspaceError: the file is missing or has changed since the manifest was written.
    """
    path = directory / name
    if not path.is_file():
        raise WorkspaceError(f"{path} is missing; remove {directory} and make it again")
    if checksum(path) != manifest["files"].get(name):
        raise WorkspaceError(
            f"{path} is damaged: its sha256 is not the one in {MANIFEST}; "
            f"remove {directory} and make it again"
        )
    return path
