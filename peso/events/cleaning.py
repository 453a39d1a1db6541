"""What is taken out of a log: low ratings, duplicates, repeats, rare users and items; and where it is cut
into stages: by share of the events, by the calendar, at given moments.

Every step's counts go into a funnel. Users and items marked ``known`` (they are in a stream already) are
never rare. Events of one moment stand in the order of the log, so every cut is reproducible.
"""

from __future__ import annotations

from calendar import monthrange
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import cycle, pairwise
from typing import Any

import duckdb
import numpy as np

from peso.config import PERIOD, StagesConfig
from peso.errors import DataError, NothingLeft, UntrainableStage
from peso.events.database import scalar
from peso.events.times import END, Clock, iso, microseconds


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
        """Count what is left now. Raises NothingLeft if nothing is; ``cure``: what to do then."""
        events = scalar(self.connection, "SELECT count(*) FROM events")
        if self.rows[-1]["events"] == events:
            self.rows.append({**self.rows[-1], "step": step})  # where no event went, no user did
            return
        users, items = self.connection.execute(
            "SELECT count(DISTINCT u), count(DISTINCT i) FROM events"
        ).fetchall()[0]
        self.rows.append({"step": step, "events": events, "users": users, "items": items})
        if not events:
            raise NothingLeft(f"no event is left after the step {step!r} of the cleaning; {cure}")


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
        NothingLeft: nothing is left.
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


MAX_STAGES = 10_000  # a calendar that gives more is a mistake in the period or in the times


@dataclass(frozen=True)
class Cut:
    """``ends``: int64 (stages,), how many events, oldest first, lie before the end of each stage.

    ``moments``: the boundaries between the stages in microseconds, where the cut is by time.
    """

    ends: np.ndarray
    moments: list[int] | None


def order_by_time(connection: duckdb.DuckDBPyConnection) -> None:
    """Make ``ordered`` (u, i, time) out of ``events``; its rowid is an event's place in time."""
    connection.execute("""
        CREATE TABLE ordered AS SELECT u, i, time FROM events ORDER BY time, row;
        DROP TABLE events""")


def cut(connection: duckdb.DuckDBPyConnection, stages: StagesConfig, clock: Clock) -> Cut:
    """Cut the table ``ordered``.

    Raises:
        DataError: boundaries that do not ascend, a calendar of too many periods, or a stage without events.
    """
    events = scalar(connection, "SELECT count(*) FROM ordered")
    if stages.fractions is not None:
        ends = np.rint(np.cumsum(stages.fractions) * events).astype(np.int64)
        ends[-1] = events  # the shares sum to 1 but for rounding
        _require_events(ends, None, events)
        return Cut(ends, None)
    if stages.boundaries is not None:
        moments = [clock.moment(value, "data.stages.boundaries") for value in stages.boundaries]
        if any(later <= earlier for earlier, later in pairwise(moments)):
            raise DataError(f"data.stages.boundaries do not ascend: {', '.join(map(iso, moments))}")
    else:
        assert stages.every is not None
        assert stages.start is not None
        last = scalar(connection, "SELECT max(time) FROM ordered")
        moments = calendar(stages.every, clock.moment(stages.start, "data.stages.from"), last)
    return cut_at(connection, moments)


def cut_at(connection: duckdb.DuckDBPyConnection, moments: list[int]) -> Cut:
    """Cut the table ``ordered`` at these moments; an event at the very moment is of the later stage."""
    events = scalar(connection, "SELECT count(*) FROM ordered")
    before = [scalar(connection, f"SELECT count(*) FROM ordered WHERE time < {moment}") for moment in moments]
    ends = np.array([*before, events], dtype=np.int64)
    _require_events(ends, moments, events)
    return Cut(ends, moments)


def calendar(every: str, start: int, last: int) -> list[int]:
    """The moments ``start``, ``start`` + 1 period, … up to ``last``, in microseconds.

    A month or year later is the same day of the month, or its last day where there is no such day.

    Raises:
        DataError: more than ``MAX_STAGES`` of them.
    """
    found = PERIOD.fullmatch(every)
    assert found is not None
    count, unit = int(found[1]), found[2]
    moments: list[int] = []
    while len(moments) <= MAX_STAGES:
        moment = _later(start, count * len(moments), unit)
        if moment > last and moments:
            return moments
        moments.append(moment)
    raise DataError(
        f"data.stages.every: {every} from {iso(start)} gives more than {MAX_STAGES:,} stages up to "
        f"{iso(last)}; take a longer period or check the times"
    )


def _later(start: int, count: int, unit: str) -> int:
    when = datetime.fromtimestamp(0, UTC) + timedelta(microseconds=start)
    try:
        if unit not in ("month", "year"):
            return microseconds(when + timedelta(**{f"{unit}s": count}))
        months = when.year * 12 + when.month - 1 + count * (12 if unit == "year" else 1)
        year, month = divmod(months, 12)
        day = min(when.day, monthrange(year, month + 1)[1])
        return microseconds(when.replace(year=year, month=month + 1, day=day))
    except (ValueError, OverflowError):  # past the calendar's end, and so after every event
        return END + 1


def _require_events(ends: np.ndarray, moments: list[int] | None, events: int) -> None:
    empty = np.flatnonzero(np.diff(ends, prepend=0) == 0)
    if not len(empty):
        return
    number = int(empty[0])
    if moments is None:
        raise UntrainableStage(f"{events} events leave stage {number} empty; cut the log into fewer stages")
    begin = iso(moments[number - 1]) if number else "the beginning"
    end = iso(moments[number]) if number < len(moments) else "the end"
    raise UntrainableStage(
        f"stage {number}, from {begin} to {end}, has no event; choose other boundaries or a longer period"
    )
