"""Runs the tasks of a comparison in parallel processes, each as soon as the tasks it needs are done.

If a process dies, only its own run fails; the next call continues from its files.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from peso.errors import PesoError
from peso.runs.compare.plan import Plan, Run, Task
from peso.runs.compare.progress import TaskProgress, choose, is_done, open_needs, progress_of
from peso.runs.compare.worker import GRACE_SECONDS, OUT_OF_TIME, Job
from peso.runs.workspace import Workspace
from peso.runtime.machine import NUMBER, SHARE

Key = tuple[Path, bool]  # of a task
State = Literal["waiting", "running", "done", "stopped", "failed"]
SHUTDOWN_SECONDS = 3.0  # less than the time this process has after a SIGTERM
TICK_SECONDS = 0.5
LAST_LINES = 5


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
    process: subprocess.Popen[str]
    log: Path
    began: float
    done_before: int
    title: str = ""
    fraction: float = 0.0
    events: list[str] = field(default_factory=list)


class Schedule:
    """Runs a plan.

    Args:
        plan: the plan.
        workers: number of parallel processes.
        environment: returns the additional environment variables of the process in a slot.
        deadline: seconds since the epoch after which nothing is started; None: no limit.
        watch: called with all rows after every change.
    """

    def __init__(
        self,
        plan: Plan,
        workers: int,
        environment: Callable[[int], Mapping[str, str]],
        deadline: float | None = None,
        watch: Callable[[Sequence[Row]], None] = lambda rows: None,
    ) -> None:
        self.plan, self.workers, self.environment = plan, workers, environment
        self.deadline, self.watch = deadline, watch
        self.rows = [Row(run, "waiting", progress_of(run.task)) for run in plan.all]
        self._done: dict[Key, bool] = {}  # read from disk once; later only our own processes change it
        self._failed: dict[Key, str] = {}
        self._working: dict[Key, _Process] = {}
        self._events: queue.Queue[tuple[Key, str | None]] = queue.Queue()

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
        while len(self._working) < self.workers and not self._out_of_time():
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
        """Update the rows."""
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
        try:
            Workspace.create_or_open(task.root, task.config)
        except PesoError as error:
            self._failed[task.key] = str(error)
            return
        log = self.plan.root / "logs" / f"{'-'.join(Path(self._name(task)).parts)}.log"
        log.parent.mkdir(exist_ok=True)
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
        )
        slot = min(set(range(self.workers)) - {process.slot for process in self._working.values()})
        with log.open("a", encoding="utf-8") as written:
            process = subprocess.Popen(
                [sys.executable, "-m", "peso.runs.compare.worker", job.as_json()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=written,
                text=True,
                env={**os.environ, **self.environment(slot)},
                start_new_session=True,  # so that Ctrl-C reaches only this process, which ends the others
            )
        done = progress_of(task).done
        self._working[task.key] = _Process(task, slot, process, log, time.monotonic(), done)
        threading.Thread(target=self._read, args=(task.key, process), daemon=True).start()

    def _read(self, key: Key, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._events.put((key, line))
        self._events.put((key, None))

    def _process_messages(self) -> None:
        """Process messages of the workers for ``TICK_SECONDS``."""
        until = time.monotonic() + TICK_SECONDS
        while (left := until - time.monotonic()) > 0 and self._working:
            try:
                key, line = self._events.get(timeout=left)
            except queue.Empty:
                break
            if key not in self._working:
                continue  # ended by this process
            if line is None:
                self._finish(self._working.pop(key))
                break
            self._handle(self._working[key], json.loads(line))
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

    def _finish(self, working: _Process) -> None:
        status = working.process.wait()
        if status == 0 and is_done(working.task):
            self._done[working.task.key] = True
        elif status != OUT_OF_TIME:
            self._failed[working.task.key] = _explained(status, working.log)

    def _end_all(self) -> None:
        for working in self._working.values():
            working.process.terminate()
        until = time.monotonic() + SHUTDOWN_SECONDS
        for working in self._working.values():
            try:
                working.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                working.process.kill()
                working.process.wait()
        self._working.clear()


def _all_needs(task: Task) -> list[Task]:
    return [found for need in task.needs for found in (need, *_all_needs(need))]


def _explained(status: int, log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
    if status == 1 and lines and lines[-1].startswith("error: "):
        return lines[-1].removeprefix("error: ")
    how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    return f"{how}; last lines of {log}: {' | '.join(lines) or 'none'}"


THREADS = (NUMBER, "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Machine:
    """``workers`` processes with ``threads`` threads each; ``devices``: CUDA names of GPUs, empty on a
    CPU."""

    workers: int
    threads: int
    devices: tuple[str, ...] = ()

    @classmethod
    def of(cls, workers: int | Literal["auto"], device: str) -> Machine:
        """Choose processes and threads for this machine: with ``auto``, one process per usable GPU, else one
        per core. Each gets an equal share of the cores as threads, limited by OMP_NUM_THREADS.

        Args:
            workers: number of processes, or ``auto``.
            device: the setting `training.device`.
        """
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        devices = _devices() if device in ("auto", "cuda") else ()
        count = (len(devices) or cores) if workers == "auto" else workers
        asked = os.environ.get(NUMBER, "")
        most = int(asked) if asked.isdecimal() and int(asked) else cores
        return cls(count, max(1, min(most, cores // count)), devices)

    def environment(self, slot: int) -> Mapping[str, str]:
        """The environment variables of the process in a slot (0 … workers − 1)."""
        result = {name: str(self.threads) for name in THREADS}
        if not os.environ.get(NUMBER):
            result[SHARE] = "at most"
        if self.devices:
            result["CUDA_VISIBLE_DEVICES"] = self.devices[slot % len(self.devices)]
        return result


def _devices() -> tuple[str, ...]:
    import torch

    if not torch.cuda.is_available():
        return ()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(visible.split(",")) if visible else tuple(str(n) for n in range(torch.cuda.device_count()))
