"""How many threads PyTorch computes with, chosen by the size of what is computed.

Threads wait for each other after every operation. The operations of a small network are so short that the
waiting costs more than the work that is shared, and on a machine with other work it costs the time slices of
those others: a run took 50 times as long with two threads as with one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from peso.errors import ConfigError
from peso.runtime.progress import Observer

if TYPE_CHECKING:
    from torch import nn

# Parameters below which one thread is taken. Two threads took 1.3 to 1.8 times the CPU time of one on a
# Llama of up to 0.8 million, and 1.0 to 1.3 times from 1.8 million on (forward and backward, 1,000 tokens).
SMALL = 1_000_000
NUMBER = "OMP_NUM_THREADS"
SHARE = (
    "PESO_THREADS"  # set where NUMBER is the share that `peso compare` gives a process, not a user's choice
)

VALID = re.compile(r"\s*([1-9][0-9]{0,2}|1[0-9]{3})(,[0-9]+)*\s*")  # of NUMBER

_number: int | None = None  # inside a context with a number
_told = 0  # threads that the user was last told of


def check_environment() -> None:
    """Raise ConfigError if OMP_NUM_THREADS is not a number of threads."""
    text = os.environ.get(NUMBER, "")
    if text and not VALID.fullmatch(text):
        raise ConfigError(
            f"the environment variable {NUMBER} is {text[:40]!r}, not a number of threads; unset it, or "
            "set a whole number from 1 to 1999"
        )


@contextmanager
def threads(
    network: nn.Module | None = None,
    number: int | Literal["auto"] = "auto",
    observer: Observer | None = None,
) -> Iterator[None]:
    """Within the context PyTorch computes with a number of threads that suits the network.

    That is ``number``, else the number of an enclosing context that has one, else OMP_NUM_THREADS, else one
    for a network of fewer than ``SMALL`` parameters and PyTorch's choice for others. Results depend on it by
    rounding alone.

    Args:
        network: None: nothing is computed here; the number is for the contexts within.
        observer: is told the number when it differs from what was told before.
    """
    global _number, _told
    outer = _number
    _number = outer if number == "auto" else number
    if network is None:
        try:
            yield
        finally:
            _number = outer
        return
    import torch

    before, size = torch.get_num_threads(), sum(p.numel() for p in network.parameters())
    count, reason = before, f"the model has {size:,} parameters; training.threads changes it"
    if _number is not None:
        count, reason = _number, "training.threads"
    elif os.environ.get(NUMBER) and not os.environ.get(SHARE):
        reason = NUMBER
    elif size < SMALL:
        count = 1
    if observer is not None and count != _told:
        observer.note(f"{count} {'thread' if count == 1 else 'threads'} ({reason})")
        _told = count
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _number = outer
