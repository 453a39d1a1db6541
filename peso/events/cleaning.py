"""Clean a log and cut it into stages.

Cleaning removes low ratings, duplicates, repeats, and rare users and items; a funnel counts what each step
leaves. A log is cut by shares of its events, by the calendar, or at given times. Events with the same time
are in the order of the log, so every cut is reproducible.
"""

from __future__ import annotations

from calendar import monthrange
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import cycle, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from peso.config import PERIOD, DataConfig, StagesConfig
from peso.errors import DataError, NothingLeft, UntrainableStage
from peso.events.engines.engine import Engine, arg_min
from peso.events.loading import EventTables
from peso.events.times import END, Clock, iso, microseconds

if TYPE_CHECKING:
    import ibis.expr.types as ir


class Funnel:
    """What each step of the cleaning leaves of a log.

    ``rows`` has one dictionary per step with ``step``, ``events``, ``users`` and ``items``. The first one is
    for the rows as they were read, whose users and items are not counted (None).
    """

    def __init__(self, log: EventTables, read: int) -> None:
        self.engine = log.engine
        self.rows: list[dict[str, Any]] = [{"step": "read", "events": read, "users": None, "items": None}]
        left = {name: self.engine.count(getattr(log, name)) for name in ("events", "users", "items")}
        self.rows.append({"step": "readable", **left})

    def count(self, step: str, left: ir.Table, cure: str = "") -> None:
        """Count what is left after a step.

        Args:
            step: the name of the step.
            left: the events that are left.
            cure: what the user should do if nothing is left.

        Raises:
            NothingLeft: nothing is left.
        """
        events = self.engine.count(left)
        if self.rows[-1]["events"] == events:
            self.rows.append({**self.rows[-1], "step": step})  # no event was removed, so no user was either
            return
        users, items = self.engine.row(left.aggregate(users=left.u.nunique(), items=left.i.nunique()))
        self.rows.append({"step": step, "events": events, "users": users, "items": items})
        if not events:
            raise NothingLeft(f"no event is left after the cleaning step {step!r}; {cure}")


@dataclass(frozen=True)
class Known:
    """The users (u) and items (i) of a log that are already in a stream. They never count as rare."""

    users: ir.Table
    items: ir.Table


@dataclass(frozen=True)
class Cleaned:
    """A cleaned log.

    Attributes:
        events: the events (u, i, time, row).
        rests_on: the kept tables that ``events`` is computed from.
        rare: the events of the users that were removed because they have too few (u, i, time, row); None if
            there is no minimum.
    """

    events: ir.Table
    rests_on: tuple[ir.Table, ...]
    rare: ir.Table | None = None


def clean(
    log: EventTables, funnel: Funnel, data: DataConfig, keep: Sequence[str] = (), known: Known | None = None
) -> Cleaned:
    """Clean a log in these steps, which ``funnel`` counts, with the settings of ``data``:

    1. Keep only events of the types in ``keep``; if it is empty, keep all events.
    2. Remove events rated below ``min_rating``.
    3. Of events with the same user, item and time, keep the first one in the log.
    4. With ``repeats: drop``, keep only the earliest event of each user with each item.
    5. Remove users with fewer than ``min_user`` events and items with fewer than ``min_item`` events until
       there are none left (the k-core; events are counted, not distinct items). Users and items that are
       ``known`` stay.

    The events as they were read are dropped.

    Raises:
        NothingLeft: nothing is left after a step.
    """
    engine, events = log.engine, log.events
    min_rating, min_user, min_item = data.min_rating, data.min_user, data.min_item
    if keep:
        events = events.filter(events.kind.isin(keep))
        funnel.count(
            f"events of type {', '.join(keep)}",
            events,
            "check data.events (the column and the values to keep)",
        )
    if min_rating is not None:
        events = events.filter(events.rating >= min_rating)
        funnel.count(f"rating of {min_rating:g} or more", events, "lower data.min_rating")
    events = engine.keep("events", events.group_by("u", "i", "time").aggregate(row=events.row.min()))
    engine.drop(log.read)
    funnel.count("duplicates kept once", events)
    if data.repeats == "drop":
        first = events.group_by("u", "i").aggregate(
            time=events.time.min(), row=arg_min(events.row, events.time)
        )
        all_events, events = events, engine.keep("events", first)
        engine.drop(all_events)
        funnel.count("repeats dropped", events)
    if min_user == min_item == 1:
        return Cleaned(events, (events,))
    core = _core(engine, events, min_user, min_item, known)
    funnel.count(
        f"core: users of {min_user} or more events, items of {min_item} or more",
        core.events,
        "lower data.min_user or data.min_item",
    )
    return core


