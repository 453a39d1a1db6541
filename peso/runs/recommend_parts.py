"""Recommendations for all users by several processes, on this machine or on a cluster.

Each process computes every n-th batch of users. If one dies, another one continues with what is missing.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from peso.config.executors import AnyExecutor, ProcessesConfig, read_executor
from peso.errors import ConfigError, PesoError
from peso.runs.executors import (
    POLL_SECONDS,
    Executor,
    Handle,
    LostWorker,
    Machine,
    end_all,
    open_executor,
    poll,
)
from peso.runs.recommend_all import AllUsers, DataState
from peso.runs.tasks import Call
from peso.runtime.failures import DONE, FAILED
from peso.runtime.progress import Observer

WORKER = "peso.runs.recommend_worker"
MOST = 10_000  # parts
RETRIES = 2  # how often a part is continued by another process
TICK_SECONDS = 0.5


@dataclass(frozen=True)
class Job:
    """The work of one process, JSON-serializable; see :class:`~peso.runs.recommend_all.AllUsers` and
    :class:`~peso.runs.recommender.Recommender`.

    ``folder``: of the batches; ``share``: see :meth:`~peso.runs.recommend_all.AllUsers.compute`.
    """

    root: str
    trust: Sequence[str]
    stage: int
    live: bool
    device: str | None
    hybrid: str | None
    k: int
    exclude_seen: bool
    part: Sequence[int]
    at_once: int
    folder: str
    determined_by: str
    until: int
    share: Sequence[int]


@dataclass
class Part:
    """A part of the work. ``died``: how often its process did."""

    number: int
    call: Call
    slot: int = 0
    handle: Handle | None = None
    died: int = 0


@dataclass(frozen=True)
class Parts:
    """Computes batches of users in other processes.

    Args:
        executor: where the processes run.
        count: the number of parts; None: as many as the executor has room for. There are never more than
            batches.
    """

    all_users: AllUsers
    executor: AnyExecutor
    count: int | None = None

    def __call__(self, folder: Path, state: DataState, users: int, observer: Observer) -> None:
        """Compute all batches.

        Args:
            folder: the folder of the batches.
            state: the state of the data to use.
            users: the approximate number of users.

        Raises:
            PesoError: the executor cannot be used, a part failed with an error, or its process died more than
                ``RETRIES`` times. Finished batches stay.
        """
        folder = folder.resolve()
        batches = max(1, math.ceil(users / self.all_users.at_once))
        asked = None if self.count is None else min(self.count, batches)
        with closing(self._opened(asked, folder)) as executor:
            count = asked or min(executor.workers, batches)
            observer.note(
                f"{count} {'part' if count == 1 else 'parts'}, up to {min(count, executor.workers)} at once "
                f"({self.executor.name}); batches of {self.all_users.at_once} users"
            )
            parts = []
            for n in range(1, count + 1):
                files = folder / f"part-{n}.log", folder / f"part-{n}.progress"
                parts.append(Part(n, Call(WORKER, self._job(folder, state, (n, count)), *files)))
            observer.begin("recommend", users, "users")
            _Work(parts, executor, lambda: min(users, self._answered(folder)), observer).run()
            observer.end()

    def _answered(self, folder: Path) -> int:
        return self.all_users.at_once * sum(1 for _ in folder.glob("[0-9]*.parquet"))

    def _opened(self, asked: int | None, folder: Path) -> Executor:
        recommender = self.all_users.recommender
        device = recommender.device or recommender.workspace.config.training.device
        workers: int | Literal["auto"] = asked or "auto"
        if asked and isinstance(self.executor, ProcessesConfig):
            workers = min(asked, Machine.of("auto", device).workers)
        return open_executor(self.executor, workers, device, folder / "slurm")

    def _job(self, folder: Path, state: DataState, share: tuple[int, int]) -> str:
        all_users, recommender = self.all_users, self.all_users.recommender
        job = Job(
            root=str(recommender.workspace.root.resolve()),
            trust=sorted(recommender.workspace.trusted),
            stage=recommender.stage,
            live=recommender.live,
            device=recommender.device,
            hybrid=None if recommender.hybrid is None else recommender.hybrid.label,
            k=all_users.k,
            exclude_seen=all_users.exclude_seen,
            part=all_users.part,
            at_once=all_users.at_once,
            folder=str(folder),
            determined_by=state.determined_by,
            until=state.until,
            share=share,
        )
        return json.dumps(asdict(job))


def parts_of(
    all_users: AllUsers, executor: str | Mapping[str, Any] | None, count: int | None
) -> Parts | None:
    """Which processes compute the batches of a call; None: this process alone.

    Args:
        executor, count: ``executor`` and ``parts`` of :meth:`Recommender.recommend_all`.

    Raises:
        ConfigError: the executor or the number is not valid.
    """
    if executor is None and count is None:
        return None
    if count is not None and not 1 <= count <= MOST:
        raise ConfigError(f"parts must be a number from 1 to {MOST:,}, not {count}")
    return Parts(all_users, read_executor(executor or "processes"), count)


class _Work:
    """Runs parts until all are done."""

    def __init__(
        self, parts: Sequence[Part], executor: Executor, answered: Callable[[], int], observer: Observer
    ) -> None:
        self.parts, self.waiting, self.working = parts, list(parts), list[Part]()
        self.executor, self.answered, self.observer = executor, answered, observer
        self.message = ""  # why it failed

    def run(self) -> None:
        told = 0.0
        try:
            while self.waiting or self.working:
                while self.waiting and len(self.working) < self.executor.workers:
                    self._start(self.waiting.pop(0))
                for part in list(self.working):
                    assert part.handle is not None
                    if (status := poll(part.handle)) is not None:
                        self.working.remove(part)
                        self._finish(part, status)
                if time.monotonic() - told > TICK_SECONDS:
                    told = time.monotonic()
                    self.observer.advance(self.answered())
                time.sleep(POLL_SECONDS)
        finally:
            end_all([part.handle for part in self.working if part.handle is not None])
            for part in self.parts:
                if str(part.call.log) not in self.message:
                    part.call.log.unlink(missing_ok=True)

    def _start(self, part: Part) -> None:
        part.slot = min(set(range(self.executor.workers)) - {other.slot for other in self.working})
        part.handle = self.executor.start(part.call, part.slot)
        self.working.append(part)

    def _finish(self, part: Part, status: int | LostWorker) -> None:
        if status == DONE:
            return
        name = f"part {part.number} of {len(self.parts)}"
        cause = (
            part.call.explained(status)
            if isinstance(status, int)
            else f"its machine or process was lost: {status}"
        )
        part.died += 1
        if status == FAILED:
            self.message = f"{name}: {cause}"
        elif part.died > RETRIES:
            self.message = (
                f"{name} died {part.died} times; the last time: {cause}; run the same command again to "
                "continue"
            )
        if self.message:
            raise PesoError(self.message)
        self.observer.note(f"{name} is continued by another process ({cause})")
        self.waiting.insert(0, part)
