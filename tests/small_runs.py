"""A small run of a simulated shop, trained with what it noted on the way."""

from __future__ import annotations

from pathlib import Path

from peso.config import load_config
from peso.runs import pipeline
from peso.runs.reuse import take_data
from peso.runs.workspace import Workspace
from peso.runtime.progress import Observer, Silent

TREE = {
    "data": {"simulate": {"users": 100, "items": 60, "stages": 2}},
    "items": {"quantizer": "rq-kmeans", "levels": 3},
    "backbone": "tiny",
    # an anchor too weak to hold
    "strategy": {"name": "peso", "weight": 2.0, "reduction": "mean", "examples": 8},
    "training": {"epochs": 1, "max_steps": 6, "learning_rate": 3e-3, "later_learning_rate_scale": 1.0},
    "evaluation": {"enabled": False},
}


def run(workspace: Workspace, base: Path | None = None, observer: Observer | None = None) -> Workspace:
    """Do all steps. The data of a base are taken over too, which is faster than to make them again."""
    with workspace.lock():
        if base is not None and not workspace.has_stream:
            take_data(workspace, Workspace.open(base), Silent())
        pipeline.run(workspace, base=base, observer=observer)
    return workspace


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def trained(root: Path, *overrides: str, base: Path | None = None) -> tuple[Workspace, list[str]]:
    observer = Notes()
    workspace = run(Workspace.create_or_open(root, load_config(TREE, overrides)), base, observer)
    return workspace, observer.notes