def _core(engine: Engine, events: ir.Table, min_user: int, min_item: int, known: Known | None) -> Cleaned:
    """Step 5 of :func:`clean`.

    The events are read once a pass and never written: a pass changes only the numbers of events of users and
    items.
    """
    least = {"u": min_user, "i": min_item}
    counts = {column: events.group_by(column).aggregate(n=events.count()) for column in least}
    if known is not None:
        counts = {"u": counts["u"].anti_join(known.users, "u"), "i": counts["i"].anti_join(known.items, "i")}
    first = {column: engine.keep("counts", table) for column, table in counts.items()}
    left = dict(first)

    def keep_instead(column: str, rows: ir.Table) -> None:
        before, left[column] = left[column], engine.keep("counts", rows)
        if before is not first[column]:
            engine.drop(before)

    for number, (column, other) in enumerate(cycle([("u", "i"), ("i", "u")])):
        rare = left[column].n < least[column]
        few = left[column].filter(rare)
        removes = bool(engine.rows(few.limit(1)))
        if removes:
            lost = events.semi_join(few, column).group_by(other).aggregate(lost=lambda gone: gone.count())
            both = left[other].left_join(lost, other)
            keep_instead(other, both.select(other, n=both.n - both.lost.fill_null(0)))
            keep_instead(column, left[column].filter(~rare))
        # the other column was cleaned in the pass before; if this pass removes nothing, both are clean
        if number and not removes:
            break
    gone = {column: engine.keep("gone", first[column].anti_join(left[column], column)) for column in least}
    engine.drop(*first.values(), *(left[name] for name in least if left[name] is not first[name]))
    core = events.anti_join(gone["u"], "u").anti_join(gone["i"], "i")
    of_rare = engine.keep("rare", events.semi_join(gone["u"], "u"))
    return Cleaned(core, (events, *gone.values()), of_rare)


MAX_STAGES = 10_000  # more stages mean that the period or the times are wrong
MOMENTS = 50  # times whose events are counted in the same query


@dataclass(frozen=True)
class Cut:
    """Where a log is cut into stages.

    Attributes:
        ends: int64 (stages,), the number of events before the end of each stage, oldest first.
        moments: the boundaries between the stages in microseconds; None if the cut is not by time.
    """

    ends: np.ndarray
    moments: list[int] | None


def order_by_time(engine: Engine, cleaned: Cleaned) -> ir.Table:
    """The events (u, i, time) in their order in time, with the column ``place``, which counts from 0. The
    cleaned events are dropped."""
    in_order = cleaned.events.order_by("time", "row").select("u", "i", "time")
    ordered = engine.numbered("ordered", in_order, "place")
    engine.drop(*cleaned.rests_on)
    return ordered


def cut(engine: Engine, ordered: ir.Table, stages: StagesConfig, clock: Clock) -> Cut:
    """Cut the events of :func:`order_by_time` as configured.

    Raises:
        DataError: as :func:`moments_of`, or a stage has no events.
    """
    if stages.fractions is not None:
        events = engine.count(ordered)
        ends = np.rint(np.cumsum(stages.fractions) * events).astype(np.int64)
        ends[-1] = events  # the shares sum to 1 only up to rounding
        _require_events(ends, None, events)
        return Cut(ends, None)
    (last,) = engine.row(ordered.aggregate(last=ordered.time.max()))
    return cut_at(engine, ordered, moments_of(stages, clock, last))


def moments_of(stages: StagesConfig, clock: Clock, last: int) -> list[int]:
    """The times of the boundaries between stages, in microseconds; none if the log is cut by shares.

    Args:
        last: the time of the last event.

    Raises:
        DataError: the boundaries do not ascend, or there are too many periods.
    """
    if stages.every is not None:
        assert stages.start is not None
        return calendar(stages.every, clock.moment(stages.start, "data.stages.from"), last)
    moments = [clock.moment(value, "data.stages.boundaries") for value in stages.boundaries or []]
    if any(later <= earlier for earlier, later in pairwise(moments)):
        raise DataError(
            f"data.stages.boundaries must be in ascending order, not {', '.join(map(iso, moments))}"
        )
    return moments


def cut_at(engine: Engine, ordered: ir.Table, moments: list[int]) -> Cut:
    """Cut the events at these times. Events at exactly such a time belong to the later stage."""
    before: list[int] = []
    for first in range(0, len(moments), MOMENTS):
        some = enumerate(moments[first : first + MOMENTS])
        counts = {f"before_{n}": ordered.count(where=ordered.time < moment) for n, moment in some}
        before += engine.row(ordered.aggregate(**counts))
    ends = np.array([*before, events := engine.count(ordered)], dtype=np.int64)
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
