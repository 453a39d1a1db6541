"""How far each run is, from its files alone.

Knows the files of a workspace; knows nothing of processes.
"""

from __future__ import annotations

from dataclasses import dataclass

from peso.compare.plan import Task
from peso.events.stream import Stream
from peso.testing import is_tested, read_metrics
from peso.workspace import Workspace


@dataclass(frozen=True)
class Standing:
    """Stages done (learnt, and tested where evaluation is on) of all there are (None: not known yet); Hit and
    NDCG at the largest k, averaged over the later stages that are tested (None: there is none)."""

    done: int
    stages: int | None
    hit: float | None = None
    ndcg: float | None = None

    @property
    def complete(self) -> bool:
        return self.stages is not None and self.done >= self.stages


def standing(task: Task) -> Standing:
    """Where a task's workspace stands.

    Raises:
        WorkspaceError: its files are damaged or were written by a newer version.
    """
    if not (task.root / "config.yaml").is_file():
        return Standing(0, _stages(task))
    workspace = Workspace(task.root, task.config)
    done = workspace.finished_stages
    if task.config.evaluation.enabled and task.last_stage != -1:
        done = [stage for stage in done if is_tested(workspace, stage, stage)]
    later = (
        [read_metrics(workspace, stage, stage)["test"]["metrics"] for stage in done if stage]
        if (task.config.evaluation.enabled)
        else []
    )
    k = max(task.config.evaluation.k)

    def mean(name: str) -> float | None:
        return sum(metrics[name]["value"] for metrics in later) / len(later) if later else None

    return Standing(len(done), _stages(task), mean(f"hit@{k}"), mean(f"ndcg@{k}"))


def data_ready(task: Task) -> bool:
    workspace = Workspace(task.root, task.config)
    return workspace.has_stream and workspace.has_semantic_ids


def is_done(task: Task) -> bool:
    """Whether nothing of a task is left to do."""
    if not data_ready(task):
        return False
    return task.last_stage == -1 or standing(task).complete


def open_needs(task: Task) -> tuple[Task | None, Task | None]:
    """Of what a task takes over, data and base, what it does not have yet."""
    workspace = Workspace(task.root, task.config)
    data = None if data_ready(task) else task.data
    return data, None if 0 in workspace.finished_stages else task.base


def _stages(task: Task) -> int | None:
    if task.last_stage is not None:
        return task.last_stage + 1
    for source in (task, task.data):
        if source is not None and (workspace := Workspace(source.root, source.config)).has_stream:
            return Stream.open(workspace.stream_directory).stages
    return None
