"""Where a log is cut into stages: by share of the events, by the calendar, at given moments.

Events of one moment stand in the order of the log, so every cut is reproducible.
"""

from __future__ import annotations

from calendar import monthrange
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import duckdb
import numpy as np

from peso.config import PERIOD, StagesConfig
from peso.errors import DataError, UntrainableStage
from peso.events.database import scalar
from peso.events.times import END, Clock, iso, microseconds

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
