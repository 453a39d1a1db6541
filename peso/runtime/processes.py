"""The processes that train and test one model together, started by `torchrun` or `accelerate launch`.

Every process holds the whole model and takes the same steps; each computes its share of a batch, and the
first one, the main process, alone writes.
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
from peso.runtime.failures import AGAIN, HOW_STOPPED, TERMINATED

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

TIMEOUT = timedelta(days=1)  # others wait this long while the main process reads data or draws a report
NATIVE_SECONDS = 4  # that native code, which Python cannot interrupt, gets to return after a SIGTERM
ON_MAIN = "raised on the main process"  # note on an error that the others only repeat


@dataclass(frozen=True)
class Processes:
    """``count`` processes, of which this is number ``rank``. One alone exchanges nothing.

    What one process calls here, all call, in the same order. Whatever needs another process raises
    LostProcess where that is gone.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def takes(self, number: int) -> bool:
        """Whether part ``number`` of a work that is dealt in turn is this process's."""
        return number % self.count == self.rank

    def on_main(self, work: Callable[[], T]) -> T:
        """What ``work`` gives on the main process, for all; nobody goes on before it is done.

        Raises:
            PesoError: that ``work`` raised, on all.
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
        """Each value summed over the processes, in float64."""
        if self.count == 1:
            return list(values)
        import torch

        return self._sum(torch.tensor(values, dtype=torch.float64)).tolist()

    def sum_tensors(self, tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
        """Each tensor summed over the processes that have it, in one exchange; None where no process has it.

        Args:
            like: tensors of the same shapes, of one device and format, the same on every process.
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
        """Rows put together from the processes that computed them.

        Args:
            values: (rows, …); what stands in rows that are not ``own`` does not count.
            own: bool (rows,), each row true on one process.
        """
        if self.count == 1:
            return values
        import torch

        mine = own.reshape(-1, *[1] * (values.ndim - 1))
        found = self._sum(torch.from_numpy(np.where(mine, values, np.zeros((), values.dtype))))
        return found.numpy()

    def require_same(self, value: str, what: str) -> None:
        """Raises TrainingError where the processes do not all hold the same value."""
        if self.count == 1:
            return
        from accelerate.utils import gather_object

        with _connected(self.count):
            values = gather_object([value])
        if len(set(values)) > 1:
            raise TrainingError(
                f"the {self.count} processes differ in {what}; they must run the same versions on the same "
                "files and like hardware"
            )

    def _sum(self, tensor: Tensor) -> Tensor:
        from accelerate import PartialState
        from accelerate.utils import reduce

        with _connected(self.count):
            return reduce(tensor.to(PartialState().device), "sum").to(tensor.device)


ALONE = Processes()
_current = ALONE


def launched() -> int:
    """How many processes a launcher started; 1 where none did.

    Raises:
        ConfigError: the variables by which torchrun and accelerate say so make no sense.
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
            "run one process, or start several with torchrun, which sets it"
        )
    return int(text)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the work inside as Ctrl-C does: what is half-written is removed, the exit status is 143.

    Where native code does not return to Python in time, the process ends at once.
    """

    def stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: what tidies up is not interrupted
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
    finally:
        done.set()
        signal.set_wakeup_fd(before[1])
        signal.signal(signal.SIGTERM, before[0])
        os.close(writer)  # ends the thread


def current() -> Processes:
    """Those that :func:`join` joined; this process alone before."""
    return _current


def join(device: str = "auto") -> Processes:
    """Take part in the processes that a launcher started; alone where none did.

    Args:
        device: ``cpu``, ``cuda`` (each process takes the GPU of its number) or ``auto``.

    Raises:
        TrainingError: another device, or the processes do not find each other.
    """
    global _current
    if launched() == 1 or _current is not ALONE:
        return _current
    import torch
    from accelerate import PartialState

    if device not in ("auto", "cpu", "cuda"):
        raise TrainingError(
            f"training.device {device!r} is one device, but {launched()} processes were started; "
            "set auto, cpu or cuda"
        )
    cpu = device == "cpu" or not torch.cuda.is_available()
    try:
        state = PartialState(cpu=cpu, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        cause = str(error).splitlines()[0]
        raise TrainingError(f"the {launched()} processes do not find each other: {cause}") from error
    _current = Processes(state.process_index, state.num_processes)
    return _current


@contextmanager
def _connected(count: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        cause = str(error).splitlines()[0]
        raise LostProcess(
            f"another of the {count} processes is gone ({cause}); what it said last stands above. Start the "
            "same command again: it continues at its newest checkpoint"
        ) from error
