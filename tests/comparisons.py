"""Small comparisons of runs."""

from __future__ import annotations

import io
from pathlib import Path

import yaml

from peso.runs.compare.plan import Plan, make_plan
from peso.runs.compare.progress import is_done
from peso.runs.compare.worker import Job, work
from peso.runs.workspace import Workspace
from peso.runtime.files import checksum

COMMON = {
    "data": {"format": "simulate", "simulate": {"users": 80, "items": 50, "stages": 3}},
    "backbone": "tiny",
    "training": {"epochs": 1, "max_steps": 6, "learning_rate": 3e-3, "later_learning_rate_scale": 0.5},
    "evaluation": {"k": [5, 10]},
    "baselines": [],
}


def plan_of(root: Path, compare: dict, *overrides: str, **common: object) -> Plan:
    root.mkdir(parents=True, exist_ok=True)
    path = root / "c.yaml"
    compare = {"transfer": False, **compare}  # half of the time of these runs
    path.write_text(yaml.safe_dump({**COMMON, **common, "compare": compare}, sort_keys=False))
    return make_plan(path, root / "w", overrides)


def names(plan: Plan) -> list[str]:
    return [run.name.removeprefix("simulate/tiny/") for run in plan.runs]


def do(task) -> None:
    """A task with all that it needs, in this process."""
    for need in task.needs:
        do(need)
    if not is_done(task):
        Workspace.create_or_open(task.root, task.config)
        data, base = (None if need is None else str(need.root) for need in (task.data, task.base))
        options = None if task.baseline is None else task.baseline.model_dump(mode="json")
        job = Job(str(task.root), task.last_stage, data, base, task.kind, options, None)
        work(job, io.StringIO())


def result_files(root: Path) -> dict[str, str]:
    kept = ("adapter_model.safetensors", "vocabulary.safetensors", "model.safetensors", "predictions.parquet")
    files = [
        path for part in ("stages", "baselines") for path in (root / part).rglob("*") if path.name in kept
    ]
    return {str(path.relative_to(root)): checksum(path) for path in files}
