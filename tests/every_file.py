"""A finished workspace in which every kind of file occurs, small enough to be copied for each test."""

from __future__ import annotations

from pathlib import Path

import pytest

from peso.config import load_config
from peso.runs import challenger, evaluate, pipeline, served
from peso.runs.workspace import Workspace
from peso.runtime.progress import Silent

EVERY_FILE = {
    "data": {"format": "simulate", "simulate": {"users": 60, "items": 40, "stages": 3}},
    "items": {"quantizer": "rq-kmeans", "levels": 2, "codes": 8},
    "backbone": {"name": "tiny", "layers": 1},
    "adapter": {"rank": 2, "targets": ["q_proj", "v_proj"]},
    "strategy": {"name": "lsat", "fusion": "arithmetic"},
    "training": {"epochs": 1, "max_steps": 2, "batch_size": 64},
    "baselines": ["popularity", {"name": "two-tower", "epochs": 1}],
}


def make_every_file(root: Path) -> Path:
    workspace = Workspace.create_or_open(root, load_config(EVERY_FILE))
    with workspace.lock(), pytest.MonkeyPatch.context() as patched:
        patched.setattr("peso.runs.report.report", lambda workspaces, directory: None)  # draws plots
        pipeline.run(workspace)
    evaluate.test(workspace.stage(1).on(2), Silent())
    served.promote(workspace, 1)
    challenger.judge(workspace.stage(2), Silent())
    served.promote(workspace, 2, force=True)  # the newest stage is to serve
    return workspace.root
