"""A user's items as they are known now: those of the stream, then those received since.

The stream wins: an event that a cut has taken into a stage counts there. Of what is still waiting, an event
that is not newer than the stream's last one counts only if its user did not have its item before, since the
log that the stream was made of may hold it already. It comes after what the stream has.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peso.errors import PesoError
from peso.events.history_index import HistoryIndex, rests_on
from peso.events.received import ReceivedEvent, ReceivedEvents
from peso.events.stream import Stream
from peso.runtime.manifest import MANIFEST

if TYPE_CHECKING:
    from peso.runs.workspace import Workspace

log = logging.getLogger("peso.histories")

NAMES = 1_000  # users that are held in memory together where only their names count
RECEIVED = "received"  # in the manifest's entry of an append: which cut of which file of events it holds


@dataclass(frozen=True)
class UserHistory:
    """What a user did.

    Attributes:
        items: ids, oldest first, of the items that have a semantic ID.
        left_out: ids of the others, oldest first, which no model can read yet.
        received: how many of both are not in a stage yet.
    """

    items: list[str]
    left_out: list[str]
    received: int = 0


def cuts_of(stream: Stream, log: str) -> list[str]:
    """Names of the cuts that a stream holds of a file of received events (``ReceivedEvents.id``)."""
    taken = [brought.get(RECEIVED, {}) for brought in stream.manifest.get("appended", [])]
    return [str(cut["cut"]) for cut in taken if cut.get("log") == log]


@dataclass(frozen=True)
class _State:
    """A stream as it was at one moment, with its users."""

    stamp: tuple[int, ...]
    stream: Stream
    index: HistoryIndex
    last: int  # microseconds: when its last event was
    names: list[str]  # of its items
    known: frozenset[str]  # those that have a semantic ID


class UserHistories:
    """The histories of a workspace's users. For several threads.

    Args:
        through: as they were after this stage, without what was received; None: as they are now. Then an
            event that :meth:`ReceivedEvents.add` has returned for is in the next answer, whichever process
            stored it.
        until: of what was received only the events up to this number; None: all.
        events: gives the received events instead of the workspace's file, which is opened as soon as it is
            there.
        background: whether a stream that has changed is read by a thread of its own, while answers come from
            what was there before. Received events count at once all the same. False: the next answer waits
            for it.
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
        """What one user did; None: neither the stream nor the received events have that one."""
        state = self._current()
        stored = state.index.of(user)
        waiting = self._waiting(user, state)
        if stored is None and not waiting:
            return None
        return _merged(state, [] if stored is None else stored.items.tolist(), waiting)

    def __iter__(self) -> Iterator[str]:
        """The names of all users, in the order of :meth:`parts`."""
        return (user for users in self.parts(NAMES) for user, _ in users)

    def parts(self, size: int) -> Iterator[list[tuple[str, UserHistory]]]:
        """Every user, ``size`` at a time, in the order in which they first occur in the stream; at the end
        those who are only in the received events, by name."""
        state = self._current()
        for users in state.index.parts(size):
            yield [
                (user.name, _merged(state, user.items.tolist(), self._waiting(user.name, state)))
                for user in users
            ]
        if self.received is None:
            return
        last = ""
        while names := self.received.users_after(last, size):
            last = names[-1]
            found = [(name, self._waiting(name, state)) for name in names if state.index.of(name) is None]
            if part := [(name, _merged(state, [], waiting)) for name, waiting in found if waiting]:
                yield part

    def named(self, prefix: str, after: str, limit: int) -> list[tuple[str, int]]:
        """The next users whose names begin with ``prefix``, in the order of their names, and how many items
        each of them has. ``after``: the last name of the page before, "" for the first page."""
        state = self._current()
        found = dict(state.index.named(prefix, after, limit))
        if self.received is not None:
            for name in self.received.users_after(after, limit, prefix):
                if (known := self.of(name)) is not None:
                    found[name] = len(known.items) + len(known.left_out)
        return sorted(found.items(), key=lambda user: user[0].encode("utf-8", "surrogatepass"))[:limit]

    def count(self) -> int:
        """How many users the stream has."""
        return self._current().index.count()

    @property
    def fingerprint(self) -> list[str]:
        """What the histories of the stream rest on: equal lists, equal histories."""
        return rests_on(self._current().stream, self.through)

    @property
    def received(self) -> ReceivedEvents | None:
        """The received events; None where there are none, or where they do not count."""
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
        """Whether the stream is still the one that was read."""
        return self._state is not None and self._state.stamp == self._stamp()

    def renew(self) -> None:
        """Read the stream as it is now, and its users.

        Raises:
            WorkspaceError: there is no stream, or a file of it is damaged.
        """
        with self._renewing:
            if self.is_current:
                return
            workspace, stamp = self.workspace, self._stamp()
            stream = workspace.stream
            index = HistoryIndex.open(stream, workspace.histories_file, self.through)
            last = int(stream.manifest.get("time", {}).get("last", -1))
            known = frozenset(workspace.semantic_ids.item_ids)
            self._state = _State(stamp, stream, index, last, stream.item_ids, known)

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
        except PesoError as error:  # tried again at the next question; what was there before still holds
            log.warning("the changed stream is not read yet", extra={"fields": {"problem": str(error)}})

    def _stamp(self) -> tuple[int, ...]:
        """When the manifests of the stream and of the semantic IDs were written."""
        stamp: list[int] = []
        for directory in (self.workspace.stream_directory, self.workspace.semantic_ids_directory):
            try:
                found = (directory / MANIFEST).stat()
                stamp += [found.st_ino, found.st_mtime_ns]
            except FileNotFoundError:  # being put in place
                stamp += [0, 0]
        return tuple(stamp)

    def _waiting(self, user: str, state: _State) -> list[ReceivedEvent]:
        """A user's received events that no stage of the stream has taken, oldest first."""
        events = self.received
        if events is None:
            return []
        cuts = cuts_of(state.stream, events.id)
        until = self.until
        return [
            event
            for event in events.of_user(user)
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
