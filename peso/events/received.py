"""Events that were received one by one since the stream was made, stored safely in an SQLite file.

SQLite uses a write-ahead log (WAL) and flushes it at every commit (``synchronous=FULL``). So events survive a
kill or a power failure after :meth:`ReceivedEvents.add` has returned, and others can read at the same time.

An event has the name of the cut that moved it into a stage. The name is written before the stream is, so it
counts only if the manifest of the stream lists the cut.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import tempfile
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from peso.errors import DataError, FullDisk, WorkspaceError
from peso.events.history_index import LAST
from peso.events.times import END, iso
from peso.runtime.files import fsync
from peso.runtime.records import require_known_format

FORMAT = 1  # the version of the file format
APPLICATION = 0x7065736F  # "peso", in the header of the file
WAIT = 30.0  # how many seconds to wait for another writer
AHEAD = 86_400_000_000  # microseconds that a clock may be ahead; later events would block all others
CHUNK = 10_000  # the number of events in memory at the same time

_SCHEMA = f"""
    PRAGMA application_id = {APPLICATION};
    PRAGMA user_version = {FORMAT};
    CREATE TABLE log (id TEXT NOT NULL);
    CREATE TABLE events (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        key TEXT NOT NULL UNIQUE,
        user TEXT NOT NULL,
        item TEXT NOT NULL,
        time INTEGER NOT NULL,
        cut TEXT);
    CREATE INDEX events_of_user ON events (user, time, number);"""
_FIELDS = "user, item, time, key, number, cut"
_FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE)
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


@dataclass(frozen=True)
class ReceivedEvent:
    """An event of one user with one item.

    Attributes:
        user: the user id.
        item: the item id.
        time: microseconds since 1970 (UTC).
        key: a key that identifies an event that is sent again. If it is empty, an event is identified by
            user, item and time.
        number: the number of a stored event, in the order of receipt, from 1 on.
        cut: the name of the cut that moves a stored event into a stage; None if there is none.
    """

    user: str
    item: str
    time: int
    key: str = ""
    number: int = 0
    cut: str | None = None

    @property
    def stored_key(self) -> str:
        """The key in the file. Keys of senders and keys made here have different prefixes."""
        if self.key:
            return f"sent:{self.key}"
        content = json.dumps([self.user, self.item, self.time]).encode()
        return f"made:{hashlib.sha256(content).hexdigest()}"


class ReceivedEvents:
    """The events in a file, which is created if it does not exist. It can be used by several threads and
    processes.

    Args:
        path: a file whose name ends in ``.sqlite``. SQLite creates two more files next to it.

    Raises:
        WorkspaceError: the file is damaged, of a newer version or of another kind, or cannot be written;
            :class:`FullDisk` if there is no space left.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._writing, self._reading = threading.Lock(), threading.Lock()
        with _explained(self.path):
            if not self.path.exists():
                _create(self.path)
            self._writer = _connect(self.path)
            self._reader = _connect(self.path)
            self.id = self._require_ours()

    def __enter__(self) -> ReceivedEvents:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. The last process that closes it merges the write-ahead log into it."""
        self._reader.close()
        self._writer.close()

    # -- writing -----------------------------------------------------------------------------------

    def add(self, events: Iterable[ReceivedEvent]) -> list[bool]:
        """Store events. When this returns, all of them are on the disk; if it fails, none is.

        Returns:
            For each event, whether it is new. If there is already an event with its key, that event is kept.

        Raises:
            DataError: an id is empty or not text, or a time is negative or more than a day ahead.
            FullDisk: there is no space left.
            WorkspaceError: another process has been writing for more than half a minute, or the file is
                damaged.
        """
        given = list(events)
        latest = min(int(time.time() * 1e6) + AHEAD, END)
        for event in given:
            _require_sound(event, latest)
        rows = [(event.stored_key, event.user, event.item, event.time) for event in given]
        insert = "INSERT INTO events (key, user, item, time) VALUES (?, ?, ?, ?) ON CONFLICT (key) DO NOTHING"
        with self._transaction() as connection:
            return [connection.execute(insert, row).rowcount == 1 for row in rows]

    def mark(self, numbers: Sequence[int], cut: str) -> None:
        """Record the cut that moves stored events into a stage."""
        with self._transaction() as connection:
            connection.executemany(
                "UPDATE events SET cut = ? WHERE number = ?", ((cut, int(number)) for number in numbers)
            )

    def forget(self, user: str) -> int:
        """Erase all data of a user's events from the file. Returns the number of events."""
        with self._transaction() as connection:
            gone = connection.execute("DELETE FROM events WHERE user = ?", [user]).rowcount
        with self._writing, _explained(self.path):
            # rewrite the file without them, and empty the write-ahead log, which still contains them
            self._writer.execute("VACUUM")
            busy = self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        if busy:
            raise WorkspaceError(
                f"{self.path} is in use by another process, so erased events may still be in its log; run "
                "the command again"
            )
        return gone

    # -- reading -----------------------------------------------------------------------------------

    def of_user(self, user: str) -> list[ReceivedEvent]:
        """A user's events, oldest first. Events with the same time are in the order of receipt."""
        return [
            ReceivedEvent(*row)
            for row in self._rows(
                f"SELECT {_FIELDS} FROM events WHERE user = ? ORDER BY time, number", [user]
            )
        ]

    def count(self) -> int:
        """The number of stored events, including those in stages."""
        return int(self._rows("SELECT count(*) FROM events")[0][0])

    @property
    def newest(self) -> int:
        """The number of the event that was stored last; 0 if there are none."""
        return int(self._rows("SELECT coalesce(max(number), 0) FROM events")[0][0])

    def waiting(self, cuts: Sequence[str]) -> Iterator[list[ReceivedEvent]]:
        """The events that are not in any of these cuts, in the order of receipt, several thousand at a time.
        Events that arrive during the iteration are left out."""
        last, number = self.newest, 0
        while number < last:
            rows = self._rows(
                f"SELECT {_FIELDS} FROM events WHERE number > ? AND number <= ? ORDER BY number "
                f"LIMIT {CHUNK}",
                [number, last],
            )
            if not rows:
                return
            number = int(rows[-1][4])
            if found := [event for event in (ReceivedEvent(*row) for row in rows) if event.cut not in cuts]:
                yield found

    def users_after(self, user: str, limit: int = CHUNK, prefix: str = "") -> list[str]:
        """The names of the next users with events, in order.

        Args:
            user: the last name of the page before; "" for the first page.
            limit: the largest number of users.
            prefix: the names begin with it.
        """
        query, values = "SELECT DISTINCT user FROM events WHERE user > ?", [user]
        if prefix:
            query, values = f"{query} AND user >= ? AND user < ?", [user, prefix, prefix + LAST]
        rows = self._rows(f"{query} ORDER BY user LIMIT ?", [*values, limit])
        return [name for (name,) in rows]

    def check(self) -> None:
        """Check the whole file. Raises WorkspaceError if it is damaged."""
        problems = [text for (text,) in self._rows("PRAGMA integrity_check(1)")]
        if problems != ["ok"]:
            raise _damaged(self.path, problems[0])

    # -- inside ------------------------------------------------------------------------------------

    def _rows(self, query: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        with self._reading, _explained(self.path):
            return self._reader.execute(query, values).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._writing, _explained(self.path):
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:  # SQLite ends it automatically if the disk is full
                    self._writer.execute("ROLLBACK")
                raise

    def _require_ours(self) -> str:
        application = self._reader.execute("PRAGMA application_id").fetchone()[0]
        number = self._reader.execute("PRAGMA user_version").fetchone()[0]
        if application != APPLICATION:
            raise _damaged(self.path, "it is not a file of received events")
        require_known_format(self.path, number, FORMAT)
        return str(self._reader.execute("SELECT id FROM log").fetchone()[0])


def _require_sound(event: ReceivedEvent, latest: int) -> None:
    for name, value in (("user", event.user), ("item", event.item), ("key", event.key)):
        if not isinstance(value, str) or (not value and name != "key"):
            empty = "" if name == "key" else " that is not empty"
            raise DataError(f"an event's {name} must be text{empty}, not {value!r}")
        if "\0" in value or value.encode("utf-8", "ignore").decode() != value:
            raise DataError(f"an event's {name} is not text that can be stored: {value!r}; send valid UTF-8")
    if type(event.time) is not int or event.time < 0:
        raise DataError(f"an event's time must be microseconds since 1970, not {event.time!r}")
    if event.time > latest:
        when = iso(min(event.time, END))
        raise DataError(
            f"the event of user {event.user!r} with item {event.item!r} has the time {when}, more than a day "
            "ahead; check the sender's clock and the unit of its times"
        )


def _create(path: Path) -> None:
    """Create an empty file atomically. If several processes do this, only one file is created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=".writing") as aside:
        new = Path(aside) / path.name
        with closing(_connect(new)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")  # a permanent property of the file
            connection.executescript(_SCHEMA)
            connection.execute("INSERT INTO log VALUES (?)", [uuid.uuid4().hex])
        try:
            os.link(new, path)
        except FileExistsError:
            return
    fsync(path.parent)


def _connect(path: Path) -> sqlite3.Connection:
    # transactions are started and ended explicitly, and locks synchronize threads
    connection = sqlite3.connect(path, timeout=WAIT, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA fullfsync = ON")  # on macOS, also flush the cache of the drive
    connection.execute("PRAGMA secure_delete = ON")
    return connection


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into errors that say what to do."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
        if code in _FULL:
            raise FullDisk(
                f"no space left while writing {path}; the events of this call were not stored. Free some "
                "space and send them again"
            ) from error
        if code & 0xFF in _DAMAGED or (isinstance(error, sqlite3.DatabaseError) and "no such" in str(error)):
            raise _damaged(path, str(error)) from error
        if code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise WorkspaceError(
                f"{path} has been locked by another process for more than {WAIT:.0f} s; wait for it or stop "
                "it"
            ) from error
        raise WorkspaceError(
            f"{path} cannot be used: {error}; check the location and its permissions"
        ) from error
    except OSError as error:
        raise WorkspaceError(
            f"{path} cannot be written: {error.strerror or error}; check that location, or choose another one"
        ) from error


def _damaged(path: Path, why: str) -> WorkspaceError:
    return WorkspaceError(
        f"{path} is damaged ({why}); restore it from a copy, or move it away (events that were received "
        "since the last stage are then lost)"
    )
