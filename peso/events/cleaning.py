"""What is taken out of a log before it is cut: low ratings, duplicates, repeats, rare users and items.

Every step's counts go into a funnel. Users and items marked ``known`` (they are in a stream already) are
never rare.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import duckdb

from peso.errors import DataError
from peso.events.database import scalar


class Funnel:
    """Per step of the cleaning what is left of a log.

    ``rows``: dicts of ``step``, ``events``, ``users``, ``items``; users and items of the rows as they were
    read are not counted (None).
    """

    def __init__(self, connection: duckdb.DuckDBPyConnection, read: int) -> None:
        self.connection = connection
        self.rows: list[dict[str, Any]] = [{"step": "read", "events": read, "users": None, "items": None}]
        left = {
            name: scalar(connection, f"SELECT count(*) FROM {name}") for name in ("events", "users", "items")
        }
        self.rows.append({"step": "readable", **left})

    def count(self, step: str, cure: str = "") -> None:
        """Count what is left now. Raises DataError if nothing is; ``cure``: what to do then."""
        events = scalar(self.connection, "SELECT count(*) FROM events")
        if self.rows[-1]["events"] == events:
            self.rows.append({**self.rows[-1], "step": step})  # where no event went, no user did
            return
        users, items = self.connection.execute(
            "SELECT count(DISTINCT u), count(DISTINCT i) FROM events"
        ).fetchall()[0]
        self.rows.append({"step": step, "events": events, "users": users, "items": items})
        if not events:
            raise DataError(f"no event is left after the step {step!r} of the cleaning; {cure}")


def clean(
    funnel: Funnel,
    keep: Sequence[str] = (),
    min_rating: float | None = None,
    repeats: str = "keep",
    min_user: int = 1,
    min_item: int = 1,
) -> None:
    """Clean the table ``events`` in this order; every step is counted in ``funnel``.

    1. Events of other types than those to ``keep`` go; none given: all stay.
    2. Events rated below ``min_rating`` go.
    3. Of events with the same user, item and time the first of the log stays.
    4. ``repeats="drop"``: of a user's events with an item the earliest stays.
    5. Users with fewer than ``min_user`` events and items with fewer than ``min_item`` go, again and again
       until none is left (the k-core; events count, not distinct items).

    Raises:
        DataError: nothing is left.
    """
    connection = funnel.connection
    if keep:
        connection.execute(
            "DELETE FROM events WHERE kind IS NULL OR NOT list_contains(?, kind)", [list(keep)]
        )
        funnel.count(
            f"events of type {', '.join(keep)}", "check data.events: its column, and the values to keep"
        )
    if min_rating is not None:
        connection.execute("DELETE FROM events WHERE rating < ?", [min_rating])
        funnel.count(f"rating of {min_rating:g} or more", "lower data.min_rating")
    connection.execute("""
        CREATE TABLE cleaned AS SELECT u, i, time, min(row) AS row FROM events GROUP BY u, i, time;
        DROP TABLE events;
        ALTER TABLE cleaned RENAME TO events""")
    funnel.count("duplicates kept once")
    if repeats == "drop":
        connection.execute("""
            CREATE TABLE cleaned AS
            SELECT u, i, min(time) AS time, arg_min(row, time) AS row FROM events GROUP BY u, i;
            DROP TABLE events;
            ALTER TABLE cleaned RENAME TO events""")
        funnel.count("repeats dropped")
    if min_user > 1 or min_item > 1:
        _to_core(connection, min_user, min_item)
        funnel.count(
            f"core: users of {min_user} or more events, items of {min_item} or more",
            "lower data.min_user or data.min_item",
        )


def _to_core(connection: duckdb.DuckDBPyConnection, min_user: int, min_item: int) -> None:
    sides = cycle([("u", "users", min_user), ("i", "items", min_item)])
    for number, (column, table, least) in enumerate(sides):
        gone = scalar(
            connection,
            f"""DELETE FROM events WHERE {column} IN (
                SELECT {column} FROM events GROUP BY {column} HAVING count(*) < {least}
                EXCEPT SELECT {column} FROM {table} WHERE known)""",
        )
        # one side holds since its own pass; if the other has nothing to take out either, both do
        if number and not gone:
            return
