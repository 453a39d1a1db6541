"""The previous stage, for comparisons in the explorer: loaded on demand, freed when unused."""

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

KEPT = 300.0  # seconds after which an unused model is freed
State = Literal["ready", "loading", "failed", "none"]
log = logging.getLogger("peso.serving")


@dataclass(frozen=True)
class PreviousStage:
    """The previous stage.

    Attributes:
        stage: its number; None if there is none.
        state: whether its model is in memory.
        snapshot: the stage with its model; None if it is not in memory.
    """

    stage: int | None
    state: State
    snapshot: Snapshot | None = None


class StageBefore:
    """Loads and holds the model of the previous stage.

    Args:
        live: the serving stage. Its lock ensures that only one model is loaded at a time.
        kept: seconds after the last use at which the model is freed.
    """

    def __init__(self, live: LiveStage, kept: float = KEPT) -> None:
        self._live, self._kept = live, kept
        self._changed = threading.Condition()
        self._stopping = False
        self._wanted: Identity | None = None
        self._held: Snapshot | None = None
        self._used = self._failed = float("-inf")
        self._thread: threading.Thread | None = None

    def find(self) -> PreviousStage:
        """The previous stage. If its model is not in memory, loading starts in the background."""
        stage = self._stage()
        with self._changed:
            if stage is None:
                self._want(None)
                return PreviousStage(None, "none")
            self._want(identity(stage))
            self._used = time.monotonic()
            if self._held is not None:
                self._held = self._held.named(self._live.current.semantic_ids.names)
                return PreviousStage(stage.number, "ready", self._held)
            if time.monotonic() - self._failed < AGAIN:
                return PreviousStage(stage.number, "failed")
            if self._thread is None and not self._stopping:
                self._thread = threading.Thread(
                    target=self._hold, args=(stage,), name="peso stage before", daemon=True
                )
                self._thread.start()
            return PreviousStage(stage.number, "loading")

    def stop(self) -> None:
        """Free the model. A load in progress is not waited for; its thread ends with the process."""
        with self._changed:
            self._stopping = True
            self._want(None)

    def _want(self, wanted: Identity | None) -> None:
        """Set the wanted stage and free the model of any other; the caller holds the lock."""
        if wanted != self._wanted:
            self._wanted, self._held, self._failed = wanted, None, float("-inf")
            self._changed.notify_all()

    def _stage(self) -> RunStage | None:
        """The stage that served before; if there is none, the parent of the serving stage."""
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
        """Load the model, and hold it until it has been unused for a while or another stage is wanted."""
        wanted = identity(stage)
        try:
            snapshot = self._live.another(stage)
        except Exception as error:  # any error must not affect the serving stage
            log.error("the stage to compare with was not loaded", exc_info=error)
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
        gc.collect()  # modules have reference cycles
