"""What a user has had: the stream, and the events received since."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from peso.errors import WorkspaceError
from peso.events.received import ReceivedEvents
from peso.runs.recommender import Recommender
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
        self._stored = Recommender(self.workspace)

    def of(self, user: str) -> list[str] | None:
        """Item ids, oldest first; None where neither the log nor a received event names the user."""
        rows = self._stored.histories.get(user)
        since = [] if (received := self._open()) is None else [each.item for each in received.of_user(user)]
        if rows is None:
            return since or None
        ids = self._stored.semantic_ids.item_ids
        return [*(ids[row] for row in rows), *since]

    def _open(self) -> ReceivedEvents | None:
        if self._received is None and not self._refused and self.workspace.events_file.is_file():
            try:
                self._received = ReceivedEvents(self.workspace.events_file)
            except WorkspaceError as error:  # SQLite itself needs to write beside the file
                self._refused = True
                log.warning("received events are not read", extra={"fields": {"problem": str(error)}})
        return self._received
