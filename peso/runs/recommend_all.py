"""Recommendations for all users in one file. Users are read from disk in batches; finished batches are stored
until the file is complete, so that an interrupted call can be continued, and several processes can share the
batches."""

from __future__ import annotations

import csv
import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from peso.errors import DataError, ExportError, WorkspaceError
from peso.runs.place import require_place
from peso.runs.user_histories import UserHistories
from peso.runtime import remote
from peso.runtime.files import digest, only_writer, read_sealed, require_new, write_aside, write_sealed
from peso.runtime.progress import Observer

if TYPE_CHECKING:
    from peso.runs.recommender import Recommender

ENDINGS = (".parquet", ".csv", ".jsonl")
SCHEMA = pa.schema(
    [("user", pa.string()), ("items", pa.list_(pa.string())), ("scores", pa.list_(pa.float32()))]
)
AT_ONCE = 512  # users per batch
NOTE = "call"  # file in the folder of batches that identifies the call
CALL = b"peso.call"  # key in the metadata of a batch

Rows = list[dict[str, Any]]


def require_output(path: str | Path, force: bool = False) -> None:
    """Raise ExportError if recommendations for all users cannot be written to a file or an address."""
    file = Path(path)
    if file.suffix.lower() not in ENDINGS:
        raise ExportError(f"{file}: the file name must end in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}")
    if remote.is_remote(str(path)):
        remote.require_output(str(path), force=force)
        return
    require_place(file)
    require_new(file, force)


@dataclass(frozen=True)
class DataState:
    """The state of the data that a call uses, also if it is continued later.

    Attributes:
        determined_by: digest of everything that determines the recommendations, except received events.
        until: number of the last received event to use.
    """

    determined_by: str
    until: int


Elsewhere = Callable[[Path, DataState, int, Observer], None]


