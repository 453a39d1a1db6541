"""One process of recommendations for all users (:mod:`peso.runs.tasks`): it computes its share of the
batches."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from peso.errors import WorkspaceError
from peso.runs.recommend_all import AllUsers, DataState
from peso.runs.recommend_parts import Job
from peso.runs.recommender import Recommender
from peso.runs.tasks import do
from peso.runs.workspace import Workspace
from peso.runtime.failures import DONE
from peso.runtime.progress import Silent


def work(job: Job) -> None:
    """Compute the batches of a job.

    Raises:
        WorkspaceError: the workspace has changed since the call began.
    """
    workspace = Workspace.open(job.root, job.trust)
    recommender = Recommender(workspace, job.stage, job.device, live=job.live, hybrid=job.hybrid)
    all_users = AllUsers(recommender, job.k, job.exclude_seen, (job.part[0], job.part[1]), job.at_once)
    state = DataState(job.determined_by, job.until)
    if all_users.determined_by != state.determined_by:
        raise WorkspaceError(f"{job.root} has changed since the call began; run the same command again")
    all_users.compute(Path(job.folder), state, Silent(), (job.share[0], job.share[1]))


def main() -> int:
    def task(job: dict[str, Any], out: Any) -> int:
        work(Job(**job))
        return DONE

    return do(task)


if __name__ == "__main__":
    sys.exit(main())
