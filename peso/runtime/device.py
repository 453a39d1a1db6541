"""The device and the number formats that a run uses."""

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
from peso.runtime.failures import first_line


@dataclass(frozen=True)
class Precision:
    """The device and the number formats of a run.

    Everything that is trained is stored in float32: the adapter, the vocabulary rows, the optimizer state,
    and the backbone if all of it is trained.

    Attributes:
        device: the device.
        frozen: the format of the frozen weights.
        compute: the format of the matrix products.
    """

    device: torch.device
    frozen: torch.dtype
    compute: torch.dtype

    @classmethod
    def of(cls, precision: str, device: str) -> Precision:
        """Choose the formats and the device from the configuration.

        Args:
            precision: ``float32`` for everything; ``bfloat16`` for frozen weights and matrix products; or
                ``auto`` for bfloat16 on a GPU that supports it, and float32 otherwise.
            device: the name of a PyTorch device, or ``auto`` for the GPU if there is one, else the CPU.

        Raises:
            TrainingError: the device is unknown or this machine does not have it.
        """
        chosen = _device(device)
        if chosen.type == "cuda":  # for reproducible products; CUDA reads it once, at the first product
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        able = precision == "auto" and chosen.type == "cuda" and torch.cuda.is_bf16_supported()
        format = torch.bfloat16 if precision == "bfloat16" or able else torch.float32
        return cls(chosen, format, format)

    @property
    def mixed(self) -> bool:
        """Whether products are computed in a format other than float32."""
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
    except (RuntimeError, AssertionError, ImportError) as error:
        raise TrainingError(
            f"training.device {name!r} cannot be used: {first_line(error)}; try auto or cpu"
        ) from None
    return device


def peak_memory(device: torch.device) -> int:
    """The peak memory in bytes: allocated on the GPU, or used by this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kibibytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """A context in which a GPU sums in the same order every time, as a CPU always does.

    Operations that PyTorch cannot make deterministic are unchanged, and PyTorch warns about them.
    """
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
    settings.fill_uninitialized_memory = False  # nothing here reads uninitialized memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = before[2]
