"""Files that are whole or absent, their checksums, and one writer at a time."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from peso.errors import DataError, ExportError, FullDisk, WorkspaceError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SEAL = b"sha256:"  # between the content of a sealed file and its digest
LOCK = ".lock"

_count = count()  # of what this process has written aside


@contextmanager
def commit_directory(target: Path) -> Iterator[Path]:
    """Write a directory aside; on success it appears whole under its name, on failure nothing does.

    Several processes may write the same directory: the last one to finish wins, whole.

    Raises:
        WorkspaceError: the disk is full or the place cannot be written (nothing half-written is left).
    """
    target = Path(os.path.realpath(target))
    with _explained(target):
        if _kind(target) not in (None, stat.S_IFDIR):
            raise NotADirectoryError(errno.ENOTDIR, "a file is there already")
        aside = _aside(target)
        aside.mkdir()
    try:
        yield aside
        with _explained(target):
            for path in [*aside.rglob("*"), aside]:
                _fsync(path)
            _put_in_place(aside, target)
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


def _put_in_place(aside: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old")
    while True:
        try:
            aside.rename(target)  # succeeds where nothing is, or an empty directory
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        shutil.rmtree(old, ignore_errors=True)
        with suppress(FileNotFoundError):  # another process took it away first
            target.rename(old)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """Hold a directory, made if absent, against every other process and thread.

    Afterwards the lock file is as it was before: a refused command has written nothing.

    Raises:
        WorkspaceError: another process holds it, or it cannot be written.
    """
    with _explained(directory):
        directory.mkdir(parents=True, exist_ok=True)
    path = directory.resolve() / LOCK
    with _explained(path):
        before = path.read_bytes() if path.is_file() else None
        lock = FileLock(path)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            who = path.read_text(errors="replace").strip() or "unknown"
            raise WorkspaceError(
                f"{directory} is being written by another process (pid {who}); wait for it or stop it"
            ) from None
    try:
        with _explained(path):
            path.write_text(str(os.getpid()))
        yield
    finally:
        with suppress(OSError):
            if before is None:
                path.unlink(missing_ok=True)  # whoever has opened it meanwhile notices, see filelock
            elif path.is_file():
                path.write_bytes(before)
        lock.release()


@contextmanager
def in_turn(path: Path, seconds: float = 10.0) -> Iterator[None]:
    """Hold a lock file for a change of moments, after waiting for whoever holds it; it is gone afterwards.

    Raises:
        WorkspaceError: it is held for longer than ``seconds``, or cannot be written.
    """
    lock = FileLock(path)
    with _explained(path):
        try:
            lock.acquire(timeout=seconds)
        except Timeout:
            raise WorkspaceError(
                f"{path} is held by another process for more than {seconds:g} s; wait for it or stop it"
            ) from None
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)  # whoever has opened it meanwhile notices, see filelock
        lock.release()


def restore(target: Path) -> None:
    """Put back a directory that a crash took away between the two renames of :func:`commit_directory`."""
    old = target.with_name(f".{target.name}.old")
    if old.is_dir() and not target.exists():
        old.rename(target)


@contextmanager
def write_aside(target: Path) -> Iterator[Path]:
    """A path to write one file to; on success it replaces `target`, on failure `target` is as before.

    Raises:
        WorkspaceError: the disk is full or the place cannot be written (nothing half-written is left).
    """
    target = Path(os.path.realpath(target))
    with _explained(target):
        if _kind(target) not in (None, stat.S_IFREG):
            raise IsADirectoryError(errno.EISDIR, "it is a directory or a device")
        aside = _aside(target)
        aside.touch()
    try:
        yield aside
        with _explained(target):
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


def require_writable(target: Path) -> None:
    """Raise WorkspaceError if a file or directory cannot be written there; leaves nothing behind."""
    with _explained(target):
        _kind(target)  # raises for a name that cannot be
        place = Path(os.path.realpath(target)).parent
        while _kind(place) is None:
            place = place.parent
        tempfile.TemporaryFile(dir=place).close()


def require_free(directory: str | Path) -> Path:
    """The path of a directory to write; raises ExportError unless it is absent or empty."""
    target = Path(directory).expanduser().absolute()
    with _explained(target):
        kind = _kind(target)
        if kind is not None and (kind != stat.S_IFDIR or any(target.iterdir())):
            what = "not empty" if kind == stat.S_IFDIR else "a file"
            raise ExportError(f"{target} is {what}; name a directory that does not exist yet")
    return target


def require_new(file: Path, force: bool = False) -> None:
    """Raise ExportError if a file to write is there already, unless it is to be overwritten."""
    with _explained(file):
        if _kind(file) is not None and not force:
            raise ExportError(f"{file} is there already; name another file, or overwrite it with --force")


def _kind(path: Path) -> int | None:
    """Of what stands there, None where nothing does. Raises OSError for a name that cannot be."""
    try:
        return stat.S_IFMT(path.stat().st_mode)
    except FileNotFoundError:
        return None


def _aside(target: Path) -> Path:
    """Where what becomes ``target`` is written: beside it, under a name that no other process uses. What
    processes of this machine left there when they were killed is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    whose = f".{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:8]}.{platform.node()}."
    for left in target.parent.iterdir():
        if left.name.startswith(whose) and not _runs(int(left.name.removeprefix(whose).split(".")[0])):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    return target.with_name(f"{whose}{os.getpid()}.{next(_count)}.writing")


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    """An OSError as a WorkspaceError that says which place cannot be written, and why."""
    try:
        yield
    except OSError as error:
        raise_if_full(error, target)
        raise WorkspaceError(
            f"{target} cannot be written: {error.strerror or error}; change what is there, or choose another "
            "place"
        ) from error


