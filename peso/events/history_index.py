"""The histories of a stream's users in an SQLite file, which is built from the Parquet files of its stages.

Memory does not grow with the number of users, neither when the file is built nor when it is read. The file
is rebuilt when the stream changes. It is never modified in place, so processes that have it open continue to
read the old version.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peso.errors import WorkspaceError
from peso.events.histories import Ragged, Stage
from peso.events.stream import MERGED, Stream, merged_file, rare_file
from peso.runtime.files import is_full, raise_if_full, write_aside

FORMAT = 1
APPLICATION = 0x70657368  # "pesh", in the header of the file

_SCHEMA = f"""
    PRAGMA application_id = {APPLICATION};
    PRAGMA user_version = {FORMAT};
    CREATE TABLE made_of (place INTEGER PRIMARY KEY, fingerprint TEXT NOT NULL);
    CREATE TABLE users (number INTEGER PRIMARY KEY, name TEXT NOT NULL, items BLOB NOT NULL);"""
# A user in several stages has the position of the first stage and the history of the last one. There is no
# row for a user that was merged into another one.
_BY_NAME = "CREATE UNIQUE INDEX IF NOT EXISTS users_by_name ON users (name)"
LAST = "\U0010ffff"  # the last character in SQLite's order
_PUT = """
    INSERT INTO users (name, items) VALUES (?, ?)
    ON CONFLICT (name) DO UPDATE SET items = excluded.items"""


@dataclass(frozen=True)
class IndexedUser:
    """A user with its history, ``items`` (int32, oldest first). Numbers are in the order in which users first
    occur."""

    number: int
    name: str
    items: np.ndarray


class HistoryIndex:
    """The users of the first stages of a stream. It can be used by several threads.

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
        """Open the index of a stream. It is built or extended if ``path`` is missing or out of date.

        Args:
            path: the file of the index. If its folder cannot be written, a temporary index is built for this
                call.
            through: the last stage to include; by default all stages. An index of only some stages is
                temporary.

        Raises:
            WorkspaceError: a file of the stream is damaged; :class:`FullDisk` if there is no space left.
        """
        wanted = rests_on(stream, through)
        kept = through is None or through >= stream.stages - 1
        if kept and _made_of(path) == wanted:
            return cls(_connect(path), path)
        if kept and os.access(path.parent, os.W_OK):
            with write_aside(path) as aside:
                _make(stream, wanted, aside, path)
            return cls(_connect(path), path)
        return cls(_temporary(stream, wanted, path), path)

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def of(self, user: str) -> IndexedUser | None:
        """One user; None if the stages do not have this user."""
        rows = self._rows("SELECT number, name, items FROM users WHERE name = ?", user)
        return _indexed(*rows[0]) if rows else None

    def named(self, prefix: str, after: str, limit: int) -> list[tuple[str, int]]:
        """One page of users in the order of their names, with the number of items of each.

        Args:
            prefix: the names begin with it; "" for all names.
            after: the last name of the page before; "" for the first page.
            limit: the largest number of users.
        """
        query = "SELECT name, length(items) / 4 FROM users WHERE name > ?"
        values: list[object] = [after]
        if prefix:
            query += " AND name >= ? AND name < ?"
            values += [prefix, prefix + LAST]
        return self._rows(f"{query} ORDER BY name LIMIT ?", *values, limit)

    def count(self) -> int:
        """The number of users."""
        return int(self._rows("SELECT count(*) FROM users")[0][0])

    def parts(self, size: int) -> Iterator[list[IndexedUser]]:
        """All users, ``size`` at a time, in the order in which they first occur."""
        number = 0
        while rows := self._rows(
            "SELECT number, name, items FROM users WHERE number > ? ORDER BY number LIMIT ?", number, size
        ):
            yield [_indexed(*row) for row in rows]
            number = rows[-1][0]

    def _rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        try:
            with self._lock:
                return self._connection.execute(query, values).fetchall()
        except sqlite3.DatabaseError as error:
            raise WorkspaceError(
                f"{self._path} is damaged ({error}); remove it, and it will be rebuilt from the stream"
            ) from error


def _indexed(number: int, name: str, items: bytes) -> IndexedUser:
    return IndexedUser(number, name, np.frombuffer(items, dtype="<i4"))


