"""The stream on disk: one Parquet file of users per stage, one item table, and a manifest.

stream/stage=0/users.parquet   user, previous, current (item numbers, oldest first)
stream/stage=0/rare.parquet    the same for users with too few events for any stage of a log, see rare_file
stream/stage=0/merged.parquet  the same for users that were merged after this stage, see merged_file
stream/items.parquet           item_id, title, text, category; the row is the item number
stream/manifest.json           format version, counts of each stage, sha256 of the files
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from peso.errors import DataError, WorkspaceError
from peso.events import columns
from peso.events.histories import Ragged, Stage, TargetUsers, require_trainable, stage_counts
from peso.runtime.files import link
from peso.runtime.manifest import intact, read_manifest, write_manifest

FORMAT = 1
ITEMS_FILE = "items.parquet"
MERGED = "merged"  # a key of the manifest: the merges of users (peso.events.merge)
ERASED = "erased"  # a key of the manifest: for each erasure of a user, the checksums of the files before it
PIECE = 20_000  # users of a stage that are held in memory together


def stage_file(number: int) -> str:
    """The file of the users of a stage."""
    return f"stage={number}/users.parquet"


def rare_file(number: int) -> str:
    """The file with the users of a log whom cleaning left out because they have too few events.

    Models are not trained on these users, but they get recommendations. ``previous`` has those of their items
    that are in the stream. ``number`` is the first stage of the log.
    """
    return f"stage={number}/rare.parquet"


def merged_file(number: int) -> str:
    """The file of the users that were merged when this was the last stage (:mod:`peso.events.merge`).

    ``previous`` has their histories. A user without items was merged into another one.
    """
    return f"stage={number}/merged.parquet"


def write_stream(
    directory: Path, items: pa.Table, stages: Iterable[Stage], manifest: Mapping[str, Any] | None = None
) -> None:
    """Write a stream to an existing empty directory. The manifest is written last.

    Args:
        items: the item table (``peso.events.columns.ITEMS``), one row per item, in the order of the numbers.
        stages: the stages 0, 1, … in this order. They are used one by one and need not all be in memory.
        manifest: further contents of the manifest, such as the source of the data, in addition to
            ``format``, ``items`` (their number), ``stages`` (their counts) and ``files`` (their sha256).

    Raises:
        DataError: there is no stage, a stage has no training targets, or an item id occurs twice.
    """
    items = items.select(columns.ITEMS.names).cast(columns.ITEMS)
    _require_distinct(items)
    pq.write_table(items, directory / ITEMS_FILE)
    counts = []
    for number, stage in enumerate(stages):
        if stage.number != number:
            raise ValueError(f"expected stage {number}, not stage {stage.number}")
        for ragged in (stage.previous, stage.current):
            if len(ragged.values) and not 0 <= ragged.values.min() <= ragged.values.max() < len(items):
                raise ValueError(f"stage {number} has item numbers outside the table of {len(items)} items")
        counts.append(_write_stage(directory, stage, "stream"))
    if not counts:
        raise DataError("a stream needs at least stage 0, but the data have no stages")
    write_manifest(directory, FORMAT, {**(manifest or {}), "items": len(items), "stages": counts})


def replace_stages(directory: Path, stages: Iterable[Stage], manifest: Mapping[str, Any]) -> None:
    """Replace the stages of a stream on which nothing was trained yet.

    Args:
        directory: the directory of the stream.
        stages: the new stages; their number must be the same.
        manifest: further contents of the manifest, see :func:`write_stream`. The items do not change.

    Raises:
        DataError: a stage has no training targets.
    """
    stream = Stream.open(directory)
    counts = [_write_stage(directory, stage, str(manifest.get("split", "stream"))) for stage in stages]
    if len(counts) != stream.stages:
        raise ValueError(f"{len(counts)} stages cannot replace {stream.stages}")
    known = {ITEMS_FILE: stream.manifest["files"][ITEMS_FILE]}
    write_manifest(directory, FORMAT, {**stream.manifest, **manifest, "stages": counts}, known)


class Stream:
    """An open stream directory. Files are read and checked against their sha256 when they are needed."""

    def __init__(
        self, directory: Path, manifest: Mapping[str, Any], target_users: TargetUsers = "tested"
    ) -> None:
        self.directory = directory
        self.manifest = manifest
        self.target_users = target_users

    @classmethod
    def open(cls, directory: str | Path, target_users: TargetUsers = "tested") -> Stream:
        """Open a directory that :func:`write_stream` wrote.

        Args:
            target_users: the users whose events are training targets
                (:class:`peso.events.histories.Stage`). It is not stored in the stream.

        Raises:
            WorkspaceError: the manifest is missing or damaged, or a newer version wrote it.
        """
        directory = Path(directory)
        return cls(directory, read_manifest(directory, FORMAT), target_users)

    @property
    def stages(self) -> int:
        """The number of stages, including stage 0."""
        return len(self.counts)

    @property
    def counts(self) -> list[dict[str, int]]:
        """The counts of each stage, see :func:`peso.events.histories.stage_counts`."""
        return list(self.manifest["stages"])

    def stage(self, number: int) -> Stage:
        """Read one stage.

        Raises:
            DataError: there is no such stage.
            WorkspaceError: its file is missing or damaged.
        """
        self._require_stage(number)
        return as_stage(number, self._read(stage_file(number)), self.target_users)

    @property
    def erasures(self) -> int:
        """The number of erasures of users (see :mod:`peso.events.erase`)."""
        return len(self.manifest.get(ERASED, []))

    def fingerprint(self, number: int, erasures: int | None = None) -> str:
        """The sha256 of the file of a stage. Raises DataError if there is no such stage.

        Args:
            erasures: return the sha256 after this number of erasures of users; None for the current one.
        """
        self._require_stage(number)
        name = stage_file(number)
        if erasures is not None:
            for erased in self.manifest.get(ERASED, [])[erasures:]:
                if name in erased["before"]:
                    return str(erased["before"][name])
        return str(self.manifest["files"][name])

    @cached_property
    def items(self) -> pa.Table:
        """The item table (``peso.events.columns.ITEMS``). Raises WorkspaceError if its file is damaged."""
        return self._read(ITEMS_FILE)

    @cached_property
    def item_ids(self) -> list[str]:
        return self.items[columns.ITEM_ID].to_pylist()

    @cached_property
    def titles(self) -> list[str | None]:
        """The title of each item, None if it is unknown."""
        return self.items[columns.TITLE].to_pylist()

    @cached_property
    def categories(self) -> list[str | None]:
        """The category path of each item, None if it is unknown."""
        return self.items[columns.CATEGORY].to_pylist()

    @property
    def is_described(self) -> bool:
        """Whether any item has a title, a text or a category."""
        fields = (columns.TITLE, columns.TEXT, columns.CATEGORY)
        return any(self.items[name].null_count < len(self.items) for name in fields)

    def items_known(self, stage: int) -> int:
        """The number of items known when this stage was added. Later appends add rows to the item table."""
        later = [brought for brought in self.manifest.get("appended", []) if brought["first_stage"] > stage]
        return int(self.manifest["items"]) - sum(brought["new_items"] for brought in later)

    def first_stages(self) -> np.ndarray:
        """int64 (items,): the stage in which each item first occurs; 0 if it occurs in none."""
        first = np.full(len(self.item_ids), self.stages, dtype=np.int64)
        for number in range(self.stages):
            stage = self.stage(number)
            np.minimum.at(first, stage.current.values, number)
            if number == 0:  # items from before the stream are known from its beginning
                first[stage.previous.values] = 0
        return np.where(first == self.stages, 0, first)

    def pieces(self, number: int) -> Iterator[Stage]:
        """One stage, some thousands of its users at a time, so that they need not all be in memory.

        Raises: as :meth:`stage`.
        """
        self._require_stage(number)
        yield from self._pieces(stage_file(number), number)

    def rare_pieces(self, number: int) -> Iterator[Stage]:
        """The users of :func:`rare_file`, in the same way. If there is no such file, there are none."""
        if rare_file(number) in self.manifest["files"]:
            yield from self._pieces(rare_file(number), number)

    def merged_pieces(self, number: int) -> Iterator[Stage]:
        """The users of :func:`merged_file`, in the same way. If there is no such file, there are none."""
        if merged_file(number) in self.manifest["files"]:
            yield from self._pieces(merged_file(number), number)

    @cached_property
    def merged_users(self) -> dict[str, str]:
        """The current user of each user that was merged into another one."""
        into = {str(merge["from"]): str(merge["into"]) for merge in self.manifest.get(MERGED, [])}
        now = {}
        for user in into:
            now[user] = into[user]
            while now[user] in into:
                now[user] = into[now[user]]
        return now

    def rows_of(self, name: str, users: Collection[str]) -> Stage:
        """The rows of some users in a file of users, in stored order.

        Raises:
            WorkspaceError: the file is missing or damaged.
        """
        wanted = pa.array(list(users), pa.string())
        path = self.file(name)
        with readable(path), pq.ParquetFile(path) as file:
            found = [batch.filter(pc.is_in(batch[columns.USER], wanted)) for batch in file.iter_batches()]
            rows = pa.Table.from_batches(found, file.schema_arrow)
        return as_stage(0, rows, self.target_users)

    def _pieces(self, name: str, number: int) -> Iterator[Stage]:
        path = self.file(name)
        with readable(path), pq.ParquetFile(path) as file:
            for batch in file.iter_batches(PIECE):
                yield as_stage(number, batch, self.target_users)

    def training_events(self, stages: Iterable[int]) -> Iterator[np.ndarray]:
        """The item numbers of each user in each of some stages, int32, oldest first, without the user's
        validation and test event of the stage.

        Users with fewer than three events in the stage are left out, whatever ``target_users``: semantic IDs
        do not depend on it. Of the events before a stage, only those from before the stream are included: the
        others belong to earlier stages, with their validation and test events.

        Raises: as :meth:`stage`.
        """
        for number in stages:
            for users in self.pieces(number):
                for row in users.eligible():
                    events = users.current[row][:-2]
                    yield events if number else np.concatenate([users.previous[row], events])

    def item_counts(self, number: int) -> np.ndarray:
        """int64 (items,): how many events of a stage each item has. Raises: as :meth:`stage`."""
        counts = np.zeros(int(self.manifest["items"]), dtype=np.int64)
        for users in self.pieces(number):
            counts += np.bincount(users.current.values, minlength=len(counts))
        return counts

    def file(self, name: str) -> Path:
        """The path of a file of the stream. Raises WorkspaceError if the file is damaged."""
        return intact(self.directory, name, self.manifest)

    def link_files(self, directory: Path, but: Collection[str]) -> dict[str, str]:
        """Link the files of the stream into another directory, except those whose names are in ``but``.

        Returns:
            The sha256 of each linked file.

        Raises:
            WorkspaceError: a file is damaged.
        """
        linked = {name: sha256 for name, sha256 in self.manifest["files"].items() if name not in but}
        for name in linked:
            link(self.file(name), directory / name)
        return linked

    def _require_stage(self, number: int) -> None:
        if not 0 <= number < self.stages:
            raise DataError(f"{self.directory} has no stage {number}; it has 0 to {self.stages - 1}")

    def _read(self, name: str) -> pa.Table:
        path = self.file(name)
        with readable(path):
            # read as a single file, because `stage=0` in the path is not a column
            return pq.ParquetFile(path).read()


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """A context in which a Parquet file is read. Raises WorkspaceError if it cannot be read."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise WorkspaceError(f"{path} is not readable Parquet ({error}); restore it from a copy") from None


