"""Dynamic batching: one thread answers the questions that have arrived, in one batch from one snapshot.

Questions that arrive while a batch is computed form the next one. After a batch of several requests, the
engine also waits a few milliseconds, because more requests are likely. A single request that follows a single
request does not wait.

When no question has waited for a while, the engine prepares the answers of users who are expected to ask, one
at a time and during at most a quarter of the time. So a question waits for at most one preparation, on
average for an eighth of one.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from peso.errors import DataError, PesoError
from peso.serving.messages import Answer
from peso.serving.snapshot import Question

Result = TypeVar("Result")
Answers = list[Answer | DataError]
QUIET = 0.02  # seconds without a question, and since the user was expected, before an answer is prepared
SHARE = 1 / 4  # largest share of the time that preparation takes
MOST_EXPECTED = 1_000  # users, the latest ones
log = logging.getLogger("peso.serving")
RECENT = 0.2  # weight of the newest batch in the running average of the time per question


class Overloaded(PesoError):
    """The queue is full.

    Args:
        seconds: estimated time until the queue has room.
    """

    def __init__(self, seconds: int) -> None:
        super().__init__(f"the server has too many waiting requests; try again in {seconds} s")
        self.seconds = seconds


@dataclass
class _Group:
    """The questions of one request, which are answered in the same batch, or other ``work`` with a model."""

    questions: Sequence[Question]
    arrived: float
    future: Future[Any] = field(default_factory=Future)
    work: Callable[[], Any] | None = None

    @property
    def size(self) -> int:
        return 1 if self.work is not None else len(self.questions)


class Engine:
    """A queue of questions, and the thread that answers them in batches.

    Args:
        answer: answers a batch of questions from one snapshot.
        wait: maximum seconds that a question waits for others, if the last batch had several requests.
        together: size of a batch at which the engine does not wait for more questions.
        most: maximum number of waiting questions; further ones are refused.
        on_batch: called after every batch with the number of questions and the seconds it took.
        prepare: prepares the answer of a user; None: nothing is prepared.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Question]], Answers],
        *,
        wait: float = 0.005,
        together: int = 32,
        most: int = 256,
        on_batch: Callable[[int, float], None] | None = None,
        prepare: Callable[[str], None] | None = None,
    ) -> None:
        self._answer, self._on_batch, self._prepare = answer, on_batch, prepare
        self._wait, self._together, self._most = wait, together, most
        self._groups: deque[_Group] = deque()
        self._questions = 0  # in the groups
        self._expected: OrderedDict[str, float] = OrderedDict()  # user → time, in the order of time
        self._quiet = 0.0  # time since which no question has waited
        self._rested = 0.0  # time from which the next answer may be prepared
        self._changed = threading.Condition()
        self._stopping = False
        self._seconds = 0.02  # running average of the time per question
        self._busy = False  # whether the last batch had several requests
        self._thread = threading.Thread(target=self._run, name="peso engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of questions that are not in a batch yet."""
        return self._questions

    def ask(self, questions: Sequence[Question]) -> Future[Answers]:
        """Queue the questions of one request; returns a future of the answers, all from one snapshot.

        Raises:
            Overloaded: too many questions are waiting.
        """
        return self._add(_Group(questions, time.monotonic()))

    def run(self, work: Callable[[], Result]) -> Future[Result]:
        """Queue other work with a model, which only the engine's thread may use; returns a future of its
        result.

        Raises:
            Overloaded: too many questions are waiting.
        """
        return self._add(_Group((), time.monotonic(), work=work))

    def expect(self, users: Iterable[str]) -> None:
        """Prepare the answers of these users when no question has waited for a while. If too many users are
        expected, those that were named first are left out."""
        if self._prepare is None:
            return
        with self._changed:
            for user in users:
                self._expected.pop(user, None)
                self._expected[user] = time.monotonic()
            while len(self._expected) > MOST_EXPECTED:
                self._expected.popitem(last=False)
            self._changed.notify()

    def _add(self, group: _Group) -> Future[Any]:
        with self._changed:
            if self._stopping or (self._groups and self._questions + group.size > self._most):
                raise Overloaded(max(1, math.ceil(self._questions * self._seconds)))
            self._groups.append(group)
            self._questions += group.size
            self._changed.notify()
        return group.future

    def stop(self) -> None:
        """Refuse new questions, and return when the waiting ones are answered."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next():
            if batch[0].work is not None:
                self._do(batch[0], batch[0].work)
                del batch
                continue
            started, count = time.monotonic(), sum(len(group.questions) for group in batch)
            try:
                answers = self._answer([each for group in batch for each in group.questions])
            except Exception:
                for group in batch:  # a single group may have caused the error
                    self._answer_alone(group)
                del group, batch
                continue
            took = time.monotonic() - started
            self._seconds += RECENT * (took / count - self._seconds)
            if self._on_batch is not None:
                self._on_batch(count, took)
            for group in batch:
                size = len(group.questions)
                group.future.set_result(answers[:size])
                answers = answers[size:]
            # while the thread sleeps, no variable may keep an old snapshot in memory
            del answers, group, batch

    def _do(self, group: _Group, work: Callable[[], Any]) -> None:
        try:
            group.future.set_result(work())
        except Exception as error:
            group.future.set_exception(error)

    def _answer_alone(self, group: _Group) -> None:
        try:
            group.future.set_result(self._answer(group.questions))
        except Exception as error:
            group.future.set_exception(error)

    def _prepare_for(self, user: str) -> None:
        assert self._prepare is not None
        started = time.monotonic()
        try:
            self._prepare(user)
        except Exception as error:  # nobody has asked, and the user's request will report it
            log.error("an answer was not prepared", exc_info=error)
        self._rested = started + (time.monotonic() - started) / SHARE

    def _wait_for_questions(self) -> str | None:
        """Wait until questions have arrived, or the engine stops; returns a user for whom an answer can be
        prepared meanwhile, else None."""
        with self._changed:
            while not self._groups and not self._stopping:
                rest = None
                if self._expected:
                    user, since = next(iter(self._expected.items()))
                    rest = max(since + QUIET, self._quiet + QUIET, self._rested) - time.monotonic()
                    if rest <= 0:
                        del self._expected[user]
                        return user
                self._changed.wait(rest)
        return None

    def _take(self) -> list[_Group]:
        """The next groups of questions in the order of arrival, or one group with other work; the caller
        holds the lock."""
        batch = [self._groups.popleft()]
        count = batch[0].size
        while self._groups and batch[0].work is self._groups[0].work is None:
            if count + self._groups[0].size > self._together:
                break
            batch.append(self._groups.popleft())
            count += batch[-1].size
        self._questions -= count
        return batch

    def _next(self) -> list[_Group]:
        """Wait for the next batch; returns its groups that were not canceled, none after :meth:`stop`."""
        self._quiet = time.monotonic()
        while True:
            if (user := self._wait_for_questions()) is not None:
                self._prepare_for(user)
                continue
            with self._changed:
                if not self._groups:
                    return []
                if self._busy or len(self._groups) > 1:
                    until = self._groups[0].arrived + self._wait
                    self._changed.wait_for(
                        lambda: self._questions >= self._together or self._stopping,
                        max(0.0, until - time.monotonic()),
                    )
                batch = self._take()
                self._busy = len(batch) > 1
            if wanted := [group for group in batch if group.future.set_running_or_notify_cancel()]:
                return wanted
