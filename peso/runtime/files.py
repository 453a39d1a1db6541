"""Write files and directories atomically, read JSON, compute checksums, and lock directories."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import platform
import re
import shutil
import stat
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from peso.errors import DataError, ExportError, FullDisk, UsageError, WorkspaceError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SEAL = b"sha256:"  # separates the content of a sealed file from its digest
LOCK = ".lock"

_count = count()  # numbers the temporary files of this process


@contextmanager
def commit_directory(target: Path) -> Iterator[Path]:
    """Write a directory atomically: yield a temporary directory that replaces ``target`` on success.

    On failure ``target`` does not change. If several processes write the same directory, the last one to
    finish wins.

    Raises:
        WorkspaceError: the disk is full, or the location cannot be written. No partial output is left.
    """
    target = Path(os.path.realpath(target))
    with _explained(target):
        if _kind(target) not in (None, stat.S_IFDIR):
            raise NotADirectoryError(errno.ENOTDIR, "a file with this name exists")
        aside = _aside(target)
        aside.mkdir()
    try:
        yield aside
        with _explained(target):
            for path in [*aside.rglob("*"), aside]:
                fsync(path)
            _put_in_place(aside, target)
            fsync(target.parent)
    except BaseException as error:
        restore(target)
        shutil.rmtree(aside, ignore_errors=True)
        raise_if_full(error, target)
        raise


def remove_directory(target: Path) -> None:
    """Remove a directory atomically, if it exists: after a crash it is either complete or gone."""
    gone = target.with_name(f".{target.name}.removed")
    shutil.rmtree(gone, ignore_errors=True)
    if target.is_dir():
        target.rename(gone)
        fsync(target.parent)
        shutil.rmtree(gone, ignore_errors=True)


def link(source: str | Path, target: str | Path) -> None:
    """Make a hard link to a file that no longer changes, or a copy if links are not supported."""
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _put_in_place(aside: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old")
    while True:
        try:
            aside.rename(target)  # succeeds if the target does not exist or is an empty directory
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        shutil.rmtree(old, ignore_errors=True)
        with suppress(FileNotFoundError):  # another process took it away first
            target.rename(old)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def only_writer(directory: Path, patience: float = 0.0) -> Iterator[None]:
    """Lock a directory against all other processes and threads. The directory is created if it is missing.

    Afterwards the lock file is as it was before, so that a refused command leaves no trace.

    Args:
        patience: seconds to wait for another process that holds the lock.

    Raises:
        WorkspaceError: another process holds the lock, or the directory cannot be written.
    """
    with _explained(directory):
        directory.mkdir(parents=True, exist_ok=True)
    path = directory.resolve() / LOCK
    with _explained(path):
        before = path.read_bytes() if path.is_file() else None
        lock = FileLock(path)
        try:
            lock.acquire(timeout=patience)
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
                path.unlink(missing_ok=True)  # filelock notices this in processes that have opened the file
            elif path.is_file():
                path.write_bytes(before)
        lock.release()


@contextmanager
def in_turn(path: Path, seconds: float = 10.0) -> Iterator[None]:
    """Hold a lock file for a short change, after waiting until it is free. The file is removed afterwards.

    Args:
        path: the lock file.
        seconds: the longest time to wait.

    Raises:
        WorkspaceError: if another process holds the file for longer, or it cannot be written.
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
            path.unlink(missing_ok=True)  # filelock notices this in processes that have opened the file
        lock.release()


def restore(target: Path) -> None:
    """Restore a directory after a crash between the two renames of :func:`commit_directory`."""
    old = target.with_name(f".{target.name}.old")
    if old.is_dir() and not target.exists():
        old.rename(target)


