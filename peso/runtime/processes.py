"""The processes that train and test one model together, started by `torchrun` or `accelerate launch`.

Every process has the whole model and takes the same steps. Each one computes its share of a batch, and only
the first one, the main process, writes files.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from peso.errors import ConfigError, LostProcess, PesoError, TrainingError
from peso.runtime.failures import AGAIN, HOW_STOPPED, TERMINATED, first_line

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

TIMEOUT = timedelta(days=1)  # how long others wait while the main process reads data or writes a report
NATIVE_SECONDS = 4  # after SIGTERM, how long to wait for native code, which Python cannot interrupt
ON_MAIN = "raised on the main process"  # a note on errors that the other processes repeat


@dataclass(frozen=True)
class Processes:
    """A group of ``count`` processes; this process is number ``rank``. A single process exchanges nothing.

    All processes must call the same methods in the same order. A method that needs another process raises
    LostProcess if that process has ended.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def takes(self, number: int) -> bool:
        """Whether part ``number`` of work that is distributed in turn belongs to this process."""
        return number % self.count == self.rank

    def on_main(self, work: Callable[[], T]) -> T:
        """Call ``work`` on the main process and return its result on all processes, which wait for it.

        Raises:
            PesoError: ``work`` raised this error; it is raised on all processes.
        """
        if self.count == 1:
            return work()
        from accelerate.utils import broadcast_object_list

        result: list[T] = []
        error: PesoError | None = None
        if self.is_main:
            try:
                result.append(work())
            except PesoError as raised:
                error = raised
        with _connected(self.count):
            result, error = broadcast_object_list([(result, error)])[0]
        if error is not None:
            if not self.is_main:
                error.add_note(ON_MAIN)
            raise error
        return result[0]

    def sum_numbers(self, *values: float) -> list[float]:
        """Sum each value over the processes, in float64."""
        if self.count == 1:
            return list(values)
        import torch

        return self._sum(torch.tensor(values, dtype=torch.float64)).tolist()

    def largest(self, value: int) -> int:
        """The largest of the values of all processes."""
        return int(max(self.sum_numbers(*(value * (rank == self.rank) for rank in range(self.count)))))

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """A context that the processes of one machine enter one after another, and leave together. Within it,
        they must not exchange anything."""
        if self.count == 1:
            yield
            return
        from accelerate import PartialState

        place = PartialState().local_process_index
        later = self.largest(place) - place
        for _ in range(place):
            self.sum_numbers(0.0)
        try:
            yield
        finally:
            for _ in range(later + 1):
                self.sum_numbers(0.0)

    def sum_tensors(self, tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
        """Sum each tensor over the processes that have it, in one exchange.

        Args:
            tensors: the tensors of this process, None for those that it does not have.
            like: tensors with the shapes of ``tensors``, all with one device and number format, which must be
                the same on every process.

        Returns:
            The sums, with None for tensors that no process has.
        """
        if self.count == 1 or not like:
            return list(tensors)
        import torch

        known = [t is not None for t in tensors]
        parts = [torch.zeros_like(p) if t is None else t for t, p in zip(tensors, like, strict=True)]
        flags = torch.tensor(known, dtype=like[0].dtype, device=like[0].device)
        *sums, flags = self._sum(torch.cat([part.flatten() for part in [*parts, flags]])).split(
            [p.numel() for p in like] + [len(flags)]
        )
        return [
            summed.view_as(p) if found else None
            for summed, p, found in zip(sums, like, flags.tolist(), strict=True)
        ]

    def merge(self, values: np.ndarray, own: np.ndarray) -> np.ndarray:
        """Combine the rows that different processes have computed.

        Args:
            values: (rows, …), the rows of this process. Rows that are not ``own`` are ignored.
            own: bool (rows,), which rows this process has computed. Each row is true on exactly one process.

        Returns:
            (rows, …), all rows.
        """
        if self.count == 1:
            return values
        import torch

        mine = own.reshape(-1, *[1] * (values.ndim - 1))
        found = self._sum(torch.from_numpy(np.where(mine, values, np.zeros((), values.dtype))))
        return found.numpy()

    def require_same(self, value: str, what: str) -> None:
        """Check that all processes have the same value.

        Args:
            value: the value of this process.
            what: a description of the value, for the message.

        Raises:
            TrainingError: the values differ.
        """
        if self.count == 1:
            return
        from accelerate.utils import gather_object

        with _connected(self.count):
            values = gather_object([value])
        if len(set(values)) > 1:
            raise TrainingError(
                f"the {self.count} processes differ in {what}; they must run the same versions with the same "
                "files on the same kind of hardware"
            )

    def _sum(self, tensor: Tensor) -> Tensor:
        from accelerate import PartialState
        from accelerate.utils import reduce

        with _connected(self.count):
            return reduce(tensor.to(PartialState().device), "sum").to(tensor.device)


ALONE = Processes()
_current = ALONE


def launched() -> int:
    """The number of processes that a launcher has started; 1 without a launcher.

    Raises:
        ConfigError: the environment variables that torchrun and accelerate set have invalid values.
    """
    count = _number("WORLD_SIZE", 1) if os.environ.get("WORLD_SIZE") else 1
    if count > 1:
        _number("RANK", 0, count - 1)
        _number("LOCAL_RANK", 0, count - 1)
        _number("MASTER_PORT", 1, 65535)
    return count


def _number(name: str, least: int, most: int | None = None) -> int:
    text = os.environ.get(name, "")
    if not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= (most or int(text)):
        allowed = f"{least} or more" if most is None else f"from {least} to {most}"
        raise ConfigError(
            f"the environment variable {name} is {text!r}, not a whole number {allowed}; unset WORLD_SIZE to "
            "run one process, or start several with torchrun, which sets these variables"
        )
    return int(text)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """A context in which SIGTERM stops the work as Ctrl-C does: partial output is removed, and the exit
    status is 143.

    DuckDB replaces what a signal raises during a query by a RuntimeError; this context raises it again. If
    native code does not return to Python in time, the process ends immediately.
    """

    def stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # do not interrupt the cleanup with a second signal
        sys.exit(TERMINATED)

    def watch() -> None:
        while (received := os.read(reader, 1)) and received[0] != signal.SIGTERM:
            pass
        if received and not done.wait(NATIVE_SECONDS):
            os.write(2, f"\n{HOW_STOPPED[TERMINATED]}; {AGAIN}\n".encode())
            os._exit(TERMINATED)
        os.close(reader)

    done = threading.Event()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.signal(signal.SIGTERM, stop), signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    except RuntimeError as error:
        if str(error) != "Query interrupted":
            raise
        if signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:  # `stop` was called
            sys.exit(TERMINATED)
        raise KeyboardInterrupt from None
    finally:
        done.set()
        signal.set_wakeup_fd(before[1])
        signal.signal(signal.SIGTERM, before[0])
        os.close(writer)  # ends the thread


def current() -> Processes:
    """The processes that :func:`join` has joined; before that, this process alone."""
    return _current


def join(device: str = "auto") -> Processes:
    """Join the processes that a launcher has started. Without a launcher this process is alone.

    Args:
        device: ``cpu``, ``cuda`` (each process uses the GPU with its number) or ``auto``.

    Raises:
        TrainingError: the device is a different one, or the processes cannot connect to each other.
    """
    global _current
    if launched() == 1 or _current is not ALONE:
        return _current
    import torch
    from accelerate import PartialState

    if device not in ("auto", "cpu", "cuda"):
        raise TrainingError(
            f"training.device {device!r} is a single device, but {launched()} processes were started; "
            "set it to auto, cpu or cuda"
        )
    cpu = device == "cpu" or not torch.cuda.is_available()
    try:
        state = PartialState(cpu=cpu, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise TrainingError(
            f"the {launched()} processes cannot connect to each other: {first_line(error)}; check the "
            "addresses and ports that the launcher sets, and start them again"
        ) from error
    _current = Processes(state.process_index, state.num_processes)
    return _current


@contextmanager
def _connected(count: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise LostProcess(
            f"another of the {count} processes has ended ({first_line(error)}); see its last output above. "
            "Run the same command again; it continues from the newest checkpoint"
        ) from error
