"""Which options a strategy gets: those of the lowest validation loss, and nothing else is looked at.

Knows the training figures of a finished trial; knows no test case.
"""

from __future__ import annotations

from collections.abc import Sequence

from peso.compare.plan import Candidate, Task
from peso.errors import WorkspaceError
from peso.runs.workspace import Workspace


def validation_loss(task: Task) -> float:
    """Of the epoch that was kept, averaged over the stages 1 … T: nats per target token.

    Raises:
        WorkspaceError: a stage was not learnt, so that it has none.
    """
    workspace = Workspace(task.root, task.config)
    losses = []
    for stage in (stage for stage in workspace.finished_stages if stage):
        found = workspace.metrics(stage)["training"].get("validation_losses")
        if not found:
            raise WorkspaceError(
                f"{task.root} has no validation loss at stage {stage}: strategy {task.config.strategy.name} "
                "learns nothing there and cannot be tuned"
            )
        losses.append(min(found))
    if not losses:
        raise WorkspaceError(f"{task.root} has no later stage to tune on")
    return sum(losses) / len(losses)


def choose(candidates: Sequence[Candidate]) -> Candidate:
    """The candidate whose trial has the lowest validation loss; the first of equals."""
    return min(candidates, key=lambda candidate: validation_loss(candidate.trial))
