"""The current histories of users: the items of the stream, followed by those of received events.

Received events that are already in a stage are ignored. A waiting event that is not newer than the stream's
last one is used only if its user did not have the item before, because the stream's log may contain it
already; it follows the items of the stream.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from peso.errors import PesoError
from peso.events.history_index import HistoryIndex, rests_on
from peso.events.merge import members_of
from peso.events.received import ReceivedEvent, ReceivedEvents
from peso.events.stream import Stream
from peso.items.names import ItemNames
from peso.runs.place import NAMES as NAMES_FILE
from peso.runtime.files import file_state
from peso.runtime.manifest import MANIFEST

if TYPE_CHECKING:
    from peso.runs.workspace import Workspace

log = logging.getLogger("peso.histories")

NAMES = 1_000  # users read together when only their names are needed
RECEIVED = "received"  # key of an append in the manifest: the cut and the file of events it came from


@dataclass(frozen=True)
class UserHistory:
    """The items of a user.

    Attributes:
        items: ids (those of the stream) of the items that have a semantic ID, oldest first.
        left_out: ids of the items without a semantic ID, oldest first; models cannot use them yet.
        received: number of items (of both kinds) that are not in a stage yet.
    """

    items: list[str]
    left_out: list[str]
    received: int = 0


def cuts_of(stream: Stream, log: str) -> list[str]:
    """Names of the cuts of a file of received events (``ReceivedEvents.id``) that are in a stream."""
    taken = [brought.get(RECEIVED, {}) for brought in stream.manifest.get("appended", [])]
    return [str(cut["cut"]) for cut in taken if cut.get("log") == log]


@dataclass(frozen=True)
class _State:
    """A snapshot of the stream with the index of its users."""

    stamp: tuple[object, ...]
    stream: Stream
    index: HistoryIndex
    last: int  # time of its last event, microseconds
    names: list[str]  # item ids by row
    known: frozenset[str]  # ids of items with a semantic ID
    renamed: ItemNames
    now: Mapping[str, str]  # merged user → the user it was merged into
    members: Mapping[str, Sequence[str]]  # the users that were merged into each of these


class UserHistories:
    """The histories of a workspace's users. Thread-safe.

    Args:
        through: histories as they were after this stage, without received events; None: current histories,
            which include every event for which :meth:`ReceivedEvents.add` has returned, in any process.
        until: use received events only up to this number; None: all.
        events: returns the received events, instead of the workspace's file.
        background: read a changed stream in a background thread, and use the previous snapshot meanwhile
            (received events are current in any case). False: the next call waits for it.
    """

    def __init__(
        self,
        workspace: Workspace,
        *,
        through: int | None = None,
        until: int | None = None,
        events: Callable[[], ReceivedEvents | None] | None = None,
        background: bool = False,
    ) -> None:
        self.workspace, self.through, self.until = workspace, through, until
        self._state: _State | None = None
        self._events: ReceivedEvents | None = None
        self._given, self._background = events, background
        self._renewing, self._opening = threading.Lock(), threading.Lock()

    def of(self, user: str) -> UserHistory | None:
        """The history of a user; None if neither the stream nor the received events have the user. A user
        that was merged into another one has the history of that one."""
        state = self._current()
        user = state.now.get(user, user)
        stored = state.index.of(user)
        waiting = self._waiting(user, state)
        if stored is None and not waiting:
            return None
        return _merged(state, [] if stored is None else stored.items.tolist(), waiting)

    def now(self, user: str) -> str:
        """The user that the given one was merged into; the given one if it was not merged."""
        return self._current().now.get(user, user)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of all users, in the order of :meth:`parts`."""
        return (user for users in self.parts(NAMES) for user, _ in users)

    def parts(self, size: int) -> Iterator[list[tuple[str, UserHistory]]]:
        """All users in batches of at most ``size``, in the order of their first occurrence in the stream; at
        the end, users that occur only in received events, by name."""
        state = self._current()
        for users in state.index.parts(size):
            yield [
                (user.name, _merged(state, user.items.tolist(), self._waiting(user.name, state)))
                for user in users
            ]
        if self.received is None:
            return
        last, joined = "", set[str]()  # merged users without events in the stream that are done
        while received := self.received.users_after(last, size):
            last = received[-1]
            names = [*dict.fromkeys(state.now.get(name, name) for name in received)]
            names = [name for name in names if name not in joined and state.index.of(name) is None]
            joined |= {name for name in names if name in state.members}
            found = [(name, self._waiting(name, state)) for name in names]
            if part := [(name, _merged(state, [], waiting)) for name, waiting in found if waiting]:
                yield part

    def named(self, prefix: str, after: str, limit: int) -> list[tuple[str, int]]:
        """One page of users by name, with the number of items of each.

        Args:
            prefix: only names with this prefix.
            after: the last name of the previous page; "" for the first page.
            limit: the number of users of a page.
        """
        state = self._current()
        found = dict(state.index.named(prefix, after, limit))
        if self.received is not None:
            for name in self.received.users_after(after, limit, prefix):
                if name not in state.now and (known := self.of(name)) is not None:
                    found[name] = len(known.items) + len(known.left_out)
        return sorted(found.items(), key=lambda user: user[0].encode("utf-8", "surrogatepass"))[:limit]

    def count(self) -> int:
        """Number of users in the stream."""
        return self._current().index.count()

    @property
    def fingerprint(self) -> list[str]:
        """Digests of the stream: histories with equal lists are equal."""
        return rests_on(self._current().stream, self.through)

    @property
    def received(self) -> ReceivedEvents | None:
        """The received events; None if there are none, or if ``through`` excludes them."""
        if self.through is not None:
            return None
        if self._given is not None:
            return self._given()
        if self._events is None and self.workspace.events_file.exists():
            with self._opening:
                self._events = self._events or ReceivedEvents(self.workspace.events_file)
        return self._events

    @property
    def is_current(self) -> bool:
        """Whether the stream has not changed since it was read."""
        return self._state is not None and self._state.stamp == self._stamp()

    def renew(self) -> None:
        """Read the stream and the index of its users again.

        Raises:
            WorkspaceError: there is no stream, or one of its files is damaged.
        """
        with self._renewing:
            if self.is_current:
                return
            workspace, stamp = self.workspace, self._stamp()
            stream = workspace.stream
            index = HistoryIndex.open(stream, workspace.histories_file, self.through)
            last = int(stream.manifest.get("time", {}).get("last", -1))
            known = frozenset(workspace.semantic_ids.stored_ids)
            every = self.through is None or self.through >= stream.stages - 1
            now = stream.merged_users if every else {}
            names = workspace.names
            state = _State(stamp, stream, index, last, stream.item_ids, known, names, now, members_of(now))
            self._state = state

    def _current(self) -> _State:
        if not self.is_current:
            if self._state is None or not self._background:
                self.renew()
            elif not self._renewing.locked():
                threading.Thread(target=self._renew_in_background, daemon=True).start()
        assert self._state is not None
        return self._state

    def _renew_in_background(self) -> None:
        try:
            self.renew()
        except PesoError as error:  # the next call tries again
            log.warning("the changed stream cannot be read yet", extra={"fields": {"problem": str(error)}})

    def _stamp(self) -> tuple[object, ...]:
        """The states of the manifests of stream and semantic IDs, and of the names of items."""
        workspace = self.workspace
        made = (workspace.stream_directory / MANIFEST, workspace.semantic_ids_directory / MANIFEST)
        return tuple(map(file_state, (*made, workspace.root / NAMES_FILE)))

    def _waiting(self, user: str, state: _State) -> list[ReceivedEvent]:
        """The received events of a user, and of users that were merged into this one, that are in no stage of
        the stream, oldest first."""
        events = self.received
        if events is None:
            return []
        cuts = cuts_of(state.stream, events.id)
        until, names = self.until, state.renamed
        own = [event for each in (user, *state.members.get(user, ())) for event in events.of_user(each)]
        return [
            replace(event, item=names.in_files(event.item))
            for event in sorted(own, key=lambda event: (event.time, event.number))
            if event.cut not in cuts and (until is None or event.number <= until)
        ]


def _merged(state: _State, rows: Sequence[int], waiting: Sequence[ReceivedEvent]) -> UserHistory:
    items = [state.names[row] for row in rows]
    stored, had = len(items), set(items) if waiting else set()
    for event in waiting:
        if event.time > state.last:
            items.append(event.item)
        elif event.item not in had:
            had.add(event.item)
            items.append(event.item)
    known = [item for item in items if item in state.known]
    left_out = [item for item in items if item not in state.known] if len(known) < len(items) else []
    return UserHistory(known, left_out, len(items) - stored)
