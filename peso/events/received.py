"""Events that were received one by one since the stream was made: an SQLite file that loses none of them.

SQLite writes its log ahead (WAL) and flushes it at every commit (``synchronous=FULL``), so that what
:meth:`ReceivedEvents.add` has returned for survives a kill and a power cut, and others read meanwhile.

An event carries the name of the cut that took it into a stage. Whether that cut took place says the manifest
of the stream alone: the name is written before the stream is, and means nothing until the stream lists it.
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
from peso.events.times import END, iso

FORMAT = 1  # of the file; a higher number was written by a newer version
APPLICATION = 0x7065736F  # "peso", in the header of the file
WAIT = 30.0  # seconds for another writer to finish
AHEAD = 86_400_000_000  # microseconds by which a clock may be fast; a later event would end the stream there
CHUNK = 10_000  # events that are held in memory together

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
    """One user did something with one item.

    Attributes:
        time: microseconds since 1970 (UTC).
        key: by which an event that is sent again is recognised; "": by user, item and time.
        number: as stored, in order of receipt, from 1 on.
        cut: as stored, the name of the cut that took it into a stage, if that took place.
    """

    user: str
    item: str
    time: int
    key: str = ""
    number: int = 0
    cut: str | None = None

    @property
    def stored_key(self) -> str:
        """Keys that a sender chose and those made here cannot meet."""
        if self.key:
            return f"sent:{self.key}"
        content = json.dumps([self.user, self.item, self.time]).encode()
        return f"made:{hashlib.sha256(content).hexdigest()}"


class ReceivedEvents:
    """The events in a file, which is made if it is not there. For several threads, and several processes.

    Args:
        path: its name ends in ``.sqlite``; SQLite keeps two files of its own beside it.

    Raises:
        WorkspaceError: it is damaged, of a newer version, something else, or cannot be written;
            :class:`FullDisk` for want of space.
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
        self._reader.close()
        self._writer.close()

    # -- writing -----------------------------------------------------------------------------------

    def add(self, events: Iterable[ReceivedEvent]) -> list[bool]:
        """Store events; all of them are on the disk when this returns, or none is.

        Returns:
            For each event whether it is new; False: one of its key is there already, which stays as it is.

        Raises:
            DataError: an id that is empty or not text, a time that is negative or more than a day ahead.
            FullDisk: no space left.
            WorkspaceError: another process writes for longer than half a minute, or the file is damaged.
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
        """Write on stored events which cut takes them."""
        with self._transaction() as connection:
            connection.executemany(
                "UPDATE events SET cut = ? WHERE number = ?", ((cut, int(number)) for number in numbers)
            )

    def forget(self, user: str) -> int:
        """Erase a user's events from the file, their bytes included; returns how many there were."""
        with self._transaction() as connection:
            gone = connection.execute("DELETE FROM events WHERE user = ?", [user]).rowcount
        with self._writing, _explained(self.path):
            # the file is written again without them, and the log that still holds them is emptied
            self._writer.execute("VACUUM")
            busy = self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        if busy:
            raise WorkspaceError(
                f"{self.path} is in use by another process, so that erased events may still be in its log; "
                "repeat this"
            )
        return gone

    # -- reading -----------------------------------------------------------------------------------

    def of_user(self, user: str) -> list[ReceivedEvent]:
        """A user's events, oldest first; those of one moment in the order in which they were received."""
        return [
            ReceivedEvent(*row)
            for row in self._rows(
                f"SELECT {_FIELDS} FROM events WHERE user = ? ORDER BY time, number", [user]
            )
        ]

    def count(self) -> int:
        """How many events are stored, whether cut or not."""
        return int(self._rows("SELECT count(*) FROM events")[0][0])

    @property
    def newest(self) -> int:
        """Number of the event that was stored last, 0 before the first."""
        return int(self._rows("SELECT coalesce(max(number), 0) FROM events")[0][0])

    def waiting(self, cuts: Sequence[str]) -> Iterator[list[ReceivedEvent]]:
        """The events that none of these cuts took, in order of receipt, some thousands at a time. Those that
        arrive meanwhile are left out."""
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

    def users_after(self, user: str, limit: int = CHUNK) -> list[str]:
        """The next users who have events, in the order of their names; "": from the first on."""
        rows = self._rows(
            "SELECT DISTINCT user FROM events WHERE user > ? ORDER BY user LIMIT ?", [user, limit]
        )
        return [name for (name,) in rows]

    def check(self) -> None:
        """Read the whole file. Raises WorkspaceError if it is damaged."""
        problems = [text for (text,) in self._rows("PRAGMA integrity_check(1)")]
        if problems != ["ok"]:
            raise _damaged(self.path, problems[0])

    # -- inside ------------------------------------------------------------------------------------

    def _rows(self, query: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        with self._reading, _explained(self.path):
            rows: list[tuple[Any, ...]] = self._reader.execute(query, values).fetchall()
            return rows

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._writing, _explained(self.path):
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:  # SQLite has ended it itself where the disk is full
                    self._writer.execute("ROLLBACK")
                raise

    def _require_ours(self) -> str:
        application = self._reader.execute("PRAGMA application_id").fetchone()[0]
        number = self._reader.execute("PRAGMA user_version").fetchone()[0]
        if application != APPLICATION:
            raise _damaged(self.path, "it is not a file of received events")
        if number > FORMAT:
            raise WorkspaceError(
                f"{self.path} was written by a newer version of peso (format {number}; this one reads up to "
                f"{FORMAT}); update peso"
            )
        return str(self._reader.execute("SELECT id FROM log").fetchone()[0])


def _require_sound(event: ReceivedEvent, latest: int) -> None:
    for name, value in (("user", event.user), ("item", event.item), ("key", event.key)):
        if not isinstance(value, str) or (not value and name != "key"):
            raise DataError(f"an event's {name} is a text that is not empty, not {value!r}")
        if "\0" in value or value.encode("utf-8", "ignore").decode() != value:
            raise DataError(f"an event's {name} is not text that can be stored: {value!r}; send valid UTF-8")
    if type(event.time) is not int or event.time < 0:
        raise DataError(f"an event's time is microseconds since 1970, not {event.time!r}")
    if event.time > latest:
        when = iso(min(event.time, END))
        raise DataError(
            f"the event of user {event.user!r} with item {event.item!r} is of {when}, more than a day ahead; "
            "set the sender's clock, and check the unit of its times"
        )


def _create(path: Path) -> None:
    """Make an empty file, whole or not at all; of several processes one makes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=".writing") as aside:
        new = Path(aside) / path.name
        with closing(_connect(new)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")  # stays with the file
            connection.executescript(_SCHEMA)
            connection.execute("INSERT INTO log VALUES (?)", [uuid.uuid4().hex])
        try:
            os.link(new, path)
        except FileExistsError:
            return
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _connect(path: Path) -> sqlite3.Connection:
    # transactions are begun and ended here alone, and locks keep threads apart
    connection = sqlite3.connect(path, timeout=WAIT, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA fullfsync = ON")  # macOS: through the drive's own cache
    connection.execute("PRAGMA secure_delete = ON")
    return connection


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """What SQLite complains about as an error that says what to do."""
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
                f"{path} is being written by another process for more than {WAIT:.0f} s; wait for it "
                "or stop it"
            ) from error
        raise WorkspaceError(f"{path} cannot be used: {error}; check the place and its rights") from error
    except OSError as error:
        raise WorkspaceError(
            f"{path} cannot be written: {error.strerror or error}; change what is there, or choose another "
            "place"
        ) from error


def _damaged(path: Path, why: str) -> WorkspaceError:
    return WorkspaceError(
        f"{path} is damaged ({why}); restore it from a copy, or move it away: events that were received "
        "since the last stage are lost then"
    )
