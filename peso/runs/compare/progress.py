"""The progress of each run, baseline or set of tests, determined from its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peso.config.baselines import BaselineOptions
from peso.errors import WorkspaceError
from peso.runs.baselines import BaselineRun
from peso.runs.compare.plan import Candidate, Task
from peso.runs.place import CONFIG
from peso.runs.workspace import Workspace


@dataclass(frozen=True)
class TaskProgress:
    """The progress and the results of a task.

    Attributes:
        done: number of trained stages (tested, if evaluation is enabled); for ``transfer``: of tests.
        stages: total number; None: not known yet.
        hit, ndcg: at the largest k, averaged over the tested later stages; None: there are none.
    """

    done: int
    stages: int | None
    hit: float | None = None
    ndcg: float | None = None

    @property
    def complete(self) -> bool:
        return self.stages is not None and self.done >= self.stages


def progress_of(task: Task) -> TaskProgress:
    """Determine the progress of a task from its workspace.

    Raises:
        WorkspaceError: its files are damaged or were written by a newer version.
    """
    if not (task.root / CONFIG).is_file():
        return TaskProgress(0, _stages(task))
    workspace = task.workspace
    if task.kind == "transfer":
        return _transfer_progress(task, workspace)
    if task.baseline is not None:
        return _baseline_progress(task, workspace, task.baseline)
    done, tested = workspace.stages, task.config.evaluation.enabled
    if tested and task.last_stage != -1:
        done = [stage for stage in done if stage.is_tested]
    later = [stage.metrics["test"]["metrics"] for stage in done if stage.number and tested]
    return TaskProgress(len(done), _stages(task), *_means(later, max(task.config.evaluation.k)))


def _means(later: Sequence[Mapping[str, Any]], k: int) -> tuple[float | None, float | None]:
    """Hit and NDCG, averaged over the metrics of later stages."""

    def mean(name: str) -> float | None:
        return sum(metrics[name]["value"] for metrics in later) / len(later) if later else None

    return mean(f"hit@{k}"), mean(f"ndcg@{k}")


def pairs_across(stages: int) -> list[tuple[int, int]]:
    """All pairs (model after stage i, cases of stage j ≠ i), for forgetting and transfer."""
    return [(i, j) for i in range(stages) for j in range(stages) if i != j]


def _transfer_progress(task: Task, workspace: Workspace) -> TaskProgress:
    stages = _stages(task)
    if stages is None:
        return TaskProgress(0, None)
    pairs = pairs_across(stages)
    return TaskProgress(sum(workspace.stage(i).on(j).is_done for i, j in pairs), len(pairs))


def _baseline_progress(task: Task, workspace: Workspace, config: BaselineOptions) -> TaskProgress:
    if not data_ready(task):
        return TaskProgress(0, _stages(task))
    run = BaselineRun(workspace, config)
    done = [stage for stage in run.stages if run.is_done(stage)]
    k = max(task.config.evaluation.k)
    later = [metrics for stage in done if stage and f"hit@{k}" in (metrics := run.metrics(stage))]
    return TaskProgress(len(done), _stages(task), *_means(later, k))


def data_ready(task: Task) -> bool:
    """Whether the workspace of a task has its stream and semantic IDs."""
    workspace = task.workspace
    return workspace.has_stream and workspace.has_semantic_ids


def is_done(task: Task) -> bool:
    """Whether a task is complete."""
    if not data_ready(task):
        return False
    return task.last_stage == -1 or progress_of(task).complete


def open_needs(task: Task) -> tuple[Task | None, Task | None]:
    """The tasks for data and base from which a task still has to take over; None: nothing to take over."""
    data = None if data_ready(task) else task.data
    if task.base is None:
        return data, None
    if task.kind == "transfer":
        return data, None if is_done(task.base) else task.base
    taken = task.workspace.finished_stages
    enough = task.kind == "baseline" and len(taken) == _stages(task)
    return data, None if enough or (task.kind == "strategy" and 0 in taken) else task.base


def _stages(task: Task) -> int | None:
    if task.last_stage is not None:
        return task.last_stage + 1
    for source in (task, task.data):
        if source is not None and (workspace := source.workspace).has_stream:
            return workspace.stream.stages
    return None


def validation_loss(task: Task) -> float:
    """The validation loss of the best epoch, averaged over the stages 1 … T, in nats per target token.

    Raises:
        WorkspaceError: a stage was not trained, so it has no validation loss.
    """
    workspace = task.workspace
    losses = []
    for stage in workspace.stages[1:]:
        found = stage.training.get("validation_losses")
        if not found:
            raise WorkspaceError(
                f"{task.root} has no validation loss at stage {stage.number}: strategy "
                f"{task.config.strategy.name} does not train this stage, so it cannot be tuned"
            )
        losses.append(min(found))
    if not losses:
        raise WorkspaceError(
            f"{task.root} has no stage after stage 0, on which compare.tune compares options; set "
            "data.stages to 2 or more"
        )
    return sum(losses) / len(losses)


def choose(candidates: Sequence[Candidate]) -> Candidate:
    """The candidate whose trial has the lowest validation loss; the first of equal ones."""
    return min(candidates, key=lambda candidate: validation_loss(candidate.trial))
