"""Write sorted events as the files of a stream, one slice of the users at a time.

Memory does not grow with the log: users are written in slices of about ``SLICE`` events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from peso.events import columns
from peso.events.database import cores, literal, scalar
from peso.events.histories import Stage, refuse_untrainable, slice_stages, stage_counts
from peso.events.sources import ItemTable
from peso.events.sources.reading import Reading
from peso.events.sources.tables import ALIKE, MISSING, folded
from peso.events.stream import ITEMS_FILE, rare_file, stage_file, stage_table
from peso.runtime.progress import Observer

SLICE = 1_000_000  # events


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

    def write(self, stages: Sequence[Stage]) -> None:
        """Write a slice of the users of each stage, in the order of the stage numbers."""
        present = [place for place, stage in enumerate(stages) if stage.users]
        # Arrow releases Python's lock while encoding; each stage has its own file
        list(
            self._threads.map(
                lambda place: self._files[place].write_table(stage_table(stages[place])), present
            )
        )
        for place in present:
            for name, count in stage_counts(stages[place]).items():
                self.counts[place][name] = self.counts[place].get(name, 0) + count
            self.most[place] = max(self.most[place], int(stages[place].current.lengths.max()))

    def require_trainable(self, source: str) -> None:
        """Check that every stage has training targets.

        Raises:
            UntrainableStage: a stage has none.
        """
        for number, counts, most in zip(self.numbers, self.counts, self.most, strict=True):
            refuse_untrainable(number, counts.get("users", 0), most, source)


def number_by_arrival(connection: duckdb.DuckDBPyConnection, first_item: int = 0) -> None:
    """Number users and items in the order of their first events.

    Creates the tables ``user_numbers`` (u, n, name) and ``item_numbers`` (i, n, name). Items are numbered
    from ``first_item`` on, except ``known`` ones, whose numbers are in the table ``known_items`` (name, n).
    """
    connection.execute("""
        CREATE TABLE user_numbers AS
        SELECT u, (row_number() OVER (ORDER BY place) - 1)::INTEGER AS n, name
        FROM (SELECT u, min(rowid) AS place FROM ordered GROUP BY u) JOIN users USING (u) ORDER BY n""")
    connection.execute(f"""
        CREATE TABLE item_numbers AS
        SELECT i, (row_number() OVER (ORDER BY place) - 1 + {first_item})::INTEGER AS n, name
        FROM (SELECT i, min(rowid) AS place FROM ordered GROUP BY i) JOIN items USING (i) WHERE NOT known
        ORDER BY n""")


def write_stages(
    connection: duckdb.DuckDBPyConnection,
    directory: Path,
    ends: np.ndarray,
    first: int,
    source: str,
    advance: Callable[[int], None],
) -> list[dict[str, int]]:
    """Write the stages of the table ``sorted`` (u, i, place), with events grouped by user, oldest first.

    ``place`` is an event's position in time. It is negative for events before the first stage to write.

    Args:
        connection: the database.
        directory: the directory of the stream.
        ends: int64 (stages,), the place at which each stage ends.
        first: the number of the first stage to write.
        source: where the events come from, for messages.
        advance: called with the number of events written so far.

    Returns:
        The counts of each stage (``peso.events.histories.stage_counts``).

    Raises:
        DataError: no user has three events in a stage.
    """
    stages = len(ends)
    bounds = np.concatenate([[0], ends[:-1]])  # in the slices, stage 0 has the earlier events
    events = scalar(connection, "SELECT count(*) FROM sorted")
    users = scalar(connection, "SELECT count(*) FROM user_numbers")
    starts = connection.execute(
        f"SELECT DISTINCT u FROM sorted WHERE rowid % {SLICE} = 0 AND rowid > 0 ORDER BY u"
    ).fetchall()
    edges = [0, *(int(u) for (u,) in starts if u), users]
    done = 0
    with ExitStack() as stack:
        writer = StageWriter(directory, range(first, first + stages), stack)
        for begin, end in pairwise(edges):
            part = connection.execute(
                f"SELECT u, i, place FROM sorted WHERE u >= {begin} AND u < {end}"
            ).fetchnumpy()
            names = connection.execute(
                f"SELECT name FROM user_numbers WHERE n >= {begin} AND n < {end} ORDER BY n"
            ).fetchnumpy()["name"]
            stage_of = np.searchsorted(bounds, part["place"], side="right")
            writer.write(
                slice_stages(
                    names.tolist(),
                    part["u"].astype(np.int64) - begin,
                    part["i"],
                    stage_of,
                    stages + 1,
                )[1:]
            )
            done += len(stage_of)
            advance(done)
        writer.require_trainable(source)
    assert done == events, "every event belongs to a slice"
    return writer.counts


def write_rare(connection: duckdb.DuckDBPyConnection, directory: Path, first: int) -> int:
    """Write the users whom the k-core left out (:func:`peso.events.stream.rare_file`), oldest first. If there
    are none, no file is written.

    Args:
        connection: the database with the cleaned log.
        directory: the directory of the stream.
        first: the number of the first stage of the log.

    Returns:
        The number of these users.
    """
    core = "SELECT count(*) FROM duckdb_tables() WHERE table_name = 'rare'"
    if not scalar(connection, core):
        return 0
    known = "SELECT n, name FROM item_numbers"
    if scalar(connection, "SELECT count(*) FROM duckdb_tables() WHERE table_name = 'known_items'"):
        known += " UNION ALL SELECT n, name FROM known_items"
    connection.execute(f"""
        CREATE TABLE rare_users AS
        WITH had AS (
            SELECT u, users.name AS name, numbers.n AS n, time, row
            FROM rare JOIN users USING (u) JOIN items USING (i)
            LEFT JOIN ({known}) AS numbers ON numbers.name = items.name
            WHERE NOT users.known AND u NOT IN (SELECT u FROM user_numbers))
        SELECT name AS "user",
            coalesce(list(n ORDER BY time, row) FILTER (n IS NOT NULL), [])::INTEGER[] AS previous,
            []::INTEGER[] AS "current"
        FROM had GROUP BY u, name ORDER BY min(time), min(row)""")
    users = scalar(connection, "SELECT count(*) FROM rare_users")
    if users:
        file = literal(str(directory / rare_file(first)))
        connection.execute(f"COPY rare_users TO {file} (FORMAT parquet)")
    return users


def new_items(
    connection: duckdb.DuckDBPyConnection, items: ItemTable | None, skip: bool, observer: Observer
) -> tuple[pa.Table, dict[str, int]]:
    """The rows of the item table for the table ``item_numbers``, in their order, with the texts of ``items``.

    Args:
        connection: the database.
        items: the product table; None if there is none.
        skip: whether to leave out rows of ``items`` that cannot be read instead of refusing the table.
        observer: receives notes.

    Returns:
        An Arrow table (``peso.events.columns.ITEMS``), and counts for the manifest: rows of ``items`` that
        repeat an item (the first one is used), rows that were left out because they are unreadable or have
        no item, and items that have a row (``items_found``).
    """
    told = {"repeated_rows_of_items": 0, "skipped_rows_of_items": 0}
    if items is None:
        query = """
            SELECT name AS item_id, NULL AS title, NULL AS text, NULL AS category FROM item_numbers
            ORDER BY n"""
    else:
        reading = Reading(connection, items.table, skip, items.item)
        reading.create(
            "catalogue",
            f"{reading.id(items.item, 'data.items.columns.item')} AS item_id, "
            f"nullif({items.title}, '') AS title, nullif({items.text}, '') AS text, "
            f"nullif({items.category}, '') AS category",
        )
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
        query = """
            SELECT name AS item_id, title, text, category
            FROM item_numbers
            LEFT JOIN (SELECT item_id, min(rowid) AS first FROM catalogue GROUP BY item_id) AS firsts
              ON firsts.item_id = name
            LEFT JOIN catalogue ON catalogue.rowid = firsts.first
            ORDER BY n"""
    table = connection.sql(query).to_arrow_table()
    return table.select(columns.ITEMS.names).cast(columns.ITEMS), told


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
    """Report how many items have a row, and ids that almost match.

    Returns: the number of items that have a row.
    """
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
