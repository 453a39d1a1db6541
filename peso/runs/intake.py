"""`peso update --from-events`: turns received events into a stage of the stream (a cut).

The cut is atomic: it takes effect with the rename of the new stream into its place. The events are marked
with the name of the cut before, and the manifest of the new stream contains that name, so that no event is
used twice or lost if the process is killed.

Events that cannot be in a stage yet wait for a later cut: those of items that are not in the product table,
and of users and items below ``data.min_user`` and ``data.min_item``. A late event, older than the stream's
last one, gets the time of that event: in the user's history it follows the events of the stream, and only if
the user never had the item, as in :mod:`peso.runs.user_histories`.
"""

from __future__ import annotations

import shutil
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from peso.config import DataConfig, ItemTableConfig
from peso.config.data import LOG_FORMATS, STREAMS
from peso.errors import DataError, NothingLeft, NothingNew, UntrainableStage
from peso.events import columns
from peso.events.append import extend_stream
from peso.events.database import literal, scalar, temporary_database
from peso.events.loading import Aliases
from peso.events.received import ReceivedEvent, ReceivedEvents
from peso.events.sources import ItemTable, Source, open_source
from peso.events.sources.reading import Reading
from peso.events.sources.user_files import own_items
from peso.events.stream import ITEMS_FILE, Stream, stage_file
from peso.items.semantic_ids import read_release_index
from peso.runs import pipeline, preparation
from peso.runs.names import names_held
from peso.runs.user_histories import RECEIVED, cuts_of
from peso.runs.workspace import Workspace
from peso.runtime.progress import Observer

WORK = ".received.writing"  # temporary directory in the workspace
_SCHEMA = pa.schema([*columns.EVENTS, ("number", pa.int64())])


@dataclass(frozen=True)
class Cut:
    """The result of a cut.

    Attributes:
        stage: the new stage; None: there is none, for the reason ``why``.
        events, users, new_items: counts of the new stage.
        waiting: number of received events that are in no stage yet.
        unknown_items: number of their items that are not in the product table.
        example: one of these items.
    """

    stage: int | None = None
    why: str = ""
    events: int = 0
    users: int = 0
    new_items: int = 0
    waiting: int = 0
    unknown_items: int = 0
    example: str = ""


@dataclass(frozen=True)
class _Selected:
    """A log of the received events whose items are known, in order of time."""

    log: Path
    events: int
    unknown_items: int
    example: str


def cut_received(workspace: Workspace, observer: Observer, items: str | None = None) -> Cut:
    """Append the events received since the last cut as one stage. The caller holds the workspace's lock.

    Nothing is appended while an update is unfinished, or if no user has the three events that a stage needs.

    Args:
        items: the product table to read instead of the configured one.

    Raises:
        WorkspaceError: a damaged file of events or stream; there is no trained stage; a full disk.
        DataError: the product table cannot be read, or new items cannot get semantic IDs.
    """
    number, _ = pipeline.unfinished(workspace)
    if number is not None:
        return Cut(why=f"stage {number} is not finished yet; received events wait for the next update")
    if not workspace.events_file.exists():
        return Cut(why="no event was received yet")
    work = workspace.root / WORK
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        with ReceivedEvents(workspace.events_file) as received, names_held(workspace.root):
            received.check()
            return _cut(workspace, received, work, observer, items)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _cut(
    workspace: Workspace, received: ReceivedEvents, work: Path, observer: Observer, items: str | None
) -> Cut:
    stream, data, known = workspace.stream, workspace.config.data, preparation.aliases(workspace)
    written = _write(received, cuts_of(stream, received.id), work / "received.parquet", known)
    if not written:
        return Cut(why="no event was received since the last stage")
    table = _product_table(data, items, observer)
    selected = _select(workspace, work, table)
    waits = Cut(waiting=written, unknown_items=selected.unknown_items, example=selected.example)
    if not selected.events:
        return replace(waits, why="no received event has an item that is in the stream or the product table")
    log = DataConfig(
        format="parquet",
        path=str(selected.log),
        repeats=data.repeats,
        min_user=data.min_user,
        min_item=data.min_item,
        stages=1,  # type: ignore[arg-type]  # short for fractions
    )
    cut, taken = uuid.uuid4().hex, 0

    def fill(directory: Path) -> dict[str, Any]:
        nonlocal taken
        manifest = extend_stream(
            log,
            stream.directory,
            directory,
            observer,
            source=Source(open_source(log).log, table),
            told={"source": {"format": "received"}, RECEIVED: {"log": received.id, "cut": cut}},
            aliases=known,
            corrects=items is not None or data.items is not None,
        )
        numbers = _taken(Stream.open(directory), selected.log, work)
        taken = len(numbers)
        received.mark(numbers, cut)
        return manifest

    observer.note(f"append: {selected.events:,} received events")
    try:
        manifest = preparation.extend(workspace, observer, fill)
    except NothingNew:
        return replace(waits, why="the stream already has every received event", waiting=0)
    except (NothingLeft, UntrainableStage):
        return replace(
            waits, why="no user has enough events yet: a stage needs three, and a new user also data.min_user"
        )
    brought = manifest["appended"][-1]
    return replace(
        waits,
        stage=int(brought["first_stage"]),
        events=int(brought["events"]),
        users=int(brought["users"]),
        new_items=int(brought["new_items"]),
        waiting=written - taken,
    )


