"""The current histories of users, for the server."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from peso.errors import PesoError, WorkspaceError
from peso.events.received import ReceivedEvents
from peso.runs.user_histories import UserHistories
from peso.runs.workspace import Workspace

log = logging.getLogger("peso.serving")


class LiveHistories:
    """The histories of a workspace's users: the stream and the events received since.

    Args:
        received: the events that this server stores; None: it is read-only, and reads the events that another
            server stores.
        trust: classes of custom strategies that may be imported.
    """

    def __init__(self, root: Path, received: ReceivedEvents | None, trust: Iterable[str] = ()) -> None:
        self.workspace = Workspace.open(root, trust)
        self._received = received
        self._refused = False
        self.users = UserHistories(self.workspace, events=self._open, background=True)

    def of(self, user: str) -> list[str] | None:
        """The item ids of a user's history, oldest first, with items without a semantic ID before all others;
        None if neither the log nor a received event has the user."""
        found = self.users.of(user)
        return None if found is None else [*found.left_out, *found.items]

    def prepare(self) -> None:
        """Read the stream now, so that the first answer does not wait for it."""
        try:
            self.users.renew()
        except (PesoError, OSError) as error:  # the first answer reports it
            log.error("histories cannot be read", extra={"fields": {"problem": str(error)}})

    def _open(self) -> ReceivedEvents | None:
        if self._received is None and not self._refused and self.workspace.events_file.is_file():
            try:
                self._received = ReceivedEvents(self.workspace.events_file)
            except WorkspaceError as error:  # for example a read-only directory, in which SQLite cannot work
                self._refused = True
                log.warning("received events are not read", extra={"fields": {"problem": str(error)}})
        return self._received
