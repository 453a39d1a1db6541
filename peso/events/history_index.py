"""What each user of a stream did, looked up on disk: an SQLite file made of the Parquet files of its stages.

Memory does not grow with the number of users, neither while the file is made nor while it is read. It can be
made again at any time, and is made again as soon as the stream has other files. It is never written in place:
whoever has it open goes on reading what it was.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peso.errors import WorkspaceError
from peso.events.histories import Ragged
from peso.events.stream import Stream
from peso.runtime.files import is_full, raise_if_full, write_aside

FORMAT = 1
APPLICATION = 0x70657368  # "pesh", in the header of the file

_SCHEMA = f"""
    PRAGMA application_id = {APPLICATION};
    PRAGMA user_version = {FORMAT};
    CREATE TABLE made_of (place INTEGER PRIMARY KEY, fingerprint TEXT NOT NULL);
    CREATE TABLE users (number INTEGER PRIMARY KEY, name TEXT NOT NULL, items BLOB NOT NULL);"""
# A user of several stages keeps the place of the first, and has the history that the last one tells.
_BY_NAME = "CREATE UNIQUE INDEX IF NOT EXISTS users_by_name ON users (name)"
_PUT = """
    INSERT INTO users (name, items) VALUES (?, ?)
    ON CONFLICT (name) DO UPDATE SET items = excluded.items"""


@dataclass(frozen=True)
class IndexedUser:
    """``number``: ascends in the order in which users first occur; ``items``: int32, oldest first."""

    number: int
    name: str
    items: np.ndarray


class HistoryIndex:
    """The users of the first stages of a stream. For several threads.

    ::

        index = HistoryIndex.open(stream, Path("runs/shop/histories.sqlite"))
        index.of("anna").items             # rows of the item table, oldest first
        for users in index.parts(512): ...  # everybody, 512 at a time
    """

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection, self._lock = connection, threading.Lock()
        self._path = path

    @classmethod
    def open(cls, stream: Stream, path: Path, through: int | None = None) -> HistoryIndex:
        """The index of a stream, made or continued where ``path`` does not hold it.

        Args:
            path: where it is kept. Where nothing can be written there, it is made in the folder for temporary
                files, for this call alone.
            through: of the stages up to this one; None: of all. Not kept unless it is of all.

        Raises:
            WorkspaceError: a damaged file of the stream; :class:`FullDisk` for want of space.
        """
        last = stream.stages - 1 if through is None else min(through, stream.stages - 1)
        wanted = [stream.fingerprint(number) for number in range(last + 1)]
        kept = last == stream.stages - 1
        if kept and _made_of(path) == wanted:
            return cls(_connect(path), path)
        if kept and os.access(path.parent, os.W_OK):
            with write_aside(path) as aside:
                _make(stream, wanted, aside, path)
            return cls(_connect(path), path)
        return cls(_passing(stream, wanted, path), path)

    def close(self) -> None:
        self._connection.close()

    def of(self, user: str) -> IndexedUser | None:
        """One user, None where the stages do not have that one."""
        rows = self._rows("SELECT number, name, items FROM users WHERE name = ?", user)
        return _indexed(*rows[0]) if rows else None

    def count(self) -> int:
        """How many users there are."""
        return int(self._rows("SELECT count(*) FROM users")[0][0])

    def parts(self, size: int) -> Iterator[list[IndexedUser]]:
        """Every user, ``size`` at a time, in the order in which they first occur."""
        number = 0
        while rows := self._rows(
            "SELECT number, name, items FROM users WHERE number > ? ORDER BY number LIMIT ?", number, size
        ):
            yield [_indexed(*row) for row in rows]
            number = rows[-1][0]

    def _rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        try:
            with self._lock:
                rows: list[tuple[Any, ...]] = self._connection.execute(query, values).fetchall()
                return rows
        except sqlite3.DatabaseError as error:
            raise WorkspaceError(
                f"{self._path} is damaged ({error}); remove it, and it is made again from the stream"
            ) from error


def _indexed(number: int, name: str, items: bytes) -> IndexedUser:
    return IndexedUser(number, name, np.frombuffer(items, dtype="<i4"))


def _connect(path: Path) -> sqlite3.Connection:
    # nobody writes to the file, so that it can be read from where nothing can be written
    address = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
    connection = sqlite3.connect(address, uri=True, check_same_thread=False)
    connection.execute("SELECT count(*) FROM made_of").fetchone()
    return connection


def _made_of(path: Path) -> list[str]:
    """Fingerprints of the stages that a file was made of; [] where it is not an index that can be read."""
    try:
        with closing(_connect(path)) as connection:
            application = connection.execute("PRAGMA application_id").fetchone()[0]
            number = connection.execute("PRAGMA user_version").fetchone()[0]
            if (application, number) != (APPLICATION, FORMAT):
                return []
            rows = connection.execute("SELECT fingerprint FROM made_of ORDER BY place").fetchall()
    except sqlite3.Error:
        return []
    return [fingerprint for (fingerprint,) in rows]


def _make(stream: Stream, wanted: list[str], new: Path, earlier: Path) -> None:
    """Fill an empty file with the index; an earlier one that only lacks the last stages is continued."""
    known = _made_of(earlier)
    known = known if known == wanted[: len(known)] else []
    if known:
        shutil.copyfile(earlier, new)
    try:
        _fill(stream, wanted, len(known), new)
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", 0) in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE):
            raise_if_full(OSError(28, "No space left on device"), earlier)
        if not known:
            raise WorkspaceError(f"{earlier} cannot be made: {error}; repeat this") from error
        new.write_bytes(b"")  # what was there is damaged: it is made of everything again
        _fill(stream, wanted, 0, new)


def _fill(stream: Stream, fingerprints: list[str], first: int, new: Path) -> None:
    with closing(sqlite3.connect(new, isolation_level=None)) as connection:
        # whoever asked for the file makes it durable, or throws it away
        connection.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;")
        if not first:
            connection.executescript(_SCHEMA)
        connection.execute("BEGIN")
        for number in range(first, len(fingerprints)):
            users = _users_of(stream, number)
            if number:
                connection.execute(_BY_NAME)
                connection.executemany(_PUT, users)
            else:  # in one stage nobody occurs twice; the names are sorted once, afterwards
                connection.executemany("INSERT INTO users (name, items) VALUES (?, ?)", users)
            connection.execute("INSERT INTO made_of VALUES (?, ?)", (number, fingerprints[number]))
        connection.execute(_BY_NAME)
        connection.execute("COMMIT")


def _users_of(stream: Stream, number: int) -> Iterator[tuple[str, memoryview]]:
    """Name and items, as bytes, of each user of a stage."""
    for users in stream.pieces(number):
        items, ends = _joined(users.previous, users.current)
        content, start = memoryview(items.tobytes()), 0
        for name, end in zip(users.users, (ends * 4).tolist(), strict=True):
            yield name, content[start:end]
            start = end


def _joined(previous: Ragged, current: Ragged) -> tuple[np.ndarray, np.ndarray]:
    """Both lists of each row end to end: int32 (items,), and where each row ends, int64 (rows,)."""
    lengths = np.stack([previous.lengths, current.lengths], axis=1)  # (rows, 2)
    ends = lengths.ravel().cumsum().reshape(lengths.shape)
    items = np.empty(int(lengths.sum()), dtype="<i4")
    for side, lists in enumerate((previous, current)):
        own = lengths[:, side]
        within = np.arange(int(own.sum())) - np.repeat(own.cumsum() - own, own)
        items[np.repeat(ends[:, side] - own, own) + within] = lists.values
    return items, ends[:, 1]


def _passing(stream: Stream, wanted: list[str], path: Path) -> sqlite3.Connection:
    """An index that is gone with its connection."""
    beside = path.parent if os.access(path.parent, os.W_OK) else None
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".writing", dir=beside)
    os.close(descriptor)
    new = Path(name)
    try:
        _make(stream, wanted, new, new)
        return _connect(new)
    except OSError as error:
        if is_full(error):
            raise_if_full(error, new)
        raise
    finally:
        with suppress(FileNotFoundError):
            new.unlink()