@dataclass(frozen=True)
class AllUsers:
    """A call of :meth:`Recommender.recommend_all`.

    Attributes:
        recommender: answers.
        k: the number of items for each user.
        exclude_seen: whether items of the history are left out.
        part: i and n: the i-th of n parts of the users; (1, 1): all users.
        at_once: users per batch.
    """

    recommender: Recommender
    k: int
    exclude_seen: bool
    part: tuple[int, int]
    at_once: int = field(default_factory=lambda: AT_ONCE)

    def write(self, file: Path, observer: Observer, elsewhere: Elsewhere | None = None) -> int:
        """Compute the batches that an interrupted call has not finished, and write the file. Returns the
        number of users in it.

        Args:
            elsewhere: computes batches in other processes. It is called with the folder of batches, the state
                of the data, the approximate number of users and the observer; batches that are missing
                afterwards are computed in this process.
        """
        number, parts = self.part
        if not 1 <= number <= parts:
            raise DataError(f"part {number}/{parts} does not exist; parts are 1/{parts} to {parts}/{parts}")
        self.recommender.require_length(self.k)
        folder = file.with_name(f".{file.name}.parts")
        with only_writer(folder):
            finished = False
            try:
                state = self._data_state(folder, observer)
                if elsewhere is not None:
                    elsewhere(folder, state, self.recommender.histories.count() // parts, observer)
                self.compute(folder, state, observer)
                users = self._collect(folder, file, state, observer)
                finished = True
            finally:
                if finished or not (any(folder.glob("*.parquet")) or any(folder.glob("*.log"))):
                    shutil.rmtree(folder, ignore_errors=True)
        return users

    def compute(
        self, folder: Path, state: DataState, observer: Observer, share: tuple[int, int] = (1, 1)
    ) -> None:
        """Compute the batches of a call that are not in the folder yet.

        Args:
            share: i and n: only every n-th batch, from the i-th on. The batches have the same users whatever
                the share, so that n processes compute the same as one.
        """
        recommender = self.recommender
        histories = UserHistories(
            recommender.workspace, through=None if recommender.live else recommender.stage, until=state.until
        )
        observer.begin("recommend", histories.count() // self.part[1], "users")
        answered = 0
        for place, users in enumerate(self._users(histories)):
            answered += len(users)
            file = folder / f"{place:08}.parquet"
            if place % share[1] == share[0] - 1 and not _is_of(state, file):
                batch = pa.Table.from_pylist(self._rows(users), schema=SCHEMA)
                with write_aside(file) as aside:
                    pq.write_table(batch.replace_schema_metadata({CALL: _mark(state)}), aside)
            observer.advance(answered)
        observer.end()

    def _data_state(self, folder: Path, observer: Observer) -> DataState:
        """The state of the data to use: that of an interrupted call with the same arguments, else the current
        one."""
        determined = self.determined_by
        with suppress(OSError, ValueError, KeyError, WorkspaceError):
            earlier = json.loads(read_sealed(folder / NOTE))
            if earlier["determined_by"] == determined:
                done = sum(1 for _ in folder.glob("*.parquet"))
                observer.note(
                    f"continues after {done * self.at_once:,} users that an interrupted call has finished"
                )
                return DataState(determined, int(earlier["until"]))
        for left in folder.glob("*.parquet"):
            left.unlink()
        events = self.recommender.histories.received
        until = events.newest if events is not None else 0
        content = json.dumps({"determined_by": determined, "until": until})
        write_sealed(folder / NOTE, content.encode())
        return DataState(determined, until)

    @property
    def determined_by(self) -> str:
        """Digest of everything that determines the recommendations, except received events."""
        recommender = self.recommender
        histories, ids = recommender.histories, recommender.semantic_ids
        events = histories.received
        return digest(
            recommender.determined_by,
            ids.fingerprint(len(ids.item_ids)),
            histories.fingerprint,
            None if events is None else events.id,
            [self.k, self.exclude_seen, list(self.part), self.at_once, sorted(recommender.retired)],
            *([sorted(ids.names.current.items())] if ids.names else []),
        )

    def _users(self, histories: UserHistories) -> Iterator[list[tuple[str, list[str]]]]:
        """Batches of the part's users with their items."""
        number, parts = self.part
        waiting: list[tuple[str, list[str]]] = []
        for users in histories.parts(self.at_once):
            waiting += [
                (user, history.items)
                for user, history in users
                if zlib.crc32(user.encode()) % parts == number - 1
            ]
            while len(waiting) >= self.at_once:
                yield waiting[: self.at_once]
                waiting = waiting[self.at_once :]
        if waiting:
            yield waiting

    def _rows(self, users: list[tuple[str, list[str]]]) -> Rows:
        known = [(user, items) for user, items in users if items]
        histories, asking = [items for _, items in known], [user for user, _ in known]
        found = iter(self.recommender.search(histories, self.k, exclude_seen=self.exclude_seen, users=asking))
        rows = []
        for user, items in users:
            best = next(found) if items else []
            rows.append(
                {
                    "user": user,
                    "items": [item for item, _ in best] if items else self._popular,
                    "scores": [score for _, score in best] if items else None,
                }
            )
        return rows

    @cached_property
    def _popular(self) -> list[str]:
        return self.recommender.popular(self.k)

    def _collect(self, folder: Path, file: Path, state: DataState, observer: Observer) -> int:
        """Combine the batches into one file; returns the number of users in it."""
        users = unknown = few = 0
        fewest = ("", self.k)
        with write_aside(file) as aside, _rows_into(aside, file.suffix.lower()) as write:
            for part in sorted(folder.glob("*.parquet")):
                if not _is_of(state, part):
                    raise WorkspaceError(f"{part} was written by an earlier call; run the same command again")
                rows: Rows = pq.read_table(part, schema=SCHEMA).to_pylist()
                write(rows)
                users += len(rows)
                unknown += sum(row["scores"] is None for row in rows)
                short = [row for row in rows if len(row["items"]) < self.k]
                few += len(short)
                fewest = min(
                    [fewest, *((r["user"], len(r["items"])) for r in short)], key=lambda each: each[1]
                )
        if few:
            observer.note(
                f"{few:,} of {users:,} users got fewer than {self.k} items, because their histories contain "
                f"all other items that are not retired; user {fewest[0]!r} got the fewest, {fewest[1]}"
            )
        if unknown:
            observer.note(
                f"{unknown:,} of {users:,} users have no item that the model knows; they got the most "
                "popular items of the newest stage, without scores"
            )
        return users


def _mark(state: DataState) -> str:
    return f"{state.determined_by} {state.until}"


def _is_of(state: DataState, batch: Path) -> bool:
    """Whether a batch exists and is one of this call: on a cluster, a process of an earlier call may still be
    writing."""
    try:
        metadata = pq.read_schema(batch).metadata or {}
    except (OSError, pa.ArrowInvalid):
        return False
    return bool(metadata.get(CALL) == _mark(state).encode())


@contextmanager
def _rows_into(file: Path, ending: str) -> Iterator[Callable[[Rows], None]]:
    """A function that appends rows to a new file, in the format given by the ending."""
    if ending == ".parquet":
        with pq.ParquetWriter(file, SCHEMA) as writer:
            yield lambda rows: writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
        return
    with file.open("w", encoding="utf-8", newline="") as lines:
        if ending == ".jsonl":
            yield lambda rows: lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            return
        table = csv.writer(lines)
        table.writerow(("user", "rank", "item", "score"))
        yield lambda rows: table.writerows(
            (row["user"], rank, item, score)
            for row in rows
            for rank, (item, score) in enumerate(
                zip(row["items"], row["scores"] or [""] * len(row["items"]), strict=True), 1
            )
        )
