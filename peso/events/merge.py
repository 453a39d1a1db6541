"""Merge users of a stream: the histories of several users become one.

stream/stage=2/merged.parquet   user, previous (the whole history, oldest first), current (empty)

The file is stored with the stage that is the last one when users are merged, and applies after that stage. A
user without items in it was merged into another one. The files of stages do not change, so trained and tested
stages stay as they are. The next stage in which the merged user has events begins with the merged history.
The manifest lists the merges under ``merged``, in their order: ``from``, ``into``, ``stage`` and ``time``.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from peso.events.histories import Ragged, Stage
from peso.events.stream import FORMAT, MERGED, Stream, merged_file, rare_file, stage_file, stage_table
from peso.runtime.manifest import write_manifest
from peso.runtime.provenance import timestamp


@dataclass(frozen=True)
class Events:
    """The events of a user in a stream.

    Attributes:
        stages: the stages of the events, ascending; -1 for those from before the stream.
        items: their item numbers.
    """

    stages: list[int] = field(default_factory=list)
    items: list[int] = field(default_factory=list)

    def add(self, stage: int, items: np.ndarray) -> None:
        self.stages.extend([stage] * len(items))
        self.items.extend(items.tolist())


def events_of(stream: Stream, users: Collection[str]) -> dict[str, Events]:
    """The events of users as they are in the files of stages, before any merge.

    The stages of a rare user's events (:func:`peso.events.stream.rare_file`) are not known. They count as the
    last stage of the user's log.

    Raises:
        WorkspaceError: a file of the stream is damaged.
    """
    found = {user: Events() for user in users}
    begun = first_merges(stream)
    firsts = [0, *(int(brought["first_stage"]) for brought in stream.manifest.get("appended", []))]
    last_of_log = dict(zip(firsts, [first - 1 for first in firsts[1:]] + [stream.stages - 1], strict=True))
    rare = {end: first for first, end in last_of_log.items() if rare_file(first) in stream.manifest["files"]}
    for number in range(stream.stages):
        rows = stream.rows_of(stage_file(number), users)
        for user, previous, current in zip(rows.users, rows.previous, rows.current, strict=True):
            # what a merged user had before is that of its parts
            if not found[user].items and number <= begun.get(user, number):
                found[user].add(-1, previous)
            found[user].add(number, current)
        if number in rare:
            rows = stream.rows_of(rare_file(rare[number]), users)
            for user, previous in zip(rows.users, rows.previous, strict=True):
                found[user].add(number, previous)
    return found


def first_merges(stream: Stream) -> dict[str, int]:
    """The stage after which others were first merged into each user."""
    return {str(merge["into"]): int(merge["stage"]) for merge in reversed(stream.manifest.get(MERGED, []))}


def in_order(parts: Sequence[Events], times: Sequence[Sequence[int] | None]) -> list[int]:
    """The items of several users as one history.

    Args:
        parts: the events of each user.
        times: the times of each user's events; None if they are not known. If they are not known for a user,
            all events are in the order of their stages, and within a stage in the order of the users.

    >>> parts = [Events([0, 1], [10, 11]), Events([0, 0], [20, 21])]
    >>> in_order(parts, [[1, 9], [0, 5]]), in_order(parts, [[1, 9], None])
    ([20, 10, 21, 11], [10, 20, 21, 11])
    """
    known = [part.stages if time is None else time for part, time in zip(parts, times, strict=True)]
    if any(time is None for time in times):
        known = [part.stages for part in parts]
    keyed = [
        [(key, place, item) for key, item in zip(keys, part.items, strict=True)]
        for place, (keys, part) in enumerate(zip(known, parts, strict=True))
    ]
    return [item for _, _, item in heapq.merge(*keyed, key=lambda event: event[:2])]


Log = Sequence[tuple[int, int]]  # time and item number of events, oldest first


def times_of(events: Events, own: Log, joint: Log = (), since: int | None = None) -> list[int] | None:
    """The time of each event of a user, by matching the events with a log in order.

    Each event gets the time of the next event of the log with the same item. The result is None if the log
    lacks one of the events.

    Args:
        events: the user's events in the stream.
        own: the user's events in the log, including those that were left out of the stream.
        joint: ``own`` and the events of all users that were merged into this one.
        since: the stage after which ``joint`` is used instead of ``own``; None: never.

    >>> times_of(Events([0, 0], [7, 9]), [(1, 7), (2, 8), (3, 9)])
    [1, 3]
    """
    count = len(events.items) if since is None else sum(stage <= since for stage in events.stages)
    first = _matched(events.items[:count], own)
    if first is None:
        return None
    later = _matched(events.items[count:], [each for each in joint if not first or each[0] >= first[-1]])
    return None if later is None else first + later


def _matched(items: Sequence[int], log: Log) -> list[int] | None:
    left, found = iter(log), list[int]()
    for item in items:
        time = next((time for time, other in left if other == item), None)
        if time is None:
            return None
        found.append(time)
    return found


def write_merged(
    stream: Stream, directory: Path, merges: Sequence[tuple[str, str]], histories: Mapping[str, Sequence[int]]
) -> None:
    """Write a stream with merged users to an existing empty directory.

    Args:
        stream: the stream. It does not change.
        merges: for each merge, the user who is merged, and the user into whom.
        histories: the new history of each user that others were merged into.

    Raises:
        WorkspaceError: a file of the stream is damaged, or the disk is full.
    """
    number = stream.stages - 1
    name, time = merged_file(number), timestamp()
    known_ones = {user: items for user, items in histories.items() if items}
    gone: dict[str, Sequence[int]] = {before: [] for before, _ in merges}
    rows: dict[str, Sequence[int]] = {**_merged_at(stream, number), **known_ones, **gone}
    known = stream.link_files(directory, {name})
    _write(directory / name, number, rows)
    told = [{"from": before, "into": after, "stage": number, "time": time} for before, after in merges]
    content = {**stream.manifest, MERGED: [*stream.manifest.get(MERGED, []), *told]}
    write_manifest(directory, FORMAT, content, known)


def shorten_merged(stream: Stream, stages: int, directory: Path) -> list[dict[str, object]]:
    """Write the merged users of a stream that loses its last stages, and return the list of merges for the
    manifest.

    The events of the removed stages are at the ends of the merged histories, and are removed from them.

    Args:
        stages: the number of stages that stay.
        directory: the directory of the shorter stream.
    """
    merges: list[dict[str, object]] = [dict(merge) for merge in stream.manifest.get(MERGED, [])]
    removed = range(stages, stream.stages)
    rows: dict[str, Sequence[int]] = {}
    for number in removed:
        rows |= _merged_at(stream, number)
    if not rows:
        return merges
    into, less = stream.merged_users, dict.fromkeys(rows, 0)
    # the current user of each user whose events are in a merged history
    everyone = {user: into.get(user, user) for user in (*rows, *into) if into.get(user, user) in rows}
    for number in removed:
        found = stream.rows_of(stage_file(number), everyone)
        for member, length in zip(found.users, found.current.lengths.tolist(), strict=True):
            less[everyone[member]] += length
        if rare_file(number) in stream.manifest["files"]:
            found = stream.rows_of(rare_file(number), everyone)
            for member, length in zip(found.users, found.previous.lengths.tolist(), strict=True):
                less[everyone[member]] += length
    left = {user: items[: max(0, len(items) - less[user])] for user, items in rows.items()}
    rows = {user: items for user, items in left.items() if items or user in into}
    path = directory / merged_file(stages - 1)
    _write(path, stages - 1, {**_merged_at(stream, stages - 1), **rows})
    return [{**merge, "stage": min(int(str(merge["stage"])), stages - 1)} for merge in merges]


def _merged_at(stream: Stream, number: int) -> dict[str, Sequence[int]]:
    """The merged histories that are stored beside a stage."""
    rows = [
        (user, items.tolist())
        for users in stream.merged_pieces(number)
        for user, items in zip(users.users, users.previous, strict=True)
    ]
    return dict(rows)


def _write(path: Path, number: int, rows: Mapping[str, Sequence[int]]) -> None:
    path.unlink(missing_ok=True)  # a link, whose target stays
    none = Ragged.of([] for _ in rows)
    pq.write_table(stage_table(Stage(number, list(rows), Ragged.of(rows.values()), none)), path)


def members_of(into: Mapping[str, str]) -> dict[str, list[str]]:
    """The users that were merged into each user, from :attr:`Stream.merged_users`."""
    members: dict[str, list[str]] = {}
    for before, now in into.items():
        members.setdefault(now, []).append(before)
    return members
