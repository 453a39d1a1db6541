"""Files that are whole or absent, and their checksums.

Knows the file system; knows nothing of what the files mean.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from peso.errors import ExportError, WorkspaceError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def commit_directory(target: Path) -> Iterator[Path]:
    """Write a directory aside; on success it appears whole under its name, on failure nothing does.

    Raises:
        WorkspaceError: the disk is full (nothing half-written is left).
    """
    aside = target.with_name(f".{target.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
        for path in [*aside.rglob("*"), aside]:
            _fsync(path)
        if target.exists():
            old = target.with_name(f".{target.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
            aside.rename(target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            aside.rename(target)
        _fsync(target.parent)
    except BaseException as error:
        restore(target)
        shutil.rmtree(aside, ignore_errors=True)
        raise_if_full(error, target)
        raise


def remove_directory(target: Path) -> None:
    """Remove a directory, if it is there, such that it is whole or gone."""
    gone = target.with_name(f".{target.name}.removed")
    shutil.rmtree(gone, ignore_errors=True)
    if target.is_dir():
        target.rename(gone)
        _fsync(target.parent)
        shutil.rmtree(gone, ignore_errors=True)


def link(source: str | Path, target: str | Path) -> None:
    """Another name for a file that nobody writes to again; a copy where links are not to be had."""
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """Hold a directory, made if absent, against every other process.

    Raises:
        WorkspaceError: another process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            who = handle.read().strip() or "unknown"
            raise WorkspaceError(
                f"{directory} is being written by another process (pid {who}); wait for it or stop it"
            ) from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield


def restore(target: Path) -> None:
    """Put back a directory that a crash took away between the two renames of :func:`commit_directory`."""
    old = target.with_name(f".{target.name}.old")
    if old.is_dir() and not target.exists():
        old.rename(target)


@contextmanager
def write_aside(target: Path) -> Iterator[Path]:
    """A path to write one file to; on success it replaces `target`, on failure `target` is as before.

    Raises:
        WorkspaceError: the disk is full (nothing half-written is left).
    """
    aside = target.with_name(f".{target.name}.writing")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        _fsync(aside)
        aside.replace(target)
        _fsync(target.parent)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        raise_if_full(error, target)
        raise


def write_atomically(target: Path, content: bytes) -> None:
    """Replace one file: the old content or the new, never a mixture."""
    with write_aside(target) as aside:
        aside.write_bytes(content)


def require_free(directory: str | Path) -> Path:
    """The path of a directory to write; raises ExportError unless it is absent or empty."""
    target = Path(directory).expanduser().absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ExportError(f"{target} is not empty; name a directory that does not exist yet")
    return target


def is_full(error: BaseException) -> bool:
    """Whether a write failed for want of space or quota."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    return isinstance(error, SafetensorError) and any(f"os error {number}" in str(error) for number in _FULL)


def raise_if_full(error: BaseException, target: Path) -> None:
    """Turn a failed write for want of space into a WorkspaceError that says so."""
    if is_full(error):
        raise WorkspaceError(
            f"no space left while writing {target}; nothing half-written was left behind. "
            "Free some space and start again: it continues where it was."
        ) from error


def json_text(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    path.write_text(json_text(value), encoding="utf-8")


def checksums(directory: Path) -> dict[str, str]:
    """sha256 of every file below, by relative path, in order of path."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {str(path.relative_to(directory)): checksum(path) for path in files}


def checksum(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def digest(*values: Any) -> str:
    """sha256 of JSON values, independent of key order: equal digests, equal determination."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