def is_full(error: BaseException) -> bool:
    """Whether a write failed for want of space or quota."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    return isinstance(error, SafetensorError) and any(f"os error {number}" in str(error) for number in _FULL)


def raise_if_full(error: BaseException, target: Path) -> None:
    """Turn a failed write for want of space into an error that says so."""
    if is_full(error):
        raise FullDisk(
            f"no space left while writing {target}; nothing half-written was left behind. "
            "Free some space and start again: it continues where it was."
        ) from error


def json_text(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    path.write_text(json_text(value), encoding="utf-8")


def write_sealed(path: Path, content: bytes) -> None:
    """Replace one file by content that is followed by its sha256."""
    write_atomically(path, content + _SEAL + hashlib.sha256(content).digest())


def read_sealed(path: Path) -> bytes:
    """The content of what :func:`write_sealed` wrote. A file without a seal, of an older version, is
    returned as it is.

    Raises:
        OSError: it cannot be read.
        WorkspaceError: the content is not what was written.
    """
    content, seal, stated = path.read_bytes().rpartition(_SEAL)
    if not seal or len(stated) != hashlib.sha256().digest_size:
        return content + seal + stated
    if hashlib.sha256(content).digest() != stated:
        raise WorkspaceError(f"{path} is damaged: its content does not have the sha256 that it ends with")
    return content


def size_of(directory: Path) -> int:
    """Bytes of all files in a directory; 0 where there is none."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


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


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        DataError: missing, unreadable, not UTF-8, truncated or otherwise malformed (says where), not an
            object, or a key twice in one object (of which JSON readers keep the last in silence).
    """
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path} is missing; check the path, or fetch the data again") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; check the path and its rights") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text at byte {error.start}; fetch the file again, or convert it"
        ) from None
    try:
        value = json.loads(text, object_pairs_hook=_distinct)
    except json.JSONDecodeError as error:
        ended = not text[error.pos :].strip()
        what = "ends too early (truncated?)" if ended or "Unterminated" in error.msg else "is not valid JSON"
        byte = len(text[: error.pos].encode())
        raise DataError(
            f"{path} {what}: {error.msg} at line {error.lineno}, column {error.colno} (byte {byte} of "
            f"{len(content)}); fetch or write the file again"
        ) from None
    except RecursionError:
        raise DataError(f"{path} nests too deep to be the data expected; fetch the file again") from None
    except _Twice as error:
        raise DataError(
            f"{path} has the key {error.args[0]!r} twice in one object; keep one of them"
        ) from None
    if not isinstance(value, dict):
        raise DataError(
            f"{path} holds a JSON {type(value).__name__} where an object {{…}} belongs; "
            "check that it is the right file"
        )
    return value


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file that holds one JSON object a line.

    Raises:
        DataError: unreadable, not UTF-8, or a line that is not a JSON object (says which).
    """
    records: list[dict[str, Any]] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                records.append(dict(json.loads(line)))
        return records
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; check the path and its rights") from None
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{path}, line {len(records) + 1}: not a JSON object ({error}); restore it from a copy"
        ) from None


class _Twice(Exception):
    pass


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Twice(key)
            seen.add(key)
    return result
