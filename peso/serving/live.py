"""The serving stage: loaded in the background, and replaced when another one is promoted."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from peso.errors import WorkspaceError
from peso.runs.hybrids import HybridAnswers, is_run
from peso.runs.place import NAMES, SERVED
from peso.runs.served import served, serving_stage
from peso.runs.stage import RunStage
from peso.runs.workspace import Workspace
from peso.runtime.files import file_state
from peso.serving.remembered import RememberedAnswers
from peso.serving.snapshot import Snapshot, identity

INTERVAL = 0.5  # seconds between two checks of the workspace
AGAIN = 30.0  # seconds until loading a stage is tried again after a failure, if nothing changes


class LiveStage:
    """Watches a workspace and holds the current snapshot.

    A new stage is loaded while the old one continues to answer, and then replaces it in one assignment. The
    engine reads the snapshot once per batch, so no answer mixes two stages, and the old model is freed after
    its last batch.

    Args:
        stage: a fixed stage; None: the promoted one, or the newest trained one if none was promoted.
        prompt_memory: bytes for the cached prompts of returning users; 0: no cache.
        remember: makes the memory of answers for a snapshot; None: answers are not kept.
        trust: classes of custom strategies that may be imported.
        hybrid: the hybrid that answers: its label, or ``hybrid`` if there is only one; None: the model alone.
        on_change: called with the snapshot of every stage that starts to serve.
        on_problem: called with the reason if a stage cannot be loaded. The old one continues to serve.
        renew: reads the histories of users again. It is called before the files of a changed workspace are
            read, so that no answer of the new snapshot rests on the history of a user who was erased since.

    Raises:
        PesoError: there is no such stage or hybrid, the hybrid was not run for the stage, or a file of the
            workspace is damaged.
    """

    def __init__(
        self,
        root: Path,
        *,
        stage: int | None = None,
        prompt_memory: int = 0,
        remember: Callable[[], RememberedAnswers] | None = None,
        trust: Iterable[str] = (),
        hybrid: str | None = None,
        on_change: Callable[[Snapshot], None] | None = None,
        on_problem: Callable[[str], None] | None = None,
        renew: Callable[[], None] | None = None,
    ) -> None:
        self.root, self.pinned = root, stage
        self._renew = renew
        self._prompt_memory, self._remember = prompt_memory, remember
        self._trust = tuple(trust)
        self._on_change, self._on_problem = on_change, on_problem
        self.problem: str | None = None
        self.lacks_hybrid: str | None = None  # why an earlier stage serves: the newest one has no hybrid yet
        self._seen: tuple[object, ...] | None = None
        self._stopping, self._loading = threading.Event(), threading.Lock()
        self.hybrid = hybrid
        self.current = Snapshot.of(self._stage_to_serve(), hybrid)
        if self.current.hybrid is not None:
            self.hybrid = self.current.hybrid.label  # unambiguous even if other hybrids are run later
        self._thread = threading.Thread(target=self._watch, name="peso stages", daemon=True)

    def start(self) -> None:
        """Load the model and watch the workspace, in a background thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop watching. A load in progress is not waited for; its thread ends with the process."""
        self._stopping.set()

    @property
    def is_ready(self) -> bool:
        """Whether the model is loaded."""
        return self.current.model is not None

    def refresh(self) -> None:
        """Load the stage that should serve now if it is another one, its catalog has changed, or it is not
        loaded yet. Otherwise only read titles, popularity and names of items again."""
        with self._loading:
            seen = self._fingerprint()  # a change while the files are read is for the next check
            if self._renew is not None:
                self._renew()
            self._refresh()
            self._seen = seen

    def _refresh(self) -> None:
        before = self.current
        wanted = self._stage_to_serve()
        hybrid = None if self.hybrid is None else HybridAnswers(self.workspace, self.hybrid, wanted.number)
        same = before.identity == identity(wanted, hybrid)
        if before.model is not None and same:
            self.problem = None
            # titles, popularity and names as they are now; a user may have been erased
            now = Snapshot.of(wanted, self.hybrid)
            self.current = replace(
                now,
                hybrid=before.hybrid,
                model=before.model,
                # not cleared but replaced: a batch that has begun may still keep a prompt of an old history
                prompts=None if before.prompts is None else before.prompts.emptied(),
                answers=None if self._remember is None else self._remember(),
                since=before.since,
            )
            return
        from peso.decoding.returning import PromptMemory

        remembers = self._prompt_memory and self.hybrid is None  # a hybrid always reads one window
        after = self._with_model(wanted, before if same else Snapshot.of(wanted, self.hybrid))
        after = replace(
            after,
            prompts=PromptMemory(self._prompt_memory) if remembers else None,
            answers=None if self._remember is None else self._remember(),
            since=datetime.now(UTC),
        )
        self.current = after
        self.problem = None
        del before
        gc.collect()  # modules have reference cycles
        if self._on_change is not None:
            self._on_change(after)

    def another(self, stage: RunStage) -> Snapshot:
        """A snapshot of another stage with its model; the serving stage does not change.

        Raises:
            PesoError: the stage cannot be loaded.
        """
        with self._loading:
            return self._with_model(stage, Snapshot.of(stage, self.hybrid))

    def _with_model(self, stage: RunStage, snapshot: Snapshot) -> Snapshot:
        from peso.model.inference import for_inference

        hybrid, catalog = snapshot.hybrid, snapshot.semantic_ids.stored_ids
        if hybrid is None:
            model = for_inference(stage.model(), packed=True)
        else:
            model = hybrid.models.llm
        if model.semantic_ids.stored_ids != catalog or (hybrid and hybrid.item_ids != catalog):
            raise WorkspaceError(f"the semantic IDs of {self.root} changed while they were read")
        return replace(snapshot, model=model)

    def _stage_to_serve(self) -> RunStage:
        self.workspace = Workspace.open(self.root, self._trust)
        if self.pinned is not None:
            return self.workspace.trained(self.pinned)
        stage = serving_stage(self.workspace)
        if self.hybrid is None or served(self.workspace).current is not None:
            self.lacks_hybrid = None
            return stage
        return self._newest_with_hybrid(self.hybrid, stage)

    def _newest_with_hybrid(self, hybrid: str, newest: RunStage) -> RunStage:
        """The newest stage for which the hybrid was run, if no stage was promoted. (`peso update` runs the
        hybrid some time after the training.) If there is none, the newest stage, which is then refused."""
        try:
            HybridAnswers(self.workspace, hybrid, newest.number)
        except WorkspaceError as error:
            for number in reversed(self.workspace.finished_stages):
                stage = self.workspace.stage(number)
                if stage.pruned is None and is_run(self.workspace, hybrid, number):
                    if self.lacks_hybrid != str(error) and self._on_problem is not None:
                        self._on_problem(str(error))
                    self.lacks_hybrid = str(error)
                    return stage
        self.lacks_hybrid = None
        return newest

    def _fingerprint(self) -> tuple[object, ...]:
        """Inodes, times and sizes that change when another stage should serve; fast to read."""
        names = (SERVED, NAMES, "stages", "semantic_ids", "stream", f"baselines/{self.hybrid or ''}")
        return tuple(file_state(self.root / name) for name in names)

    def _watch(self) -> None:
        pause, again = 0.0, 0.0
        while not self._stopping.wait(pause):
            pause = INTERVAL
            fingerprint = self._fingerprint()
            if fingerprint == self._seen and (self.problem is None or time.monotonic() < again):
                continue
            try:
                self.refresh()
            except Exception as error:  # any error: the old stage continues to serve
                again = time.monotonic() + (AGAIN if fingerprint == self._seen else 0.0)
                self._seen = fingerprint
                if self.problem != str(error) and self._on_problem is not None:
                    self._on_problem(str(error))
                self.problem = str(error)
