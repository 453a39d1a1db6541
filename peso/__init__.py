"""Keeps an LLM-based generative recommender fresh: one evolving LoRA adapter, held by a proximal anchor.

Public names are loaded when they are first used: ``import peso`` and ``peso --help`` do not wait for PyTorch.
"""

import os
from importlib import import_module
from typing import Any

# Threads that wait sleep instead of spinning: on a machine with other work, spinning takes the time of the
# thread that is waited for. OpenMP reads this when PyTorch, faiss or scikit-learn is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_HOMES = {
    "SoftmaxKL": "peso.adapters.proximal",
    "PerRankKL": "peso.adapters.proximal",
    "L2": "peso.adapters.proximal",
    "Fisher": "peso.adapters.proximal",
    "Orthogonal": "peso.adapters.proximal",
    "OutputKL": "peso.adapters.proximal",
    "Workspace": "peso.runs.workspace",
    "Recommender": "peso.runs.recommender",
}
_MODULES = ("decoding", "events")


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _MODULES:
        return import_module(f"peso.{name}")
    raise AttributeError(f"module 'peso' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_HOMES, *_MODULES]