def _write(received: ReceivedEvents, cuts: list[str], file: Path, known: Aliases) -> int:
    """Write the waiting events in order of receipt, with the ids of the stream; returns their number."""
    count = 0
    with pq.ParquetWriter(file, _SCHEMA) as writer:
        for events in received.waiting(cuts):
            writer.write_table(_table(events, known))
            count += len(events)
    return count


def _table(events: list[ReceivedEvent], known: Aliases) -> pa.Table:
    fields = {name: [getattr(event, name) for event in events] for name in _SCHEMA.names}
    for name, ids in ((columns.USER, known.users), (columns.ITEM, known.items)):
        fields[name] = [ids.get(value, value) for value in fields[name]]
    return pa.table(fields, schema=_SCHEMA)


def _product_table(data: DataConfig, items: str | None, observer: Observer) -> ItemTable | None:
    """The configured product table, or that at ``items`` with the configured columns."""
    if items is not None:
        known = data.items.model_dump() if data.items else {}
        table = ItemTableConfig.model_validate({**known, "path": items, "format": None})
        return own_items(data.model_copy(update={"items": table}))
    if data.items is not None:
        return own_items(data)
    if data.format in (*STREAMS, *LOG_FORMATS):
        return None
    try:
        return open_source(data).items
    except DataError as error:
        observer.note(f"note: events of new items wait, because there is no product table: {error}")
        return None


def _select(workspace: Workspace, work: Path, table: ItemTable | None) -> _Selected:
    """Write the events of items in the stream or the product table as a log, in order of time.

    As in any append, a stream without titles, texts and categories accepts all items.
    """
    stream, config = workspace.stream, workspace.config
    last = int(stream.manifest.get("time", {}).get("last", 0))  # if missing, the append is refused later
    known = literal(str(stream.file(ITEMS_FILE)))
    log = work / "log.parquet"
    with temporary_database(work) as connection:
        connection.execute(
            f"CREATE TABLE received AS SELECT * FROM read_parquet({literal(str(work / 'received.parquet'))})"
        )
        connection.execute(f"CREATE TABLE known AS SELECT item_id FROM read_parquet({known})")
        _add_products(connection, stream, table, config.items.index, config.data.on_error == "skip")
        missing = scalar(connection, f"SELECT count(DISTINCT item) FROM received WHERE {_UNKNOWN}")
        first = connection.execute(f"SELECT min(item) FROM received WHERE {_UNKNOWN}").fetchall()[0][0]
        # equal times keep the order of receipt, before late ones are moved to the stream's last moment
        connection.execute(f"""
            COPY (
                SELECT "user", item, make_timestamp(greatest("time", {last})) AS "time", number
                FROM received WHERE NOT ({_UNKNOWN}) ORDER BY received."time", number
            ) TO {literal(str(log))} (FORMAT parquet)""")
        events = scalar(connection, f"SELECT count(*) FROM received WHERE NOT ({_UNKNOWN})")
    return _Selected(log, events, missing, first or "")


_UNKNOWN = "item NOT IN (SELECT item_id FROM known)"


def _add_products(
    connection: duckdb.DuckDBPyConnection,
    stream: Stream,
    table: ItemTable | None,
    index: str | None,
    skip: bool,
) -> None:
    """Add to the table ``known`` the items that may be appended to the stream."""
    if index is not None:
        ids = pa.table({"item_id": read_release_index(index).item_ids})
        connection.from_arrow(ids).insert_into("known")
    elif table is not None:
        reading = Reading(connection, table.table, skip, table.item)
        reading.create("products", f"{reading.id(table.item, 'data.items.columns.item')} AS item_id")
        connection.execute("INSERT INTO known SELECT item_id FROM products WHERE item_id IS NOT NULL")
    elif not stream.is_described:
        connection.execute("INSERT INTO known SELECT item FROM received")


def _taken(stream: Stream, log: Path, work: Path) -> list[int]:
    """Numbers of the events whose user and item are in the stream now, including repeats that the stream has
    once. The other events were too rare."""
    files = ", ".join(literal(str(stream.directory / stage_file(n))) for n in range(stream.stages))
    items = literal(str(stream.directory / ITEMS_FILE))
    with temporary_database(work) as connection:
        found = connection.execute(f"""
            SELECT number FROM read_parquet({literal(str(log))})
            WHERE "user" IN (SELECT "user" FROM read_parquet([{files}], hive_partitioning = false))
            AND item IN (SELECT item_id FROM read_parquet({items})) ORDER BY number""").fetchall()
    return [number for (number,) in found]