def _write_stage(directory: Path, stage: Stage, source: str) -> dict[str, int]:
    require_trainable(stage, source)
    path = directory / stage_file(stage.number)
    path.parent.mkdir(exist_ok=True)
    pq.write_table(stage_table(stage), path)
    return stage_counts(stage)


def stage_table(stage: Stage) -> pa.Table:
    """The table in which a stage is stored (``peso.events.columns.STAGE``)."""
    users = pa.array(stage.users, pa.string())
    return pa.Table.from_arrays(
        [users, _list_array(stage.previous), _list_array(stage.current)], schema=columns.STAGE
    )


def _list_array(ragged: Ragged) -> pa.ListArray:
    # Arrow's list offsets are int32, so the cast fails for a stage with more than 2 billion items
    return pa.ListArray.from_arrays(
        pa.array(ragged.offsets).cast(pa.int32()), pa.array(ragged.values, pa.int32())
    )


def as_stage(number: int, rows: pa.Table | pa.RecordBatch, target_users: TargetUsers = "tested") -> Stage:
    """A stage from the rows that :func:`stage_table` made."""
    users = rows[columns.USER].to_pylist()
    previous, current = _ragged(rows[columns.PREVIOUS]), _ragged(rows[columns.CURRENT])
    return Stage(number, users, previous, current, target_users)


def _ragged(column: pa.ChunkedArray | pa.ListArray) -> Ragged:
    lists = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return Ragged(
        lists.flatten().to_numpy(zero_copy_only=False),
        # an array may be a slice of a longer buffer, whose offsets then do not start at 0
        (lists.offsets.to_numpy() - lists.offsets[0].as_py()).astype(np.int64),
    )


def _require_distinct(items: pa.Table) -> None:
    ids = items[columns.ITEM_ID].to_pylist()
    if len(set(ids)) < len(ids):
        item, times = Counter(ids).most_common(1)[0]
        raise DataError(f"item {item!r} occurs {times} times in the item table; keep only one row")
