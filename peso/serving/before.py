"""The stage that served before the current one, to compare with: loaded when asked for, freed when unused."""

from __future__ import annotations

import gc
import logging
import threading
import time
from dataclasses import dataclass
from typing import Literal

from peso.errors import WorkspaceError
from peso.runs.served import previous
from peso.runs.stage import RunStage
from peso.serving.live import AGAIN, LiveStage
from peso.serving.snapshot import Identity, Snapshot, identity

KEPT = 300.0  # seconds that an unused model stays in memory
State = Literal["ready", "loading", "failed", "none"]
log = logging.getLogger("peso.serving")


@dataclass(frozen=True)
class Found:
    """``stage``: its number, None: there is none. ``snapshot``: with its model, None: not ready."""

    stage: int | None
    state: State
    snapshot: Snapshot | None = None


class StageBefore:
    """
    Args:
        live: the stage that answers; models are loaded one after the other under its lock.
        kept: seconds that the model stays in memory after it was last asked for.
    """

    def __init__(self, live: LiveStage, kept: float = KEPT) -> None:
        self._live, self._kept = live, kept
        self._changed = threading.Condition()
        self._stopping = False
        self._wanted: Identity | None = None
        self._held: Snapshot | None = None
        self._used = self._failed = float("-inf")
        self._thread: threading.Thread | None = None

    def find(self) -> Found:
        """The stage as it stands; a model that is not in memory is loaded in the background."""
        stage = self._stage()
        with self._changed:
            if stage is None:
                self._want(None)
                return Found(None, "none")
            self._want(identity(stage))
            self._used = time.monotonic()
            if self._held is not None:
                return Found(stage.number, "ready", self._held)
            if time.monotonic() - self._failed < AGAIN:
                return Found(stage.number, "failed")
            if self._thread is None and not self._stopping:
                self._thread = threading.Thread(
                    target=self._hold, args=(stage,), name="peso stage before", daemon=True
                )
                self._thread.start()
            return Found(stage.number, "loading")

    def stop(self) -> None:
        """What is being loaded is left to end with the process."""
        with self._changed:
            self._stopping = True
            self._want(None)

    def _want(self, wanted: Identity | None) -> None:
        """Let go of the model of another stage; the caller holds the lock."""
        if wanted != self._wanted:
            self._wanted, self._held, self._failed = wanted, None, float("-inf")
            self._changed.notify_all()

    def _stage(self) -> RunStage | None:
        """The stage that served before; where none did, the parent of the one that answers."""
        workspace, current = self._live.workspace, self._live.current.stage
        try:
            number = None if self._live.pinned is not None else previous(workspace)
            if number is None or number == current:
                parent = workspace.stage(current).manifest.get("parent")
                number = None if parent is None else parent["stage"]
            if number is None or number not in workspace.finished_stages:
                return None
            stage = workspace.stage(number)
            return None if stage.pruned is not None else stage
        except WorkspaceError as error:
            log.error("no stage to compare with", extra={"fields": {"problem": str(error)}})
            return None

    def _hold(self, stage: RunStage) -> None:
        """Load the model, and keep it as long as it is asked for."""
        wanted = identity(stage)
        try:
            snapshot = self._live.another(stage)
        except Exception as error:  # whatever it is, the serving stage goes on
            log.error("stage to compare with not loaded", exc_info=error)
            with self._changed:
                self._thread = None
                if self._wanted == wanted:
                    self._failed = time.monotonic()
            return
        with self._changed:
            if self._wanted == wanted:
                self._held = snapshot
            del snapshot
            while self._wanted == wanted and (rest := self._used + self._kept - time.monotonic()) > 0:
                self._changed.wait(rest)
            if self._wanted == wanted:
                self._held = None
            self._thread = None
        gc.collect()  # modules refer to each other in circles
