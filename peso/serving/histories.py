"""What a user has had: the stream, and the events received since."""

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
    """
    Args:
        received: where this server stores events; None: it stores none, and reads those that another one
            stores.
    """

    def __init__(self, root: Path, received: ReceivedEvents | None, trust: Iterable[str] = ()) -> None:
        self.workspace = Workspace.open(root, trust)
        self._received = received
        self._refused = False
        self._users = UserHistories(self.workspace, events=self._open, background=True)

    def of(self, user: str) -> list[str] | None:
        """Item ids, oldest first, those that no model can read yet before all others; None where neither the
        log nor a received event names the user."""
        found = self._users.of(user)
        return None if found is None else [*found.left_out, *found.items]

    def named(self, prefix: str, after: str, limit: int) -> list[tuple[str, int]]:
        """See :meth:`UserHistories.named`."""
        return self._users.named(prefix, after, limit)

    def prepare(self) -> None:
        """Read the stream, which the first answer would wait for."""
        try:
            self._users.renew()
        except (PesoError, OSError) as error:  # that answer will say so
            log.error("histories cannot be read", extra={"fields": {"problem": str(error)}})

    def _open(self) -> ReceivedEvents | None:
        if self._received is None and not self._refused and self.workspace.events_file.is_file():
            try:
                self._received = ReceivedEvents(self.workspace.events_file)
            except WorkspaceError as error:  # SQLite itself needs to write beside the file
                self._refused = True
                log.warning("received events are not read", extra={"fields": {"problem": str(error)}})
        return self._received
