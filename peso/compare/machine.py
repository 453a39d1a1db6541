"""How many processes run at once, and what each gets of the machine.

Knows cores and GPUs; knows nothing of what the processes do.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from peso.threads import NUMBER, SHARE

THREADS = (NUMBER, "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Machine:
    """``workers`` processes with ``threads`` each; ``devices`` are GPUs as CUDA names them, none on a CPU."""

    workers: int
    threads: int
    devices: tuple[str, ...] = ()

    @classmethod
    def of(cls, workers: int | Literal["auto"], device: str) -> Machine:
        """``device``: `training.device`. One process a GPU where there are any to use, else one a core; each
        with its share of the cores as threads, or with fewer where OMP_NUM_THREADS asks for that."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        devices = _devices() if device in ("auto", "cuda") else ()
        count = (len(devices) or cores) if workers == "auto" else workers
        asked = os.environ.get(NUMBER, "")
        most = int(asked) if asked.isdecimal() and int(asked) else cores
        return cls(count, max(1, min(most, cores // count)), devices)

    def environment(self, slot: int) -> Mapping[str, str]:
        """What the process in a slot (0 … workers − 1) sees."""
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
