"""Which device and number formats a run uses."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from peso.errors import TrainingError


@dataclass(frozen=True)
class Precision:
    """Device and number formats of a run.

    What is trained is always kept in float32: adapter, vocabulary rows, optimiser state, a backbone trained
    whole. ``frozen`` is the format of the frozen weights, ``compute`` that of the matrix products.
    """

    device: torch.device
    frozen: torch.dtype
    compute: torch.dtype

    @classmethod
    def of(cls, precision: str, device: str) -> Precision:
        """``float32``: all of it. ``bfloat16``: frozen weights and products in bfloat16. ``auto``: float32 on
        the CPU, bfloat16 on a GPU that has it.

        ``device`` is a name of torch's or ``auto``: the GPU if there is one.

        Raises:
            TrainingError: an unknown device, or one that this machine does not have.
        """
        chosen = _device(device)
        if chosen.type == "cuda":  # read once, at the first product; without it products are not reproducible
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        able = precision == "auto" and chosen.type == "cuda" and torch.cuda.is_bf16_supported()
        format = torch.bfloat16 if precision == "bfloat16" or able else torch.float32
        return cls(chosen, format, format)

    @property
    def mixed(self) -> bool:
        """Whether products are computed in another format than float32."""
        return self.compute != torch.float32

    def products(self) -> AbstractContextManager[object]:
        """The context in which a forward pass runs."""
        return torch.autocast(self.device.type, dtype=self.compute) if self.mixed else nullcontext()


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:
        cause = str(error).splitlines()[0]
        raise TrainingError(f"training.device {name!r} cannot be used: {cause}; try auto or cpu") from None
    return device


def peak_memory(device: torch.device) -> int:
    """Bytes: most that was allocated on a GPU, or most that this process has occupied on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kibibytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Within the context a GPU adds up in the same order every time, as a CPU does anyway; afterwards as
    before. What PyTorch cannot compute so (it warns) stays as it is."""
    if device.type != "cuda":
        yield
        return
    settings: Any = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        settings.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = False  # nothing here reads what was not written
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = before[2]
