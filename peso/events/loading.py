"""Load the events of a source into DuckDB, with parsed times, and with users and items as numbers.

These tables are created:

    users   name, u          one row per user; u counts from 0 in no particular order
    items   name, i          one row per item; i counts from 0 in no particular order
    events  u, i, time, row[, rating][, kind]   time in microseconds; row is the position in the log, for ties

:func:`event_tables` gives them to the engine that does the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import duckdb
import pyarrow as pa

from peso.errors import DataError
from peso.events.database import scalar
from peso.events.engines.engine import Engine
from peso.events.sources import Log
from peso.events.sources.reading import Reading
from peso.events.sources.tables import ALIKE, BLANKS, MISSING, folded
from peso.events.times import Clock, iso, recognize, recognize_unit
from peso.runtime.progress import Observer

if TYPE_CHECKING:
    import ibis.expr.types as ir

UNTIMED = "there are no times: events are in the order of the files"
DAY = 86_400.0  # seconds by which a clock elsewhere may be ahead
MANY = 0.1  # the share of unreadable rows above which leaving them out is warned of
SAMPLE = 100  # the number of values from which the format of the times is recognized


@dataclass(frozen=True)
class Loaded:
    """The result of loading a log.

    Attributes:
        clock: the format of the times.
        rows: the number of rows that were read.
        skipped: the number of unreadable rows, which were left out.
        first, last: the times of the first and the last event in microseconds.
        remarks: sentences about suspicious ids.
        ahead: the number of events more than a day in the future.
        timed: whether the log has times; if not, the events are in the order of the files.
    """

    clock: Clock
    rows: int
    skipped: int
    first: int
    last: int
    remarks: list[str]
    ahead: int = 0
    timed: bool = True

    def tell(self, observer: Observer) -> None:
        """Report the format of the times, the number of rows, the remarks and times in the future.

        Times in the future are not among the remarks, because the manifest of a log does not depend on when
        the log is read.
        """
        times = f"times are {self.clock.stated}: {iso(self.first)} to {iso(self.last)}"
        observer.note(
            f"{times if self.timed else UNTIMED}; {self.rows:,} rows, "
            f"{self.skipped:,} of them unreadable and left out"
        )
        if self.skipped > MANY * self.rows:
            observer.note(
                f"warning: {self.skipped / self.rows:.0%} of the rows were left out, because data.on_error "
                "is skip; with fail, the error names the first of them. A log with two formats of times, for "
                "example, loses one of them"
            )
        for remark in self.remarks:
            observer.note(f"note: {remark}")
        if self.ahead:
            events = "event is" if self.ahead == 1 else "events are"
            observer.note(
                f"warning: {self.ahead:,} {events} in the future, the last at {iso(self.last)}. Only later "
                "events can be appended to a stream, so correct these times if they are a mistake"
            )

    @property
    def stated(self) -> dict[str, Any]:
        """The times for the manifest."""
        return {"recognised": self.clock.stated, "from": iso(self.first), "until": iso(self.last)}

    def in_manifest(self, first: int, last: int) -> dict[str, Any]:
        """The entry ``time`` of a manifest; empty if there are no times.

        Args:
            first, last: the times of the first and the last event that were kept, in microseconds.
        """
        if not self.timed:
            return {}
        return {"time": {**self.stated, "unit": self.clock.unit, "first": first, "last": last}}


@dataclass(frozen=True)
class Aliases:
    """Names of items and users in new data that differ from their ids in the stream: the ids, by name."""

    items: Mapping[str, str] = field(default_factory=dict)
    users: Mapping[str, str] = field(default_factory=dict)


NO_ALIASES = Aliases()


def use_stream_ids(
    connection: duckdb.DuckDBPyConnection, table: str, column: str, aliases: Mapping[str, str]
) -> None:
    """Replace names in a column of a table by the ids that the stream has for them."""
    if not aliases:
        return
    pairs = pa.table({"name": list(aliases), "id": list(aliases.values())})
    connection.register("aliases", pairs)
    connection.execute(f'UPDATE {table} SET "{column}" = id FROM aliases WHERE "{column}" = name')
    connection.unregister("aliases")


@dataclass(frozen=True)
class EventTables:
    """The tables of a loaded log in an engine.

    Attributes:
        engine: the engine.
        users, items: the tables ``users`` and ``items``.
        read: the table ``events``.
        events: the rows of it that count so far.
    """

    engine: Engine
    users: ir.Table
    items: ir.Table
    read: ir.Table
    events: ir.Table


def event_tables(engine: Engine, log: Log, rating: bool) -> EventTables:
    """The tables that :func:`load` created, in an engine. The arguments are those of ``load``."""
    columns = {"u": "int32", "i": "int32", "time": "int64", "row": "int64"}
    columns |= {"rating": "float64"} if rating else {}
    columns |= {"kind": "string"} if log.keep else {}
    events = engine.take("events", columns)
    users = engine.take("users", {"name": "string", "u": "int32"})
    items = engine.take("items", {"name": "string", "i": "int32"})
    return EventTables(engine, users, items, events, events)


def load(
    connection: duckdb.DuckDBPyConnection,
    log: Log,
    skip: bool,
    rating: bool = False,
    aliases: Aliases = NO_ALIASES,
) -> Loaded:
    """Load a log into the tables ``users``, ``items`` and ``events``.

    Args:
        skip: whether to leave out and count unreadable rows instead of refusing the log.
        rating: whether to keep the ratings. Rows without a rating are then unreadable.
        aliases: names in the log, and the ids that replace them.

    Raises:
        DataError: there is no event, the times cannot be parsed, or (without ``skip``) a row cannot be read;
            the message names the file, row and value.
    """
    table = log.table
    where = f"column {log.time!r} of {table.files[0]}"
    reading = Reading(connection, table, skip, log.time, swallowed=1)
    time = table.require(log.time, "data.columns.time")
    sample = [
        value
        for (value,) in reading.select(
            f"{time.value}::VARCHAR", f"WHERE {time.sql} IS NOT NULL LIMIT {SAMPLE}"
        )
    ]
    clock = recognize(sample, time.kind, log.time_format, where) if sample else Clock("iso")
    rows = reading.create("raw", ", ".join(_fields(reading, log, clock, rating)))
    bad = " OR ".join(f"{field} IS NULL" for field in ['"user"', "item", "time"] + ["rating"] * rating)
    unread = scalar(connection, f"SELECT count(*) FROM raw WHERE {bad}")
    if unread and not skip:
        raise _first_unreadable(connection, reading, log, clock, bad, rating)
    if rows == unread:
        raise DataError(f"{table.files[0]} has no readable events; download or create the file again")
    clock = _with_unit(connection, clock, bad, where)
    use_stream_ids(connection, "raw", "item", aliases.items)
    use_stream_ids(connection, "raw", "user", aliases.users)
    connection.execute(f"""
        CREATE TABLE users AS SELECT name, (row_number() OVER () - 1)::INTEGER AS u
        FROM (SELECT DISTINCT "user" AS name FROM raw WHERE NOT ({bad}))""")
    connection.execute(f"""
        CREATE TABLE items AS SELECT name, (row_number() OVER () - 1)::INTEGER AS i
        FROM (SELECT DISTINCT item AS name FROM raw WHERE NOT ({bad}))""")
    further = ", rating" * rating + ", kind" * bool(log.keep)
    connection.execute(f"""
        CREATE TABLE events AS
        SELECT u, i, {clock.in_microseconds("time")} AS time, raw.rowid AS row{further}
        FROM raw JOIN users ON raw."user" = users.name JOIN items ON raw.item = items.name
        WHERE NOT ({bad})""")
    connection.execute("DROP TABLE raw")
    tomorrow = round((datetime.now(UTC).timestamp() + DAY) * 1e6)
    first, last, ahead = connection.execute(
        f"SELECT min(time), max(time), count(*) FILTER (time > {tomorrow}) FROM events"
    ).fetchall()[0]
    remarks = [*reading.remarks, *_remarks_on_ids(connection, log), *_remarks_on_types(connection, log)]
    left_out = reading.left_out
    return Loaded(clock, rows + left_out, unread + left_out, first, last, remarks, ahead, log.timed)


def _fields(reading: Reading, log: Log, clock: Clock, rating: bool) -> list[str]:
    require = log.table.require
    fields = [
        f'{reading.id(log.user, "data.columns.user")} AS "user"',
        f"{reading.id(log.item, 'data.columns.item')} AS item",
        f"{clock.parse(require(log.time, 'data.columns.time').value)} AS time",
    ]
    if rating:
        assert log.rating is not None
        number = f"try_cast({require(log.rating, 'data.columns.rating').value} AS DOUBLE)"
        fields.append(f"CASE WHEN isfinite({number}) THEN {number} END AS rating")
    if log.kind is not None:
        fields.append(f"{reading.id(log.kind, 'data.events.column')} AS kind")
    return fields


def _with_unit(connection: duckdb.DuckDBPyConnection, clock: Clock, bad: str, where: str) -> Clock:
    if clock.kind != "number" or clock.unit is not None:
        return clock
    least, most = connection.execute(f"SELECT min(time), max(time) FROM raw WHERE NOT ({bad})").fetchall()[0]
    return Clock(clock.kind, recognize_unit(least, most, where))


def _first_unreadable(
    connection: duckdb.DuckDBPyConnection, reading: Reading, log: Log, clock: Clock, bad: str, rating: bool
) -> DataError:
    row = scalar(connection, f"SELECT min(rowid) FROM raw WHERE {bad}")
    asked = [log.user, log.item, log.time] + ([log.rating] if rating and log.rating else [])
    given = ", ".join(f"left({log.table.require(name, '').value}::VARCHAR, 80)" for name in asked)
    values = reading.select(given, f"LIMIT 1 OFFSET {row}")[0]
    read = connection.execute(f"SELECT * FROM raw WHERE rowid = {row}").fetchall()[0]
    what = next(
        kind for kind, value in zip(("user", "item", "time", "rating"), read, strict=False) if value is None
    )
    place = ("user", "item", "time", "rating").index(what)
    name, value = asked[place], values[place]
    if what in ("user", "item") or value is None:
        said = f"no {what} (column {name!r} is {value!r})"
    elif what == "time":
        said = f"the time {str(value)!r} in column {name!r}, which cannot be read as {clock.stated} "
        said += "or is outside of the years 1970 to 9998"
    else:
        said = f"the rating {value!r} in column {name!r}, which is not a number"
    file, number = reading.place(row)
    return DataError(
        f"{file}: row {number} (counted from 1, without a header) has {said}; correct it, "
        "check data.columns, or skip such rows with data.on_error: skip"
    )


def _remarks_on_ids(connection: duckdb.DuckDBPyConnection, log: Log) -> Iterator[str]:
    for table, column in (("users", log.user), ("items", log.item)):
        for condition, what in (
            (f"name <> trim(name, {BLANKS})", "with spaces around them, which count as part of the id"),
            (f"lower(name) IN {MISSING}", "that look like missing values but are treated as ids"),
            (
                r"regexp_full_match(name, '-?\d(\.\d+)?[eE]\+?\d+')",
                "in scientific notation, which may have merged different ids",
            ),
        ):
            count, example = connection.execute(
                f"SELECT count(*), min(name) FROM {table} WHERE {condition}"
            ).fetchall()[0]
            if count:
                yield f"column {column!r} has {count:,} ids {what}: {example!r}"
        alike = connection.execute(f"""
            SELECT min(name), max(name) FROM {table} GROUP BY {folded("name")} HAVING count(*) > 1
            ORDER BY 1""").fetchall()
        if alike:
            yield (
                f"column {column!r} has {len(alike):,} ids in several spellings ({ALIKE}), which are "
                f"treated as different ids: {' and '.join(map(repr, alike[0]))}"
            )


def _remarks_on_types(connection: duckdb.DuckDBPyConnection, log: Log) -> Iterator[str]:
    if not log.keep:
        return
    there = [
        kind for (kind,) in connection.execute("SELECT DISTINCT kind FROM events ORDER BY kind").fetchall()
    ]
    for kind in log.keep:
        if kind not in there:
            yield (
                f"no event has {kind!r} in column {log.kind!r} (data.events.keep); its values are "
                f"{', '.join(map(repr, there[:10]))}"
            )
