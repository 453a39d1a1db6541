"""Clean a log and cut it into stages.

Cleaning removes low ratings, duplicates, repeats, and rare users and items; a funnel counts what each step
leaves. Users and items marked ``known`` (they are already in a stream) are never rare. A log is cut by shares
of its events, by the calendar, or at given times. Events with the same time are in the order of the log, so
every cut is reproducible.
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
    """What each step of the cleaning leaves of a log.

    ``rows`` has one dictionary per step with ``step``, ``events``, ``users`` and ``items``. The first one is
    for the rows as they were read, whose users and items are not counted (None).
    """

    def __init__(self, connection: duckdb.DuckDBPyConnection, read: int) -> None:
        self.connection = connection
        self.rows: list[dict[str, Any]] = [{"step": "read", "events": read, "users": None, "items": None}]
        left = {
            name: scalar(connection, f"SELECT count(*) FROM {name}") for name in ("events", "users", "items")
        }
        self.rows.append({"step": "readable", **left})

    def count(self, step: str, cure: str = "") -> None:
        """Count what is left after a step.

        Args:
            step: the name of the step.
            cure: what the user should do if nothing is left.

        Raises:
            NothingLeft: nothing is left.
        """
        events = scalar(self.connection, "SELECT count(*) FROM events")
        if self.rows[-1]["events"] == events:
            self.rows.append({**self.rows[-1], "step": step})  # no event was removed, so no user was either
            return
        users, items = self.connection.execute(
            "SELECT count(DISTINCT u), count(DISTINCT i) FROM events"
        ).fetchall()[0]
        self.rows.append({"step": step, "events": events, "users": users, "items": items})
        if not events:
            raise NothingLeft(f"no event is left after the cleaning step {step!r}; {cure}")


def clean(
    funnel: Funnel,
    keep: Sequence[str] = (),
    min_rating: float | None = None,
    repeats: str = "keep",
    min_user: int = 1,
    min_item: int = 1,
) -> None:
    """Clean the table ``events`` in these steps, which ``funnel`` counts:

    1. Keep only events of the types in ``keep``; if it is empty, keep all events.
    2. Remove events rated below ``min_rating``.
    3. Of events with the same user, item and time, keep the first one in the log.
    4. With ``repeats="drop"``, keep only the earliest event of each user with each item.
    5. Remove users with fewer than ``min_user`` events and items with fewer than ``min_item`` events until
       there are none left (the k-core; events are counted, not distinct items).

    Raises:
        NothingLeft: nothing is left after a step.
    """
    connection = funnel.connection
    if keep:
        connection.execute(
            "DELETE FROM events WHERE kind IS NULL OR NOT list_contains(?, kind)", [list(keep)]
        )
        funnel.count(
            f"events of type {', '.join(keep)}", "check data.events (the column and the values to keep)"
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
    """Step 5 of :func:`clean`. The removed events go into the table ``rare`` (u, i, time, row)."""
    sides = cycle([("u", "users", min_user), ("i", "items", min_item)])
    connection.execute("CREATE TABLE rare AS SELECT u, i, time, row FROM events LIMIT 0")
    for number, (column, table, least) in enumerate(sides):
        where = f"""{column} IN (
            SELECT {column} FROM events GROUP BY {column} HAVING count(*) < {least}
            EXCEPT SELECT {column} FROM {table} WHERE known)"""
        connection.execute(f"INSERT INTO rare SELECT u, i, time, row FROM events WHERE {where}")
        gone = scalar(connection, f"DELETE FROM events WHERE {where}")
        # the other side was cleaned in the pass before; if this pass removes nothing, both are clean
        if number and not gone:
            return


MAX_STAGES = 10_000  # more stages mean that the period or the times are wrong


@dataclass(frozen=True)
class Cut:
    """Where a log is cut into stages.

    Attributes:
        ends: int64 (stages,), the number of events before the end of each stage, oldest first.
        moments: the boundaries between the stages in microseconds; None if the cut is not by time.
    """

    ends: np.ndarray
    moments: list[int] | None


def order_by_time(connection: duckdb.DuckDBPyConnection) -> None:
    """Create the table ``ordered`` (u, i, time) from ``events``; its rowid is the order in time."""
    connection.execute("""
        CREATE TABLE ordered AS SELECT u, i, time FROM events ORDER BY time, row;
        DROP TABLE events""")


def cut(connection: duckdb.DuckDBPyConnection, stages: StagesConfig, clock: Clock) -> Cut:
    """Cut the table ``ordered`` as configured.

    Raises:
        DataError: the boundaries do not ascend, there are too many periods, or a stage has no events.
    """
    events = scalar(connection, "SELECT count(*) FROM ordered")
    if stages.fractions is not None:
        ends = np.rint(np.cumsum(stages.fractions) * events).astype(np.int64)
        ends[-1] = events  # the shares sum to 1 only up to rounding
        _require_events(ends, None, events)
        return Cut(ends, None)
    if stages.boundaries is not None:
        moments = [clock.moment(value, "data.stages.boundaries") for value in stages.boundaries]
        if any(later <= earlier for earlier, later in pairwise(moments)):
            raise DataError(
                f"data.stages.boundaries must be in ascending order, not {', '.join(map(iso, moments))}"
            )
    else:
        assert stages.every is not None
        assert stages.start is not None
        last = scalar(connection, "SELECT max(time) FROM ordered")
        moments = calendar(stages.every, clock.moment(stages.start, "data.stages.from"), last)
    return cut_at(connection, moments)


def cut_at(connection: duckdb.DuckDBPyConnection, moments: list[int]) -> Cut:
    """Cut the table ``ordered`` at these times. Events at exactly such a time belong to the later stage."""
    events = scalar(connection, "SELECT count(*) FROM ordered")
    before = [scalar(connection, f"SELECT count(*) FROM ordered WHERE time < {moment}") for moment in moments]
    ends = np.array([*before, events], dtype=np.int64)
    _require_events(ends, moments, events)
    return Cut(ends, moments)


def calendar(every: str, start: int, last: int) -> list[int]:
    """The times ``start``, ``start`` + 1 period, … up to ``last``, in microseconds.

    A month or a year later is the same day of the month, or the last day of the month if it is shorter.

    Args:
        every: the period, such as ``1 month``.
        start: the first time, in microseconds.
        last: the latest time, in microseconds.

    Raises:
        DataError: there are more than ``MAX_STAGES`` times.
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
        f"{iso(last)}; choose a longer period or check the times"
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
    except (ValueError, OverflowError):  # beyond the last representable date, so after every event
        return END + 1


def _require_events(ends: np.ndarray, moments: list[int] | None, events: int) -> None:
    empty = np.flatnonzero(np.diff(ends, prepend=0) == 0)
    if not len(empty):
        return
    number = int(empty[0])
    if moments is None:
        raise UntrainableStage(
            f"with {events} events, stage {number} is empty; cut the log into fewer stages"
        )
    begin = iso(moments[number - 1]) if number else "the beginning"
    end = iso(moments[number]) if number < len(moments) else "the end"
    raise UntrainableStage(
        f"stage {number}, from {begin} to {end}, has no events; choose other boundaries or a longer period"
    )
