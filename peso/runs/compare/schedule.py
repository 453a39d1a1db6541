"""Runs the tasks of a comparison in parallel processes, each as soon as the tasks it needs are done.

If a process dies, only its own run fails; the next call continues from its files. If the machine of a process
is lost, the run continues on another one.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from peso.errors import PesoError
from peso.runs.compare.plan import Plan, Run, Task
from peso.runs.compare.progress import TaskProgress, choose, is_done, open_needs, progress_of
from peso.runs.compare.worker import GRACE_SECONDS, OUT_OF_TIME, Job
from peso.runs.executors import POLL_SECONDS, Executor, Handle, LostWorker, end_all, poll
from peso.runs.tasks import Call
from peso.runs.workspace import Workspace

Key = tuple[Path, bool]  # of a task
State = Literal["waiting", "running", "done", "stopped", "failed"]
TICK_SECONDS = 0.5
WORKER = "peso.runs.compare.worker"


@dataclass
class Row:
    """The state of a run. ``note``: its current step, or why it failed. ``seconds_left``: None: not known."""

    run: Run
    state: State
    progress: TaskProgress
    note: str = ""
    seconds_left: float | None = None


@dataclass
class _Process:
    """A running task and its process."""

    task: Task
    slot: int
    call: Call
    handle: Handle
    began: float
    done_before: int
    title: str = ""
    fraction: float = 0.0
    read: int = 0  # bytes of the progress file

    def messages(self) -> Iterator[Mapping[str, object]]:
        """New lines of the progress file."""
        with self.call.progress.open("rb") as file:
            file.seek(self.read)
            *lines, _ = file.read().split(b"\n")  # the last one is not complete yet
        for line in lines:
            self.read += len(line) + 1
            yield json.loads(line)


class Schedule:
    """Runs a plan.

    Args:
        executor: where the processes run.
        deadline: seconds since the epoch after which nothing is started; None: no limit.
        watch: called with all rows after every change.
    """

    def __init__(
        self,
        plan: Plan,
        executor: Executor,
        deadline: float | None = None,
        watch: Callable[[Sequence[Row]], None] = lambda rows: None,
    ) -> None:
        self.plan, self.executor = plan, executor
        self.deadline, self.watch = deadline, watch
        self.rows = [Row(run, "waiting", progress_of(run.task)) for run in plan.all]
        self._done: dict[Key, bool] = {}  # read from disk once; later only our own processes change it
        self._failed: dict[Key, str] = {}
        self._working: dict[Key, _Process] = {}
        self._lost = Counter[Key]()

    def run(self) -> list[Row]:
        """Run everything that can run, in the plan's order; returns the final state of every run.

        Raises:
            KeyboardInterrupt, SystemExit: Ctrl-C or SIGTERM; all processes are ended first.
        """
        try:
            self._update_rows()
            self.watch(self.rows)
            while self._start_some() or self._working:
                self._process_messages()
                self._update_rows()
                self.watch(self.rows)
        finally:
            self._end_all()
        for row in self.rows:
            row.state = "stopped" if row.state in ("waiting", "running") else row.state
        self.watch(self.rows)
        return self.rows

    # -- what to do next ---------------------------------------------------------------------------

    def _start_some(self) -> bool:
        """Start tasks in the free slots; returns whether any was started."""
        started = False
        while len(self._working) < self.executor.workers and not self._out_of_time():
            task = next((task for row in self.rows if (task := self._next_of(row)) is not None), None)
            if task is None:
                break
            self._start(task)
            started = True
        return started

    def _next_of(self, row: Row) -> Task | None:
        """A task that a run needs and that can be started now."""
        if row.state in ("done", "failed"):
            return None
        if row.run.candidates:
            for candidate in row.run.candidates:
                if (task := self._startable(candidate.trial)) is not None:
                    return task
            return None
        return self._startable(row.run.task)

    def _startable(self, task: Task) -> Task | None:
        if task.key in self._working or task.key in self._failed or self._is_done(task):
            return None
        missing = [need for need in open_needs(task) if need is not None and not self._is_done(need)]
        if not missing:
            return task
        return next((found for need in missing if (found := self._startable(need)) is not None), None)

    def _is_done(self, task: Task) -> bool:
        if task.key not in self._done:
            self._done[task.key] = is_done(task)
        return self._done[task.key]

    def _update_rows(self) -> None:
        """Update state, note and remaining time of every row."""
        for row in self.rows:
            if row.state in ("done", "failed"):
                continue
            if row.run.candidates and all(self._is_done(c.trial) for c in row.run.candidates):
                row.run = row.run.with_choice(choose(row.run.candidates))
            working = self._working.get(row.run.task.key)
            failed = self._failure(row)
            if failed is not None:
                row.state, row.note, row.seconds_left = "failed", failed, None
            elif working is not None:
                row.state, row.note = "running", working.title
                row.seconds_left = self._seconds_left(working, row.progress)
            elif not row.run.candidates and self._is_done(row.run.task):
                row.state, row.note, row.seconds_left = "done", "", None
                row.progress = progress_of(row.run.task)
            else:
                busy = next((p for p in self._working.values() if p.task in self._ancestors(row)), None)
                row.state, row.seconds_left = "waiting", None
                row.note = "" if busy is None else f"for {self._name(busy.task)}: {busy.title}"

    def _ancestors(self, row: Row) -> list[Task]:
        tasks = [c.trial for c in row.run.candidates] or [row.run.task]
        return [need for task in tasks for need in (task, *_all_needs(task))]

    def _failure(self, row: Row) -> str | None:
        for task in self._ancestors(row):
            if task.key in self._failed:
                own = task.key == row.run.task.key
                return self._failed[task.key] if own else f"{self._name(task)}: {self._failed[task.key]}"
        return None

    def _name(self, task: Task) -> str:
        """The name of a task, which is also that of its log: its path in the comparison."""
        return str(task.root.relative_to(self.plan.root)) + ("/transfer" if task.kind == "transfer" else "")

    def _out_of_time(self) -> bool:
        return self.deadline is not None and time.time() > self.deadline

    @staticmethod
    def _seconds_left(working: _Process, now: TaskProgress) -> float | None:
        if now.stages is None:
            return None
        done = now.done - working.done_before + working.fraction
        if done < 0.05:
            return None
        return (time.monotonic() - working.began) / done * (now.stages - now.done - working.fraction)

    # -- processes ---------------------------------------------------------------------------------

    def _start(self, task: Task) -> None:
        if not self._lost[task.key]:  # else the lost process may still hold the workspace's lock
            try:
                Workspace.create_or_open(task.root, task.config)
            except PesoError as error:
                self._failed[task.key] = str(error)
                return
        name = "-".join(Path(self._name(task)).parts)
        logs = self.plan.root.resolve() / "logs"
        logs.mkdir(exist_ok=True)
        data, base = (None if need is None else str(need.root) for need in open_needs(task))
        options = None if task.baseline is None else task.baseline.model_dump(mode="json")
        job = Job(
            str(task.root),
            task.last_stage,
            data,
            base,
            task.kind,
            options,
            self.deadline,
            task.config.strategy.foreign,
            self.executor.patience,
        )
        call = Call(WORKER, job.as_json(), logs / f"{name}.log", logs / f"{name}.progress")
        call.progress.unlink(missing_ok=True)
        slot = min(set(range(self.executor.workers)) - {process.slot for process in self._working.values()})
        handle, done = self.executor.start(call, slot), progress_of(task).done
        self._working[task.key] = _Process(task, slot, call, handle, time.monotonic(), done)

    def _process_messages(self) -> None:
        """Process messages of the workers for ``TICK_SECONDS``, or until one ends."""
        until = time.monotonic() + TICK_SECONDS
        while self._working:
            ended = {
                key: status for key, p in self._working.items() if (status := poll(p.handle)) is not None
            }
            for working in self._working.values():
                for message in working.messages() if working.call.progress.exists() else ():
                    self._handle(working, message)
            for key, status in ended.items():
                self._finish(self._working.pop(key), status)
            if ended or time.monotonic() > until:
                break
            time.sleep(POLL_SECONDS)
        if self.deadline is not None and time.time() > self.deadline + 2 * GRACE_SECONDS:
            self._end_all()  # steps without checkpoints do not end by themselves

    def _handle(self, working: _Process, event: Mapping[str, object]) -> None:
        done, total = int(str(event["done"])), int(str(event["total"]))
        title = str(event["title"])
        if not total:  # a new step: the previous one is on disk
            for row in self.rows:
                if row.run.task.key == working.task.key:
                    row.progress = progress_of(row.run.task)
        learning = 0.8  # approximate share of a stage's time
        share = done / total if total else 0.0
        working.fraction = share * learning if title.startswith("learn") else learning * (total > 0)
        working.title = f"{title}, {share:.0%}" if total else title

    def _finish(self, working: _Process, status: int | LostWorker) -> None:
        key = working.task.key
        if isinstance(status, LostWorker):
            self._lost[key] += 1
            if self._lost[key] > self.plan.compare.retries:
                self._failed[key] = (
                    f"its machine or process was lost {self._lost[key]} times; the last time: {status}"
                )
        elif status == 0 and is_done(working.task):
            self._done[key] = True
        elif status != OUT_OF_TIME:
            self._failed[key] = working.call.explained(status)
        working.call.progress.unlink(missing_ok=True)

    def _end_all(self) -> None:
        end_all([working.handle for working in self._working.values()])
        self._working.clear()


def _all_needs(task: Task) -> list[Task]:
    return [found for need in task.needs for found in (need, *_all_needs(need))]
