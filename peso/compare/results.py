"""What came out of a comparison: runs for the report, and one table with a row per run and stage.

Knows the files of the runs; knows nothing of statistics or of how anything is drawn.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from peso import summary
from peso.baseline_runs import baseline_summaries, found_baselines
from peso.compare.plan import Plan, Run
from peso.compare.standing import Standing, is_done, standing
from peso.compare.tuning import choose, validation_loss
from peso.durable import write_aside
from peso.errors import WorkspaceError
from peso.evaluation.report import write_report
from peso.evaluation.run_summary import RunSummary
from peso.testing import is_tested, read_metrics
from peso.workspace import Workspace

RESULTS = "results"  # .parquet and .csv


@dataclass(frozen=True)
class Collected:
    """The runs that have something to report, and sentences on what is missing or was chosen."""

    runs: list[tuple[Run, Standing]]
    remarks: list[str]


def collect(plan: Plan) -> Collected:
    """Which runs can be reported, and what is to be said of the others.

    Raises:
        WorkspaceError: a run's files are damaged.
    """
    runs, remarks = [], []
    if plan.common.baselines:
        remarks.append(
            "baselines are not run here; `peso baseline -w RUN` in the first run, and the report shows them"
        )
    for run in plan.runs:
        if run.candidates:
            if not all(is_done(candidate.trial) for candidate in run.candidates):
                remarks.append(f"{run.name}: missing, its options are not chosen yet")
                continue
            chosen = choose(run.candidates)
            tried = ", ".join(f"{c.label} {validation_loss(c.trial):.4f}" for c in run.candidates)
            cell = f"{run.data}/{run.backbone}/{run.strategy}"
            said = f"{cell}: {chosen.label}, the lowest validation loss of {tried}"
            if said not in remarks:  # the choice is the same for every seed
                remarks.append(said)
            run = run.with_choice(chosen)
        found = standing(run.task)
        if not found.done or not _tested(run):
            remarks.append(f"{run.name}: missing")
            continue
        if not found.complete:
            remarks.append(f"{run.name}: only {found.done} of {found.stages} stages are done")
        runs.append((run, found))
    return Collected(runs, remarks)


def write_results(plan: Plan, collected: Collected) -> Path:
    """Write ``results.parquet``, ``results.csv`` and the report; returns the report's page.

    Raises:
        WorkspaceError: no run has a tested stage, or runs on one data set answered different cases.
    """
    if not collected.runs:
        raise WorkspaceError(f"nothing in {plan.root} is tested yet: {'; '.join(collected.remarks[:3])} …")
    table = results_table(run for run, _ in collected.runs)
    with write_aside(plan.root / f"{RESULTS}.parquet") as aside:
        pq.write_table(table, aside)
    with write_aside(plan.root / f"{RESULTS}.csv") as aside:
        pyarrow.csv.write_csv(table, aside)
    first_of_cell = {(run.data, run.backbone): run for run, _ in reversed(collected.runs)}
    runs = [run_summary(run, found) for run, found in collected.runs]
    for first in reversed(first_of_cell.values()):
        runs += _baselines(first)
    title = plan.common.report.title or f"peso compare: {plan.root.name}"
    return write_report(plan.root / "report", runs, title, plan.common.evaluation.k, paired=True)


def run_summary(run: Run, found: Standing) -> RunSummary:
    """A run as the report takes it."""
    found_summary = summary.summarise(Workspace(run.task.root, run.task.config), run.name)
    return replace(
        found_summary,
        strategy=run.strategy,
        data_set=run.data,
        backbone=run.backbone,
        seed=run.seed,
        options=run.options,
        expected_stages=found.stages or 0,
    )


def _baselines(run: Run) -> list[RunSummary]:
    """Popularity, and the baselines that `peso baseline` has run in a run's workspace."""
    workspace = Workspace(run.task.root, run.task.config)
    found = baseline_summaries(workspace, found_baselines(workspace))
    if not any(baseline.name == "popularity" for baseline in found):
        found = [summary.popularity(workspace), *found]
    return [replace(baseline, data_set=run.data, backbone=run.backbone) for baseline in found]


def results_table(runs: Any) -> pa.Table:
    """One row per run and tested stage: metrics, validation loss, distance moved, cost.

    Columns that only some strategies have are null elsewhere.
    """
    rows = [row for run in runs for row in _rows(run)]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: pa.array([row.get(name) for row in rows]) for name in columns})


def _rows(run: Run) -> list[dict[str, Any]]:
    workspace = Workspace(run.task.root, run.task.config)
    rows = []
    for stage in _tested(run):
        metrics, manifest = read_metrics(workspace, stage, stage), workspace.stage_manifest(stage)
        training = metrics.get("training") or {}
        losses = training.get("validation_losses")
        cost = summary.stage_cost(workspace, stage)
        rows.append(
            {
                "data_set": run.data,
                "backbone": run.backbone,
                "strategy": run.strategy,
                "seed": run.seed,
                "stage": stage,
                "strategy_name": run.task.config.strategy.name,
                "options": json.dumps(run.options),
                "learning_rate": training.get("learning_rate"),
                **{name: figures["value"] for name, figures in metrics["test"]["metrics"].items()},
                "cases": next(iter(metrics["test"]["metrics"].values()))["cases"],
                "validation_loss": min(losses) if losses else None,
                "best_epoch": training.get("best_epoch"),
                **{f"moved_{k}": v for k, v in training.get("moved", {}).items() if isinstance(v, float)},
                "seconds": cost.seconds,
                "steps": training.get("steps"),
                "peak_memory_bytes": cost.peak_memory_bytes,
                "trained_parameters": cost.trained_parameters,
                "bytes_on_disk": cost.bytes_on_disk,
                "workspace": str(run.task.root),
                "determined_by": manifest["determined_by"],
            }
        )
    return rows


def _tested(run: Run) -> list[int]:
    workspace = Workspace(run.task.root, run.task.config)
    return [stage for stage in workspace.finished_stages if is_tested(workspace, stage, stage)]
