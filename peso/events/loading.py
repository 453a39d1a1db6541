"""A source's events into DuckDB: texts read, times understood, users and items as numbers.

Knows which rows can be read; knows nothing of cleaning or stages. What it leaves in the database:

    users   name, u, known          one row a user; u counts from 0 in no particular order
    items   name, i, known          likewise
    events  u, i, time, row[, rating]   time in microseconds; row: the place in the log, which orders ties
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import duckdb

from peso.errors import DataError
from peso.events.database import rejected_lines, scalar
from peso.events.sources import Log
from peso.events.sources.tables import FILE
from peso.events.times import Clock, iso, recognise, recognise_unit

SAMPLE = 100  # values by which the form of the times is recognised


@dataclass(frozen=True)
class Loaded:
    """``rows`` of the log were read, ``skipped`` of them left out; ``first`` and ``last``: microseconds."""

    clock: Clock
    rows: int
    skipped: int
    first: int
    last: int

    @property
    def stated(self) -> dict[str, Any]:
        """For the manifest."""
        return {"recognised": self.clock.stated, "from": iso(self.first), "until": iso(self.last)}


def load(connection: duckdb.DuckDBPyConnection, log: Log, skip: bool, rating: bool = False) -> Loaded:
    """Read a log.

    Args:
        skip: leave unreadable rows out and count them, instead of refusing the log.
        rating: keep the ratings; a row without one is unreadable then.

    Raises:
        DataError: no event at all, times that are not understood, or (without ``skip``) a row that cannot be
            read: names file, row and value.
    """
    table = log.table
    where = f"column {log.time!r} of {table.files[0]}"
    time = table.require(log.time, "data.columns.time")
    connection.execute(f"SELECT {time} FROM {table.scan(skip)} WHERE {time} IS NOT NULL LIMIT {SAMPLE}")
    sample = [value for (value,) in connection.fetchall()]
    clock = recognise(sample, table.columns[log.time], log.time_format, where) if sample else Clock("iso")
    try:
        connection.execute(
            f"CREATE TABLE raw AS SELECT {_fields(log, clock, rating)} FROM {table.scan(skip)}"
        )
    except duckdb.Error as error:
        # DuckDB may cast within the CSV reader, which then names the line but not in our words
        if "Error when converting column" not in str(error):
            raise
        raise _first_unreadable(connection, log, clock, rating) from None
    bad = _unreadable(rating)
    unread = scalar(connection, f"SELECT count(*) FROM raw WHERE {bad}")
    if unread and not skip:
        raise _first_unreadable(connection, log, clock, rating)
    rows = scalar(connection, "SELECT count(*) FROM raw")
    if rows == unread:
        raise DataError(f"{table.files[0]} holds no readable event; fetch or write the file again")
    rejected = rejected_lines(connection) if skip else 0
    clock = _with_unit(connection, clock, bad, where)
    connection.execute(f"""
        CREATE TABLE users AS SELECT name, (row_number() OVER () - 1)::INTEGER AS u, false AS known
        FROM (SELECT DISTINCT "user" AS name FROM raw WHERE NOT ({bad}))""")
    connection.execute(f"""
        CREATE TABLE items AS SELECT name, (row_number() OVER () - 1)::INTEGER AS i, false AS known
        FROM (SELECT DISTINCT item AS name FROM raw WHERE NOT ({bad}))""")
    connection.execute(f"""
        CREATE TABLE events AS
        SELECT u, i, {clock.in_microseconds("time")} AS time, raw.rowid AS row{", rating" if rating else ""}
        FROM raw JOIN users ON raw."user" = users.name JOIN items ON raw.item = items.name
        WHERE NOT ({bad})""")
    connection.execute("DROP TABLE raw")
    first, last = connection.execute("SELECT min(time), max(time) FROM events").fetchall()[0]
    return Loaded(clock, rows + rejected, unread + rejected, first, last)


def _fields(log: Log, clock: Clock, rating: bool) -> str:
    require = log.table.require
    fields = [
        f"nullif({require(log.user, 'data.columns.user')}::VARCHAR, '') AS \"user\"",
        f"nullif({require(log.item, 'data.columns.item')}::VARCHAR, '') AS item",
        f"{clock.parse(require(log.time, 'data.columns.time'))} AS time",
    ]
    if rating:
        assert log.rating is not None
        number = f"try_cast({require(log.rating, 'data.columns.rating')} AS DOUBLE)"
        fields.append(f"CASE WHEN isfinite({number}) THEN {number} END AS rating")
    return ", ".join(fields)


def _unreadable(rating: bool) -> str:
    return " OR ".join(f"{field} IS NULL" for field in ['"user"', "item", "time"] + ["rating"] * rating)


def _with_unit(connection: duckdb.DuckDBPyConnection, clock: Clock, bad: str, where: str) -> Clock:
    if clock.kind != "number" or clock.unit is not None:
        return clock
    least, most = connection.execute(f"SELECT min(time), max(time) FROM raw WHERE NOT ({bad})").fetchall()[0]
    return Clock(clock.kind, recognise_unit(least, most, where))


def _first_unreadable(
    connection: duckdb.DuckDBPyConnection, log: Log, clock: Clock, rating: bool
) -> DataError:
    """Read again up to the first bad row, this time with numbers: only a failure pays for them."""
    table, bad = log.table, _unreadable(rating)
    columns = [log.user, log.item, log.time] + ([log.rating] if rating and log.rating else [])
    given = ", ".join(f"{table.require(name, '')} AS given_{k}" for k, name in enumerate(columns))
    fields = f"{_fields(log, clock, rating)}, {given}"
    connection.execute(
        f"SELECT {FILE} FROM (SELECT {fields}, {FILE} FROM {table.scan(name_file=True)}) WHERE {bad} LIMIT 1"
    )
    name = connection.fetchall()[0][0]
    file = next(file for file in table.files if str(file) == name)
    connection.execute(f"""
        SELECT * FROM (SELECT row_number() OVER () AS place, {fields} FROM {table.scan(files=[file])})
        WHERE {bad} LIMIT 1""")
    place, user, item, time, *rest = connection.fetchall()[0]
    given_user, given_item, given_time, *given_rating = rest[rating:]
    if user is None:
        what = f"no user (column {log.user!r} is {given_user!r})"
    elif item is None:
        what = f"no item (column {log.item!r} is {given_item!r})"
    elif time is None:
        what = f"the time {str(given_time)!r} in column {log.time!r}, which cannot be read as {clock.stated}"
    else:
        what = f"the rating {given_rating[0]!r} in column {log.rating!r}, which is no number"
    return DataError(
        f"{file}: row {place} (counted from 1, without a header) has {what}; mend it, "
        "check data.columns, or leave such rows out with data.on_error: skip"
    )