def rests_on(stream: Stream, through: int | None = None) -> list[str]:
    """Texts that identify the files from which an index is built: one for each stage, and one for the merged
    users stored with a stage. If these lists are equal, the histories are equal.

    Rare users are only in the index of all stages, because it is not known in which stages their events are.
    Merged users are also only there, because they were not merged at earlier stages.

    Args:
        stream: the stream of the index.
        through: the last stage of the index; by default the last stage of the stream.
    """
    if through is not None and through < stream.stages - 1:
        return [stream.fingerprint(number) for number in range(through + 1)]
    files, texts = stream.manifest["files"], list[str]()
    for number in range(stream.stages):
        texts.append(f"{stream.fingerprint(number)} {files.get(rare_file(number), '')}".rstrip())
        if (merged := files.get(merged_file(number))) is not None:
            texts.append(f"{MERGED} {number} {merged}")
    return texts


def _connect(path: Path) -> sqlite3.Connection:
    # the file never changes, so it can also be read in a read-only folder
    address = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
    connection = sqlite3.connect(address, uri=True, check_same_thread=False)
    connection.execute("SELECT count(*) FROM made_of").fetchone()
    return connection


def _made_of(path: Path) -> list[str]:
    """The fingerprints of the stages that a file was built from; [] if it is not a readable index."""
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
    """Build the index in an empty file. An earlier index that lacks only the last stages is extended."""
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
            raise WorkspaceError(f"{earlier} cannot be built: {error}; run the command again") from error
        new.write_bytes(b"")  # the earlier index is damaged, so build it from all stages
        _fill(stream, wanted, 0, new)


def _fill(stream: Stream, fingerprints: list[str], first: int, new: Path) -> None:
    with closing(sqlite3.connect(new, isolation_level=None)) as connection:
        # the caller makes the file durable, or discards it
        connection.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;")
        if not first:
            connection.executescript(_SCHEMA)
        connection.execute("BEGIN")
        merged = [text.startswith(f"{MERGED} ") for text in fingerprints]
        for place in range(first, len(fingerprints)):
            number = place - sum(merged[: place + 1])
            connection.execute("INSERT INTO made_of VALUES (?, ?)", (place, fingerprints[place]))
            if merged[place]:
                connection.execute(_BY_NAME)
                connection.executemany(_PUT, _users_of(stream.merged_pieces(number)))
                gone = ((name,) for users in stream.merged_pieces(number) for name in _without_items(users))
                connection.executemany("DELETE FROM users WHERE name = ?", gone)
                continue
            users = _users_of(stream.pieces(number))
            rare = _users_of(stream.rare_pieces(number)) if " " in fingerprints[place] else ()
            if number:
                connection.execute(_BY_NAME)
                connection.executemany(_PUT, users)
            else:  # no user occurs twice in a stage; the index of names is built once, afterwards
                connection.executemany("INSERT INTO users (name, items) VALUES (?, ?)", users)
                connection.execute(_BY_NAME)
            connection.executemany(_PUT, rare)
        connection.execute(_BY_NAME)
        connection.execute("COMMIT")


def _users_of(pieces: Iterable[Stage]) -> Iterator[tuple[str, memoryview]]:
    """The name and the items (as bytes) of each user of a stage."""
    for users in pieces:
        items, ends = _joined(users.previous, users.current)
        content, start = memoryview(items.tobytes()), 0
        for name, end in zip(users.users, (ends * 4).tolist(), strict=True):
            yield name, content[start:end]
            start = end


def _without_items(users: Stage) -> list[str]:
    return [name for name, items in zip(users.users, users.previous.lengths, strict=True) if not items]


def _joined(previous: Ragged, current: Ragged) -> tuple[np.ndarray, np.ndarray]:
    """The concatenated lists of each row, int32 (items,), and where each row ends, int64 (rows,)."""
    lengths = np.stack([previous.lengths, current.lengths], axis=1)  # (rows, 2)
    ends = lengths.ravel().cumsum().reshape(lengths.shape)
    items = np.empty(int(lengths.sum()), dtype="<i4")
    for side, lists in enumerate((previous, current)):
        own = lengths[:, side]
        within = np.arange(int(own.sum())) - np.repeat(own.cumsum() - own, own)
        items[np.repeat(ends[:, side] - own, own) + within] = lists.values
    return items, ends[:, 1]


def _temporary(stream: Stream, wanted: list[str], path: Path) -> sqlite3.Connection:
    """A temporary index that is deleted when its connection is closed."""
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
