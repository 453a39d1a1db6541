"""The runs of `tests/runs/test_sharding.py`, which several processes make together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peso
from peso.errors import PesoError
from peso.runs.evaluate import test
from peso.runs.workspace import Workspace
from peso.runtime.progress import Silent


def trained_and_tested(tree: dict[str, Any], root: str | Path) -> Workspace:
    """A finished run, with a test of its last stage only, and no report."""
    workspace = peso.run(tree, root)
    with workspace.lock():
        test(workspace.stage(workspace.finished_stages[-1]).on(workspace.finished_stages[-1]), Silent())
    return workspace


def make_runs(trees: Mapping[Path, dict[str, Any]]) -> None:
    for root, tree in trees.items():
        try:
            trained_and_tested(tree, root)
        except PesoError as error:
            print(f"{type(error).__name__}: {error}", flush=True)
