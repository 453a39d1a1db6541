"""Started by `tests/runs/test_sharding.py` in several processes, which make all runs of a file together.

torchrun --nproc-per-node N tests/sharded_runs.py FILE      # JSON: workspace → configuration
"""

from __future__ import annotations

import json
import sys
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


if __name__ == "__main__":
    for workspace, tree in json.loads(Path(sys.argv[1]).read_text()).items():
        try:
            trained_and_tested(tree, workspace)
        except PesoError as error:
            print(f"{type(error).__name__}: {error}", flush=True)
