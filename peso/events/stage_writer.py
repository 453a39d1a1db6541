"""Write sorted events as the files of a stream, one slice of the users at a time.

Memory does not grow with the log: users are written in slices of about ``SLICE`` events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from peso.events import columns
from peso.events.database import cores, literal, scalar
from peso.events.engines.engine import Engine
from peso.events.histories import Ragged, Stage, refuse_untrainable, stage_counts, stage_slicer
from peso.events.loading import NO_ALIASES, EventTables, use_stream_ids
from peso.events.sources import ItemTable
from peso.events.sources.reading import Reading
from peso.events.sources.tables import ALIKE, MISSING, folded
from peso.events.stream import ITEMS_FILE, rare_file, stage_file, stage_table
from peso.runtime.progress import Observer

if TYPE_CHECKING:
    import ibis.expr.types as ir

SLICE = 1_000_000  # events that are in memory together
BATCH = 50_000  # events or names that are read at a time


class StageWriter:
    """Writes the Parquet files of several stages at the same time, and counts their contents."""

    def __init__(self, directory: Path, numbers: Sequence[int], stack: ExitStack) -> None:
        self.numbers = list(numbers)
        self.counts: list[dict[str, int]] = [{} for _ in numbers]
        self.most = [0] * len(self.numbers)
        self._threads = stack.enter_context(ThreadPoolExecutor(cores()))
        self._files = []
        for number in numbers:
            path = directory / stage_file(number)
            path.parent.mkdir()
            self._files.append(stack.enter_context(pq.ParquetWriter(path, columns.STAGE)))

    def write(self, slices: Sequence[Callable[[], Stage]]) -> None:
        """Write a slice of the users of each stage.

        Args:
            slices: functions that return the slices, in the order of the stage numbers.
        """
        # Arrow releases Python's lock while encoding, and each stage has its own file. At most as many slices
        # as threads are in memory
        list(self._threads.map(self._write, range(len(self.numbers)), slices))

    def _write(self, place: int, slice_of_stage: Callable[[], Stage]) -> None:
        stage = slice_of_stage()
        if not stage.users:
            return
        self._files[place].write_table(stage_table(stage))
        for name, count in stage_counts(stage).items():
            self.counts[place][name] = self.counts[place].get(name, 0) + count
        self.most[place] = max(self.most[place], int(stage.current.lengths.max()))

    def require_trainable(self, source: str) -> None:
        """Check that every stage has training targets.

        Raises:
            UntrainableStage: a stage has none.
        """
        for number, counts, most in zip(self.numbers, self.counts, self.most, strict=True):
            refuse_untrainable(number, counts.get("users", 0), most, source)


@dataclass(frozen=True)
class Numbers:
    """Users and items in the order of their first events.

    Attributes:
        users: u, name, n.
        items: i, name, n, without the items that a stream had before.
    """

    users: ir.Table
    items: ir.Table


def number_by_arrival(
    log: EventTables, ordered: ir.Table, first_item: int = 0, known_items: ir.Table | None = None
) -> Numbers:
    """Number users and items in the order of their first events.

    Args:
        ordered: the events by time (:func:`peso.events.cleaning.order_by_time`).
        first_item: the number of the first item.
        known_items: items (i) that have a number already.
    """
    items = log.items if known_items is None else log.items.anti_join(known_items, "i")

    def arrived(column: str, names: ir.Table) -> ir.Table:
        firsts = ordered.group_by(column).aggregate(place=ordered.place.min())
        found = firsts.join(names, column).order_by("place").select(column, "name")
        return log.engine.numbered(f"arrived_{column}", found, "n")

    users, arrived_items = arrived("u", log.users), arrived("i", items)
    return Numbers(
        users.mutate(n=users.n.cast("int32")),
        arrived_items.mutate(n=(arrived_items.n + first_item).cast("int32")),
    )


def in_numbers(events: ir.Table, users: ir.Table, items: ir.Table) -> ir.Table:
    """Events with the numbers of users and items as ``u`` and ``i``; those without a number are left out.

    Args:
        events: u, i and other columns.
        users: the numbers of users (u, n).
        items: the numbers of items (i, n).
    """
    found = events.join(users.select("u", user="n"), "u").join(items.select("i", item="n"), "i")
    return found.select(*events.drop("u", "i").columns, u="user", i="item")


def by_user(
    engine: Engine, events: ir.Table, users: ir.Table, by: Sequence[str], last_use: Sequence[ir.Table] = ()
) -> Iterator[tuple[list[str], dict[str, np.ndarray]]]:
    """The events of all users, some users at a time: those of about ``SLICE`` events, at least one user.

    Args:
        events: u (the number of the user), i and the columns ``by``.
        users: the users (n, name), numbered from 0. Some may have no events.
        by: int64 columns by which the events of a user are ordered.
        last_use: kept tables that only ``events`` still needs; they are dropped before the first users.

    Yields:
        The names of the users, and the columns of their events. ``u`` counts from the first of these users.
    """
    batches = engine.batches(users.order_by("n").select("name"), BATCH)
    names = (name for batch in batches for name in batch["name"].to_pylist())
    columns = ["u", "i", *by]
    held = pa.schema(
        {name: pa.int32() if name in ("u", "i") else pa.int64() for name in columns}
    ).empty_table()
    begin, read, edge = 0, 0, SLICE
    for batch in engine.batches(events.order_by("u", *by).select(columns), BATCH, last_use):
        held = pa.concat_tables([held, pa.Table.from_batches([batch])])
        read += len(batch)
        while edge < read:  # the users before that of the event number `edge` are complete
            first = held["u"][edge - read + len(held)].as_py()
            if first > begin:
                whole = int(np.searchsorted(held["u"].to_numpy(), first))
                of_users, arrays = list(islice(names, first - begin)), _arrays(held.slice(0, whole), begin)
                held, begin = held.slice(whole), first
                yield of_users, arrays
            edge += SLICE
    yield list(names), _arrays(held, begin)


def _arrays(events: pa.Table, first_user: int) -> dict[str, np.ndarray]:
    arrays = {name: events[name].to_numpy() for name in events.column_names}
    return {**arrays, "u": np.subtract(arrays["u"], first_user, dtype=np.int64)}


def write_stages(
    engine: Engine,
    events: ir.Table,
    users: ir.Table,
    directory: Path,
    ends: np.ndarray,
    first: int,
    source: str,
    advance: Callable[[int], None],
    last_use: Sequence[ir.Table] = (),
) -> list[dict[str, int]]:
    """Write the stages of events.

    Args:
        events: u, i (numbers) and place, an event's position in time. It is negative for events before the
            first stage to write.
        users: the users (n, name).
        directory: the directory of the stream.
        ends: int64 (stages,), the place at which each stage ends.
        first: the number of the first stage to write.
        source: where the events come from, for messages.
        advance: called with the number of events written so far.
        last_use: kept tables that only ``events`` still needs; they are dropped.

    Returns:
        The counts of each stage (``peso.events.histories.stage_counts``).

    Raises:
        DataError: no user has three events in a stage.
    """
    stages = len(ends)
    bounds = np.concatenate([[0], ends[:-1]])  # in the slices, stage 0 has the earlier events
    done = 0
    with ExitStack() as stack:
        writer = StageWriter(directory, range(first, first + stages), stack)
        for names, part in by_user(engine, events, users, ["place"], last_use):
            done += len(part["place"])
            # arrays are freed as soon as the next ones are made
            stage_of = np.searchsorted(bounds, part.pop("place"), side="right")
            stage = stage_slicer(names, part.pop("u"), part.pop("i"), stage_of, stages + 1)
            del stage_of
            writer.write([partial(stage, number) for number in range(1, stages + 1)])
            advance(done)
        writer.require_trainable(source)
    return writer.counts


def write_rare(
    log: EventTables, rare: ir.Table | None, numbers: ir.Table, directory: Path, first: int
) -> int:
    """Write the users whom the k-core left out (:func:`peso.events.stream.rare_file`), oldest first. If there
    are none, no file is written.

    Args:
        rare: the events of these users (``peso.events.cleaning.Cleaned``).
        numbers: the numbers of the items of the stream (i, n).
        directory: the directory of the stream.
        first: the number of the first stage of the log.

    Returns:
        The number of these users.
    """
    if rare is None:
        return 0
    engine = log.engine
    firsts = rare.group_by("u").aggregate(time=rare.time.min(), row=rare.row.min())
    arrived = firsts.join(log.users, "u").order_by("time", "row").select("u", "name")
    users = engine.numbered("rare_users", arrived, "n")
    users = users.mutate(n=users.n.cast("int32"))
    if not (count := engine.count(users)):
        return 0
    events = in_numbers(rare, users, numbers)
    connection = engine.connection
    connection.execute('CREATE TABLE rare_users ("user" VARCHAR, previous INTEGER[], "current" INTEGER[])')
    for names, part in by_user(engine, events, users, ["time", "row"]):
        offsets = np.bincount(part["u"] + 1, minlength=len(names) + 1).cumsum()
        nothing = Ragged(part["i"][:0], np.zeros(len(offsets), np.int64))
        slice_ = Stage(first, names, Ragged(part["i"], offsets), nothing)
        connection.from_arrow(stage_table(slice_)).insert_into("rare_users")
    file = literal(str(directory / rare_file(first)))
    connection.execute(f"COPY rare_users TO {file} (FORMAT parquet)")
    return count


def new_items(
    connection: duckdb.DuckDBPyConnection,
    items: ItemTable | None,
    skip: bool,
    observer: Observer,
    aliases: Mapping[str, str] = NO_ALIASES.items,
) -> tuple[pa.Table, dict[str, Any]]:
    """The rows of the item table for the table ``item_numbers``, in their order, with the texts of ``items``.

    Args:
        items: the product table; None if there is none.
        skip: whether to leave out rows of ``items`` that cannot be read instead of refusing the table.
        aliases: names in ``items``, and the ids that replace them.

    Returns:
        An Arrow table (``peso.events.columns.ITEMS``), and counts for the manifest: rows of ``items`` that
        repeat an item (the first one is used), rows that were left out because they are unreadable or have
        no item, and items that have a row (``items_found``).
    """
    told: dict[str, Any] = {"repeated_rows_of_items": 0, "skipped_rows_of_items": 0}
    if items is None:
        query = """
            SELECT name AS item_id, NULL AS title, NULL AS text, NULL AS category FROM item_numbers
            ORDER BY n"""
        return _as_items(connection, query), told
    reading = Reading(connection, items.table, skip, items.item)
    reading.create(
        "catalogue",
        f"{reading.id(items.item, 'data.items.columns.item')} AS item_id, "
        f"nullif({items.title}, '') AS title, nullif({items.text}, '') AS text, "
        f"nullif({items.category}, '') AS category",
    )
    use_stream_ids(connection, "catalogue", "item_id", aliases)
    told["repeated_rows_of_items"] = scalar(
        connection, "SELECT count(item_id) - count(DISTINCT item_id) FROM catalogue"
    )
    told["skipped_rows_of_items"] = (
        scalar(connection, "SELECT count(*) - count(item_id) FROM catalogue") + reading.left_out
    )
    told["items_found"] = _tell_found(connection, str(items.table.files[0]), observer)
    for remark in [*reading.remarks, *_remarks_on_texts(connection)]:
        observer.note(f"note: product table: {remark}")
    for key, what in (
        ("skipped_rows_of_items", "are unreadable or have no item id, and are left out"),
        ("repeated_rows_of_items", "repeat an item; the first row of each item is used"),
    ):
        if told[key]:
            observer.note(f"note: {told[key]:,} rows of the product table {what}")
    return texts_in_catalogue(connection, "item_numbers"), told


def texts_in_catalogue(connection: duckdb.DuckDBPyConnection, numbers: str) -> pa.Table:
    """The title, text and category (``peso.events.columns.ITEMS``) that the first row of each item has in the
    product table, which :func:`new_items` has read.

    Args:
        numbers: a table with the items (name, n).
    """
    query = f"""
        SELECT name AS item_id, title, text, category
        FROM {numbers}
        LEFT JOIN (SELECT item_id, min(rowid) AS first FROM catalogue GROUP BY item_id) AS firsts
          ON firsts.item_id = name
        LEFT JOIN catalogue ON catalogue.rowid = firsts.first
        ORDER BY n"""
    return _as_items(connection, query)


def _as_items(connection: duckdb.DuckDBPyConnection, query: str) -> pa.Table:
    return connection.sql(query).to_arrow_table().select(columns.ITEMS.names).cast(columns.ITEMS)


def _remarks_on_texts(connection: duckdb.DuckDBPyConnection) -> Iterator[str]:
    for field in ("title", "text", "category"):
        count, example = connection.execute(
            f"SELECT count(*), min({field}) FROM catalogue WHERE lower({field}) IN {MISSING}"
        ).fetchall()[0]
        if count:
            yield (
                f"the {field} of {count:,} rows is {example!r}, which is used as text; clear these cells if "
                "the value is missing"
            )


def _tell_found(connection: duckdb.DuckDBPyConnection, file: str, observer: Observer) -> int:
    """Report how many items have a row, and ids that almost match; returns the number of items with a row."""
    connection.execute("""
        CREATE TABLE met AS
        SELECT log.name, product.item_id
        FROM item_numbers AS log FULL JOIN (
            SELECT DISTINCT item_id FROM catalogue WHERE item_id IS NOT NULL) AS product
          ON log.name = product.item_id""")
    found, items, products = connection.execute("""
        SELECT count(*) FILTER (name IS NOT NULL AND item_id IS NOT NULL), count(name), count(item_id)
        FROM met""").fetchall()[0]
    observer.note(
        f"{found:,} of {items:,} items of the log have a row in {file}, which has {products:,} items"
    )
    near = connection.execute(f"""
        SELECT count(DISTINCT log.name), min((log.name, product.item_id)::VARCHAR)
        FROM met AS log JOIN met AS product ON {folded("log.name")} = {folded("product.item_id")}
        WHERE log.item_id IS NULL AND product.name IS NULL""").fetchall()[0]
    if near[0]:
        observer.note(
            f"note: {near[0]:,} items of the log without a row differ from an id in the product table only "
            f"in {ALIKE}, for example {near[1]} (log, product table); use one spelling for each id"
        )
    return int(found)


def write_items(table: pa.Table, directory: Path) -> None:
    """Write ``items.parquet``."""
    # in one chunk, so that equal tables give equal files regardless of how they were built
    pq.write_table(table.combine_chunks(), directory / ITEMS_FILE)
