"""The users and items of a new log that a stream has already."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from peso.events import columns
from peso.events.cleaning import Known
from peso.events.loading import EventTables
from peso.events.stage_writer import Numbers, in_numbers
from peso.events.stream import Stream, merged_file, stage_file

if TYPE_CHECKING:
    import ibis.expr.types as ir

BEFORE = 2**40  # subtracted from the places of a user's earlier events: negative, but in the same order


@dataclass(frozen=True)
class StreamOverlap:
    """The users and items of a new log that a stream has already.

    Attributes:
        users: the users of the log that are in the stream: name, u (the user in the log), history (the
            user's items in the stream, oldest first).
        items: the items of the log that are in the stream: i (the item in the log), n (its number).
        had: the items of the log that its users have in the stream (u, i).
    """

    users: ir.Table
    items: ir.Table
    had: ir.Table

    @property
    def known(self) -> Known:
        return Known(self.users.select("u"), self.items.select("i"))


def overlap_of(log: EventTables, stream: Stream) -> StreamOverlap:
    """Find the users and items of a log that a stream has already.

    Raises:
        WorkspaceError: a file of the stream is damaged.
    """
    engine = log.engine
    names = stream.items[columns.ITEM_ID].combine_chunks()
    numbers = pa.array(range(len(names)), pa.int32())
    known_items = engine.given("known_items", pa.table({"name": names, "n": numbers}))
    items = engine.keep("old_items", log.items.join(known_items, "name").select("i", "n"))

    # a merged history is newer than the stage with which it is stored
    names_of_files = [file(n) for n in range(stream.stages) for file in (stage_file, merged_file)]
    files = [stream.file(name) for name in names_of_files if name in stream.manifest["files"]]
    stages = engine.stages(files).rename(name="user")
    newest = stages.semi_join(log.users, "name").group_by("name").aggregate(stage=lambda of: of.stage.max())
    found = stages.join(newest, ["name", "stage"]).join(log.users, "name")
    users = engine.keep("old_users", found.select("name", "u", history=found.previous.concat(found.current)))
    events = users.select("u", n=users.history.unnest())
    had = engine.keep("had", events.join(items, "n").select("u", "i").distinct())
    return StreamOverlap(users, items, had)


def without(events: ir.Table, had: ir.Table, time: int | None = None) -> ir.Table:
    """The events without those of items that their user had before. With ``time``, only events at this time
    are left out."""
    if time is None:
        return events.anti_join(had, ["u", "i"])
    return events.anti_join(had.mutate(time=time), ["u", "i", "time"])


def with_histories(ordered: ir.Table, overlap: StreamOverlap, numbers: Numbers) -> ir.Table:
    """The new events and the earlier ones of their users (u, i, place), with the stream's numbers of users
    and items.

    Args:
        ordered: the new events by time (:func:`peso.events.cleaning.order_by_time`).
        overlap: the users and items that the stream has.
        numbers: the numbers of the users and of the new items.
    """
    items = numbers.items.select("i", "n").union(overlap.items)
    new = in_numbers(ordered.select("u", "i", "place"), numbers.users, items)
    old = overlap.users.join(numbers.users.select("u", user="n"), "u").select("user", "history")
    each = old.unnest("history", offset="at")
    earlier = each.select(u=each.user, i=each.history, place=each["at"].cast("int64") - BEFORE)
    return new.select("u", "i", "place").union(earlier)
