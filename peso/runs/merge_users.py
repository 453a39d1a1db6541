"""`peso users merge`: the histories of two users become one (:mod:`peso.events.merge`).

The change is one rename of the stream's directory. From then on, the merged user's id stands for the other
user: in requests, in received events (also earlier ones), and in logs that are appended. Trained stages and
their tests stay as they were; the next stage begins with the merged history.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from peso.config import DataConfig
from peso.config.data import STREAMS
from peso.errors import DataError, PesoError
from peso.events.database import temporary_database
from peso.events.history_index import HistoryIndex
from peso.events.loading import load
from peso.events.merge import Events, events_of, first_merges, in_order, members_of, times_of, write_merged
from peso.events.received import ReceivedEvents
from peso.events.simulate import EVENTS_FILE
from peso.events.sources import open_source
from peso.events.stream import MERGED, Stream
from peso.runs.pairs import Pair
from peso.runs.preparation import aliases, logs_of
from peso.runs.workspace import Workspace
from peso.runtime.failures import listed
from peso.runtime.files import commit_directory
from peso.runtime.progress import Observer

Log = list[tuple[int, int]]  # time in microseconds and item number of the events of a user, oldest first


@dataclass(frozen=True)
class Merged:
    """What :func:`merge` does.

    Attributes:
        users: the merged users, and the user that each was merged into.
        same: users that were merged into the same user before.
        new: users that others are merged into, but that had no events themselves.
    """

    users: dict[str, str]
    same: list[str]
    new: list[str]


def plan(workspace: Workspace, pairs: Sequence[Pair]) -> Merged:
    """Check pairs of users to merge.

    Args:
        pairs: in each, the user to merge and the user to merge it into.

    Raises:
        DataError: a user to merge is unknown, was merged into another user before, or is merged into itself.
        WorkspaceError: there is no stream, or a file is damaged.
    """
    stream = workspace.stream
    into, known = dict(stream.merged_users), _known_users(workspace, stream)
    users, same, unknown = dict[str, str](), list[str](), list[str]()
    for before, named in pairs:
        after = into.get(named, named)
        if before in into:
            if into[before] != after:
                raise DataError(
                    f"user {before!r} was merged into {into[before]!r} before, and cannot be merged into "
                    f"{named!r}, too; if all three are the same person, merge {into[before]!r} into {named!r}"
                )
            same.append(before)
            continue
        if before == after:
            raise DataError(f"user {before!r} cannot be merged into {named!r}, which is the same user")
        odd = not after.isprintable() or after != after.strip()  # " anna" in a file; merges are final
        if not after or "\0" in after or (odd and not known(after)):
            raise DataError(
                f"{after!r} cannot be the id of a new user: an id has visible characters, without spaces "
                "around them; give the id in the log"
            )
        if not known(before):
            unknown.append(before)
        users[before] = after
        into = _one_more(into, before, after)
    if unknown:
        raise DataError(
            f"{len(unknown):,} of {len(pairs):,} users to merge have no event in {workspace.root}: "
            f"{listed(map(repr, unknown))}; check the ids (the user to merge comes first)"
        )
    new = [user for user in dict.fromkeys(into[each] for each in users) if not known(user)]
    return Merged(users, same, new)


def merge(workspace: Workspace, pairs: Sequence[Pair], observer: Observer) -> Merged:
    """Merge users; all pairs or none. The caller holds the workspace's lock.

    If a stage has events of several users that become one, their times are looked up in the logs and the
    received events. If the logs no longer exist, the events are in the order of the stages, and within a
    stage those of the user who is merged come first; the observer gets a note.

    Args:
        pairs: see :func:`plan`.

    Raises:
        DataError, WorkspaceError: as :func:`plan`, or the disk is full. Nothing is changed.
    """
    done = plan(workspace, pairs)
    if not done.users:
        return done
    stream = workspace.stream
    into = dict(stream.merged_users)
    for before, after in done.users.items():
        into = _one_more(into, before, after)
    members = members_of(into)
    groups = {user: [*members[user], user] for user in {into[each] for each in done.users}}
    everyone = {member for group in groups.values() for member in group}
    events = events_of(stream, everyone)
    mixed = {member for group in groups.values() if _overlap([events[m] for m in group]) for member in group}
    logs = _logs(workspace, mixed, observer) if mixed else {}
    begun = first_merges(stream)

    def joint(member: str) -> Log:
        return sorted(event for each in (member, *_merged_into(stream, member)) for event in logs[each])

    histories, unsure = dict[str, list[int]](), 0
    for user, group in groups.items():
        parts = [events[member] for member in group]
        times = [
            times_of(part, logs[member], joint(member), begun.get(member)) if member in mixed else part.stages
            for member, part in zip(group, parts, strict=True)
        ]
        unsure += any(time is None for time in times)
        histories[user] = in_order(parts, times)
    if unsure:
        observer.note(
            f"note: the logs no longer have the times of all events of {unsure:,} merged users. "
            "Their events are in the order of the stages; within a stage, those of the user who is merged "
            "come first"
        )
    with commit_directory(workspace.stream_directory) as directory:
        write_merged(stream, directory, list(done.users.items()), histories)
    return done


def _one_more(into: Mapping[str, str], before: str, after: str) -> dict[str, str]:
    """The current user of each merged user, after one more merge."""
    return {user: after if now == before else now for user, now in into.items()} | {before: after}


def _known_users(workspace: Workspace, stream: Stream) -> Callable[[str], bool]:
    """A function that says whether a user, or one that was merged into this one, has events in the stream or
    among the received events."""
    index = HistoryIndex.open(stream, workspace.histories_file)
    with_received = workspace.events_file.exists()

    def known(user: str) -> bool:
        if index.of(user) is not None:
            return True
        if not with_received:
            return False
        with ReceivedEvents(workspace.events_file) as received:
            return any(received.of_user(each) for each in (user, *_merged_into(stream, user)))

    return known


def _merged_into(stream: Stream, user: str) -> list[str]:
    """The users that were merged into a user before, directly or through others."""
    merges = stream.manifest.get(MERGED, [])
    found, waiting = list[str](), [user]
    while waiting:
        now = waiting.pop()
        own = [str(merge["from"]) for merge in merges if merge["into"] == now]
        found, waiting = found + own, waiting + own
    return found


def _overlap(parts: Sequence[Events]) -> bool:
    """Whether a stage has events of more than one of the users."""
    seen: set[int] = set()
    for part in parts:
        own = {*part.stages}
        if own & seen:
            return True
        seen |= own
    return False


def _logs(workspace: Workspace, users: Collection[str], observer: Observer) -> dict[str, Log]:
    """The events of users in all logs of the stream and among the received events."""
    found = {user: Log() for user in users}
    numbers = {item: number for number, item in enumerate(workspace.stream.item_ids)}
    stored = workspace.names.in_files
    for data in logs_of(workspace):
        if data.format == "simulate":
            data = DataConfig(format="parquet", path=str(workspace.stream_directory / EVENTS_FILE))
        if data.format in STREAMS or data.path is None:
            continue
        observer.begin(f"looking for the times of {len(users):,} users in {data.path}", 0, "")
        with suppress(PesoError):  # it no longer exists: then some times are missing
            for user, item, time in _events(workspace, data, users):
                found[user].append((time, numbers.get(item, -1)))
        observer.end()
    if workspace.events_file.exists():
        with ReceivedEvents(workspace.events_file) as received:
            for user in users:
                own = [(each.time, numbers.get(stored(each.item), -1)) for each in received.of_user(user)]
                found[user] += own
    for log in found.values():
        log.sort(key=lambda event: event[0])
    return found


def _events(workspace: Workspace, data: DataConfig, users: Collection[str]) -> list[tuple[str, str, int]]:
    """User, item and time of the events of users in a log, with the ids of the stream."""
    rated = data.min_rating is not None
    with TemporaryDirectory() as aside, temporary_database(Path(aside)) as connection:
        log = open_source(data).log
        load(connection, log, True, rated, aliases(workspace, with_users=False))
        if not log.timed:
            return []
        kept = " AND rating >= ?" if rated else ""
        kept += " AND kind IN (SELECT unnest(?))" if log.keep else ""
        values = [list(users), *([data.min_rating] if rated else []), *([list(log.keep)] if log.keep else [])]
        return connection.execute(
            "SELECT users.name, items.name, time FROM events JOIN users USING (u) JOIN items USING (i) "
            f"WHERE users.name IN (SELECT unnest(?)){kept} ORDER BY time, row",
            values,
        ).fetchall()