@contextmanager
def write_aside(target: Path) -> Iterator[Path]:
    """Write a file atomically: yield a temporary path that replaces ``target`` on success.

    On failure ``target`` does not change.

    Raises:
        WorkspaceError: the disk is full, or the location cannot be written. No partial output is left.
    """
    target = Path(os.path.realpath(target))
    with _explained(target):
        if _kind(target) not in (None, stat.S_IFREG):
            raise IsADirectoryError(errno.EISDIR, "the path is a directory or a device")
        aside = _aside(target)
        aside.touch()
    try:
        yield aside
        with _explained(target):
            fsync(aside)
            aside.replace(target)
            fsync(target.parent)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        raise_if_full(error, target)
        raise


def write_atomically(target: Path, content: bytes) -> None:
    """Replace the content of one file atomically."""
    with write_aside(target) as aside:
        aside.write_bytes(content)


def require_writable(target: Path) -> None:
    """Check that a file or directory can be written, without leaving anything behind.

    Raises:
        WorkspaceError: it cannot be written.
    """
    with _explained(target):
        _kind(target)  # raises if the name is not possible
        place = Path(os.path.realpath(target)).parent
        while _kind(place) is None:
            place = place.parent
        tempfile.TemporaryFile(dir=place).close()


def require_free(directory: str | Path) -> Path:
    """The absolute path of a directory to write to, which must be missing or empty.

    Raises:
        ExportError: the path is a file or a directory that is not empty.
    """
    target = Path(directory).expanduser().absolute()
    with _explained(target):
        kind = _kind(target)
        if kind is not None and (kind != stat.S_IFDIR or any(target.iterdir())):
            what = "not empty" if kind == stat.S_IFDIR else "a file"
            raise ExportError(f"{target} is {what}; name a directory that does not exist yet")
    return target


def require_new(file: Path, force: bool = False) -> None:
    """Check that a file does not exist yet, unless ``force`` allows overwriting it.

    Raises:
        ExportError: the file exists.
    """
    with _explained(file):
        if _kind(file) is not None and not force:
            raise ExportError(f"{file} already exists; name another file, or overwrite it with --force")


def _kind(path: Path) -> int | None:
    """The type of file at a path, or None if there is none. Raises OSError if the name is not possible."""
    try:
        return stat.S_IFMT(path.stat().st_mode)
    except FileNotFoundError:
        return None


def _aside(target: Path) -> Path:
    """The temporary path under which ``target`` is written: in the same directory, with a name that no other
    process uses. Temporary files of killed processes of this machine are removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    whose = f".{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:8]}.{platform.node()}."
    remove_left(target.parent, whose)
    return target.with_name(f"{whose}{os.getpid()}.{next(_count)}.writing")


def remove_left(directory: Path, whose: str | None = None) -> None:
    """Remove the temporary files that killed processes of this machine left in a directory.

    Args:
        whose: the prefix of the names of the files to remove; None for all temporary files.
    """
    for left in directory.iterdir():
        found = re.fullmatch(r"(\.[0-9a-f]{8}\.(.+)\.)(\d+)\.\d+\.writing", left.name)
        if found is None or found[2] != platform.node() or whose not in (None, found[1]):
            continue
        if not _runs(int(found[3])):
            # another process may remove it at the same time
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's process
    return True


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Turn an OSError into a WorkspaceError that names the location and the reason."""
    try:
        yield
    except OSError as error:
        raise_if_full(error, target)
        raise WorkspaceError(
            f"{target} cannot be written: {error.strerror or error}; check that location, or choose another "
            "one"
        ) from error


