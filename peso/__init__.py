"""Keep an LLM-based generative recommender up to date with one LoRA adapter and a proximal anchor.

The names below are public; anything else may change between versions. ``import peso`` is fast, because each
name is loaded when it is first used. ``peso --help`` therefore does not wait for PyTorch.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peso import decoding
    from peso.adapters.proximal import (
        L2,
        Fisher,
        Orthogonal,
        OutputKL,
        PerRankKL,
        ReleasedL2,
        ReleasedOrthogonal,
        SoftmaxKL,
    )
    from peso.config import load_config
    from peso.errors import PesoError
    from peso.runs.recommender import Recommender
    from peso.runs.run import run
    from peso.runs.workspace import Workspace
    from peso.training.strategies.strategy import StageContext, Strategy

__version__ = "0.1.0"
__all__ = [
    "L2",
    "Fisher",
    "Orthogonal",
    "OutputKL",
    "PerRankKL",
    "PesoError",
    "Recommender",
    "ReleasedL2",
    "ReleasedOrthogonal",
    "SoftmaxKL",
    "StageContext",
    "Strategy",
    "Workspace",
    "__version__",
    "decoding",
    "load_config",
    "run",
]

# Let waiting threads sleep instead of spin: on a busy machine, spinning takes CPU time from the threads that
# they wait for. OpenMP reads this variable when PyTorch, faiss or scikit-learn is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_HOMES = {
    "peso.adapters.proximal": (
        *("L2", "Fisher", "Orthogonal", "OutputKL", "PerRankKL", "SoftmaxKL"),
        *("ReleasedL2", "ReleasedOrthogonal"),
    ),
    "peso.config": ("load_config",),
    "peso.errors": ("PesoError",),
    "peso.runs.recommender": ("Recommender",),
    "peso.runs.run": ("run",),
    "peso.runs.workspace": ("Workspace",),
    "peso.training.strategies.strategy": ("StageContext", "Strategy"),
}


if not TYPE_CHECKING:  # otherwise a type checker would accept any name

    def __getattr__(name: str) -> Any:
        for home, names in _HOMES.items():
            if name in names:
                return getattr(import_module(home), name)
        if name in ("decoding", "events"):
            return import_module(f"peso.{name}")
        raise AttributeError(f"module 'peso' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
