"""One process of a comparison (:mod:`peso.runs.tasks`): it does one task in one workspace and reports its
progress. Exit status 0: done; 1: failed with an explained error; ``OUT_OF_TIME``: the time limit was reached.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from peso.config.baselines import read_baseline
from peso.runs import pipeline, preparation, reuse
from peso.runs.baselines import BaselineRun
from peso.runs.compare.progress import pairs_across
from peso.runs.evaluate import test
from peso.runs.tasks import do
from peso.runs.workspace import Workspace
from peso.runtime.failures import DONE

OUT_OF_TIME = 75
GRACE_SECONDS = 75.0  # longer than the time between two checkpoints
SECONDS_BETWEEN_REPORTS = 0.5


class OutOfTime(Exception):
    """The time limit was reached; the work so far is on disk."""


@dataclass(frozen=True)
class Job:
    """A :class:`peso.runs.compare.plan.Task`, JSON-serializable.

    ``deadline``: seconds since the epoch; ``trust``: see :meth:`peso.runs.workspace.Workspace.open`;
    ``patience``: seconds to wait for the lock of the workspace.
    """

    root: str
    last_stage: int | None
    data: str | None
    base: str | None
    kind: str
    baseline: dict[str, Any] | None
    deadline: float | None
    trust: Sequence[str] = ()
    patience: float = 0.0

    def as_json(self) -> str:
        return json.dumps(asdict(self))


class Reporter:
    """An observer (:mod:`peso.runtime.progress`) that writes progress as JSON lines, and stops the work after
    the deadline: training at its next checkpoint, anything else after ``GRACE_SECONDS``."""

    def __init__(self, workspace: Workspace, deadline: float | None, out: Any) -> None:
        self.workspace, self.deadline, self.out = workspace, deadline, out
        self._title, self._total, self._sent_at = "", 0, 0.0

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def begin(self, title: str, total: int, unit: str) -> None:
        self._title, self._total = title, total
        self._send(title=title, done=0, total=total)

    def advance(self, done: int, **figures: Any) -> None:
        now = time.time()
        if now - self._sent_at >= SECONDS_BETWEEN_REPORTS:
            self._sent_at = now
            self._send(title=self._title, done=done, total=self._total)
        if self.deadline is not None and now > self.deadline:
            late = now > self.deadline + GRACE_SECONDS
            if late or (self._title.startswith("learn") and self._checkpoint_time() > self.deadline):
                raise OutOfTime

    def end(self) -> None:
        self._title = ""

    def step(self, title: str) -> None:
        """Report the start of a step. Raises OutOfTime after the deadline."""
        if self.deadline is not None and time.time() > self.deadline:
            raise OutOfTime
        self._send(title=title, done=0, total=0)

    def _send(self, **values: Any) -> None:
        self.out.write(json.dumps(values) + "\n")
        self.out.flush()

    def _checkpoint_time(self) -> float:
        from peso.training.checkpoint import FILE as CHECKPOINT

        found = self.workspace.root.glob(f"stages/.*.unfinished/**/{CHECKPOINT}")
        return max((path.stat().st_mtime for path in found), default=0.0)


def work(job: Job, out: Any) -> None:
    """Do the missing steps of a job. The workspace must have its configuration.

    Raises:
        PesoError: as the steps of the pipeline.
        OutOfTime: the deadline has passed.
    """
    workspace = Workspace.open(job.root, job.trust)
    reporter = Reporter(workspace, job.deadline, out)
    with workspace.lock(job.patience):
        if job.kind == "transfer":
            _test_across(workspace, reporter)
            return
        if job.data is None:
            if not workspace.has_stream:
                reporter.step("ingest")
                preparation.ingest(workspace, reporter)
            if not workspace.has_semantic_ids:
                reporter.step("tokenize")
                preparation.tokenize(workspace, reporter)
        elif not workspace.has_semantic_ids:
            reuse.take_data(workspace, Workspace.open(job.data), reporter)
        if job.last_stage != -1:
            pipeline.require_catalogue(workspace)
        if job.base is not None:
            reuse.take_base(workspace, Workspace.open(job.base), reporter)
        if job.baseline is not None:
            _run_baseline(workspace, job.baseline, reporter)
            return
        for step in list(pipeline.missing_steps(workspace, workspace.stream.stages)):
            if step.stage is None or (job.last_stage is not None and step.stage > job.last_stage):
                continue
            reporter.step(str(step))
            stage = workspace.stage(step.stage)
            if step.name == "learn":
                pipeline.learn(stage, reporter)
            else:
                test(stage.on(step.stage), reporter)


def _test_across(workspace: Workspace, reporter: Reporter) -> None:
    """Test every stage's model on the cases of the other stages."""
    for stage, on in pairs_across(workspace.stream.stages):
        wanted = workspace.stage(stage).on(on)
        if not wanted.is_done:
            reporter.step(f"test stage {stage} on stage {on}")
            test(wanted, reporter)


def _run_baseline(workspace: Workspace, options: dict[str, Any], reporter: Reporter) -> None:
    run = BaselineRun(workspace, read_baseline(options))
    run.prepare(reporter)
    for stage in run.missing():
        reporter.step(f"stage {stage}")
        run.learn_and_test(stage, reporter)


def main() -> int:
    def task(job: dict[str, Any], out: Any) -> int:
        try:
            work(Job(**job), out)
        except OutOfTime:
            return OUT_OF_TIME
        return DONE

    return do(task)


if __name__ == "__main__":
    sys.exit(main())