def is_full(error: BaseException) -> bool:
    """Whether a write failed because the disk or the quota is full."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    return isinstance(error, SafetensorError) and any(f"os error {number}" in str(error) for number in _FULL)


def raise_if_full(error: BaseException, target: Path) -> None:
    """Raise a FullDisk error if a write to ``target`` failed because the disk or the quota is full."""
    if is_full(error):
        raise FullDisk(
            f"no space left while writing {target}; no partial output is left. Free some space and run the "
            "command again; it continues where it stopped."
        ) from error


def json_text(value: Any) -> str:
    """The text of a JSON file; see :func:`finite`."""
    return json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """Nested JSON values with None in place of nan and infinities, which JSON does not have.

    >>> finite({"low": float("nan"), "values": [1.5, float("inf")]})
    {'low': None, 'values': [1.5, None]}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, list | tuple) else value


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, see :func:`json_text`. This is not atomic."""
    path.write_text(json_text(value), encoding="utf-8")


def write_sealed(path: Path, content: bytes) -> None:
    """Replace one file with ``content`` followed by its sha256."""
    write_atomically(path, content + _SEAL + hashlib.sha256(content).digest())


def read_sealed(path: Path) -> bytes:
    """The content of a file that :func:`write_sealed` wrote. Files of older versions have no sha256 and are
    returned unchecked.

    Raises:
        OSError: the file cannot be read.
        WorkspaceError: the content does not match its sha256.
    """
    content, seal, stated = path.read_bytes().rpartition(_SEAL)
    if not seal or len(stated) != hashlib.sha256().digest_size:
        return content + seal + stated
    if hashlib.sha256(content).digest() != stated:
        raise WorkspaceError(f"{path} is damaged: its content does not match the sha256 at its end")
    return content


def file_state(path: Path) -> tuple[int, int, int] | None:
    """Inode, modification time and size of a file, which show that it has changed; None if it does not
    exist."""
    try:
        state = os.stat(path)
    except OSError:
        return None
    return state.st_ino, state.st_mtime_ns, state.st_size


def size_of(directory: Path) -> int:
    """The total size in bytes of all files in a directory; 0 if the directory does not exist."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def checksum(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def digest(*values: Any) -> str:
    """The sha256 of JSON values, which does not depend on the order of keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def fsync(path: Path) -> None:
    """Flush a file or a directory to the disk, so that it survives a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_given(path: Path, option: str) -> str:
    """The text of a file that an option of a command names.

    Raises:
        UsageError: the file cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(
            f"{option} {path} cannot be read: {error.strerror}; check the file and its path"
        ) from None
    except UnicodeDecodeError:
        raise UsageError(f"{option} {path} is not UTF-8 text; convert it to UTF-8") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a file that contains one JSON object. Raises DataError as :func:`read_json_and_text`."""
    return read_json_and_text(path)[0]


def read_json_and_text(path: Path) -> tuple[dict[str, Any], str]:
    """Read a file that contains one JSON object: the object, and the text of the file.

    Raises:
        DataError: the file is missing, unreadable, not UTF-8, truncated or malformed (the message gives the
            position), not an object, or it has a key twice in one object (JSON readers would silently keep
            the last one).
    """
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path} is missing; check the path, or download the data again") from None
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}; check the path and its permissions"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text at byte {error.start}; download the file again, or convert it to UTF-8"
        ) from None
    try:
        value = json.loads(text, object_pairs_hook=_distinct)
    except json.JSONDecodeError as error:
        ended = not text[error.pos :].strip()
        what = "ends too early (truncated?)" if ended or "Unterminated" in error.msg else "is not valid JSON"
        byte = len(text[: error.pos].encode())
        raise DataError(
            f"{path} {what}: {error.msg} at line {error.lineno}, column {error.colno} (byte {byte} of "
            f"{len(content)}); download or create the file again"
        ) from None
    except RecursionError:
        raise DataError(
            f"{path} is nested more deeply than the expected data; check that it is the right file"
        ) from None
    except _Twice as error:
        raise DataError(
            f"{path} has the key {error.args[0]!r} twice in one object; keep only one of them"
        ) from None
    if not isinstance(value, dict):
        raise DataError(
            f"{path} contains a JSON {type(value).__name__} instead of an object {{…}}; "
            "check that it is the right file"
        )
    return value, text


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file that contains one JSON object per line.

    Raises:
        DataError: the file is unreadable or not UTF-8, or a line is not a JSON object (the message gives its
            number).
    """
    records: list[dict[str, Any]] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                records.append(dict(json.loads(line)))
        return records
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}; check the path and its permissions"
        ) from None
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{path}, line {len(records) + 1}: not a JSON object ({error}); restore the file from a copy"
        ) from None


class _Twice(Exception):
    pass


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise _Twice(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return result
