"""The results of a comparison: runs and baselines for the report, and a table, one row per run and stage."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from peso.config.baselines import baseline_label
from peso.errors import WorkspaceError
from peso.evaluation.metrics import default_metrics, stage_metrics
from peso.evaluation.report import refuse_foreign
from peso.evaluation.report.tables import csv_text
from peso.evaluation.run_summary import RunSummary
from peso.runs import report
from peso.runs.baselines import BaselineRun, baseline_summaries, found_baselines
from peso.runs.compare.plan import Plan, Run
from peso.runs.compare.progress import TaskProgress, choose, is_done, progress_of, validation_loss
from peso.runs.place import require_place
from peso.runs.sizes import sizes_for
from peso.runs.stage import RunStage
from peso.runs.workspace import Workspace
from peso.runtime.failures import listed
from peso.runtime.files import write_aside

RESULTS, ENDINGS = "results", (".parquet", ".csv")
REPORT = "report"


@dataclass(frozen=True)
class Collected:
    """The runs and baselines with results; ``remarks``: sentences on missing runs and chosen options."""

    runs: list[tuple[Run, TaskProgress]]
    baselines: list[tuple[Run, TaskProgress]]
    remarks: list[str]


def collect(plan: Plan) -> Collected:
    """Collect the runs that have results, and remarks on the others.

    Raises:
        WorkspaceError: a run's files are damaged.
    """
    runs, baselines = [], []
    remarks = list[str]()
    for run in plan.runs:
        sizes = sizes_for(run.task.root, run.task.config)
        remark = f"{run.data}/{run.backbone}: {sizes}"
        if sizes is not None and remark not in remarks:
            remarks.append(remark)
        if run.candidates:
            if not _trials_done(run):
                remarks.append(f"{run.name}: missing, its options are not chosen yet")
                continue
            chosen = choose(run.candidates)
            tried = ", ".join(f"{c.label} {validation_loss(c.trial):.4f}" for c in run.candidates)
            cell = f"{run.data}/{run.backbone}/{run.strategy}"
            remark = f"{cell}: {chosen.label}, the lowest validation loss of {tried}"
            if remark not in remarks:  # the choice is the same for every seed
                remarks.append(remark)
            run = run.with_choice(chosen)
        found = progress_of(run.task)
        if not found.done or not _tested(run):
            untested = found.done and not run.task.config.evaluation.enabled
            remarks.append(
                f"{run.name}: {'trained, not tested: evaluation.enabled is false' if untested else 'missing'}"
            )
            continue
        if not found.complete:
            remarks.append(f"{run.name}: only {found.done} of {found.stages} stages are done")
        runs.append((run, found))
    for run in map(_chosen, plan.baselines):
        found = progress_of(run.task)
        if not found.complete:
            remarks.append(
                f"{run.name}: {f'{found.done} of {found.stages} stages' if found.done else 'missing'}"
            )
        if found.done:
            baselines.append((run, found))
    open_tests = [run.name for run in map(_chosen, plan.transfers) if not progress_of(run.task).complete]
    if open_tests:
        remarks.append(
            f"forgetting and transfer: tests on other stages are missing in {len(open_tests)} of "
            f"{len(plan.transfers)} runs ({listed(open_tests, 3)})"
        )
    return Collected(runs, baselines, remarks)


def _trials_done(run: Run) -> bool:
    return all(is_done(candidate.trial) for candidate in run.candidates)


def _chosen(run: Run) -> Run:
    """The run with its chosen options, if its trials are done."""
    return run.with_choice(choose(run.candidates)) if run.candidates and _trials_done(run) else run


def require_results(directory: Path) -> None:
    """Check before the runs that :func:`write_results` can write to a directory.

    Raises:
        WorkspaceError, ExportError: the directory cannot be written, or contains something else.
    """
    for ending in ENDINGS:
        file = directory / f"{RESULTS}{ending}"
        require_place(file)
        if file.is_dir():
            raise WorkspaceError(f"{file} is a directory; remove it, or choose another directory with -o")
    require_place(directory / REPORT)
    refuse_foreign(directory / REPORT)


def write_results(plan: Plan, collected: Collected, directory: Path) -> Path:
    """Write ``results.parquet``, ``results.csv`` and ``report/``; returns the report's page.

    Raises:
        WorkspaceError: no run has a tested stage, or runs on one data set have different test cases.
    """
    from peso.evaluation.report.page import write_report

    if not collected.runs:
        raise WorkspaceError(f"nothing in {plan.root} is tested yet: {'; '.join(collected.remarks[:3])} …")
    table = results_table(collected)
    directory.mkdir(parents=True, exist_ok=True)
    with write_aside(directory / f"{RESULTS}{ENDINGS[0]}") as aside:
        pq.write_table(table, aside)
    with write_aside(directory / f"{RESULTS}{ENDINGS[1]}") as aside:
        pyarrow.csv.write_csv(_without_formulas(table), aside)
    runs = [run_summary(run, found) for run, found in collected.runs]
    cells = {(run.data, run.backbone): run for run, _ in reversed(collected.runs)}
    for cell, first in reversed(cells.items()):
        entries = [pair for pair in collected.baselines if (pair[0].data, pair[0].backbone) == cell]
        runs += _baselines(first, entries)
    title = plan.common.report.title or f"peso compare: {directory.name}"
    columns = plan.common.report.segments
    return write_report(directory / REPORT, runs, title, plan.common.evaluation.k, columns, paired=True)


def _without_formulas(table: pa.Table) -> pa.Table:
    """The table with texts that a spreadsheet does not take for formulas
    (:func:`peso.evaluation.report.tables.csv_text`)."""
    for index, field in enumerate(table.schema):
        if pa.types.is_string(field.type):
            texts = [None if text is None else csv_text(text) for text in table[index].to_pylist()]
            table = table.set_column(index, field, pa.array(texts, field.type))
    return table


def runs_by_data(directory: Path, note: Callable[[str], None]) -> dict[str, list[RunSummary]]:
    """The runs of a comparison that has written its results, without baselines: data set → runs, each named
    by strategy and seed.

    Runs that were not tested on all stages on which others were are left out, because a comparison would be
    of the stages that all have.

    Args:
        directory: the directory of the results.
        note: is called with a sentence about each run that is left out.

    Raises:
        WorkspaceError: there are no results, or a run's files are missing or damaged.
    """
    path = directory / f"{RESULTS}{ENDINGS[0]}"
    if not path.is_file():
        raise WorkspaceError(f"{path} does not exist; give the directory (-o, else -w) of `peso compare`")
    found: dict[str, dict[str, RunSummary]] = {}
    for row in pq.read_table(path).to_pylist():
        if row["determined_by"] is None:  # a baseline
            continue
        of_data = found.setdefault(row["data_set"], {})
        if row["workspace"] not in of_data:
            name = f"{row['strategy']}/seed={row['seed']}"
            if not Path(row["workspace"]).is_dir():
                raise WorkspaceError(
                    f"{path} names the workspace {row['workspace']}, which does not exist in this "
                    "directory; change to the directory in which `peso compare` ran, or repeat it with "
                    "--report-only"
                )
            summary = report.summarize(Workspace.open(row["workspace"]), name)
            of_data[row["workspace"]] = replace(summary, strategy=row["strategy"], seed=row["seed"])
    whole: dict[str, list[RunSummary]] = {}
    for data, runs in found.items():
        most = max(len(run.stages) for run in runs.values())
        for run in runs.values():
            if len(run.stages) == most:
                whole.setdefault(data, []).append(run)
            else:
                note(f"{data}: {run.name} is left out; {len(run.stages)} of {most} stages are tested")
    return whole


def run_summary(run: Run, found: TaskProgress) -> RunSummary:
    """The summary of a run for the report."""
    found_summary = report.summarize(run.task.workspace, run.name)
    return replace(
        found_summary,
        strategy=run.strategy,
        data_set=run.data,
        backbone=run.backbone,
        seed=run.seed,
        options=run.options,
        expected_stages=found.stages or 0,
    )


def _baselines(first: Run, entries: Sequence[tuple[Run, TaskProgress]]) -> list[RunSummary]:
    """The summaries of a cell's baselines: those of the comparison, those that `peso baseline` has run in the
    first run's workspace, and popularity in any case."""
    workspace = first.task.workspace
    found = [each for run, at in entries for each in baseline_summary(run, at)]
    own = {baseline_label(run.task.baseline) for run, _ in entries if run.task.baseline is not None}
    others = [config for config in found_baselines(workspace) if baseline_label(config) not in own]
    found += baseline_summaries(workspace, others)
    if not any(baseline.strategy == "popularity" for baseline in found):
        found = [report.popularity(workspace), *found]
    found[0] = replace(found[0], catalogue=report.catalogue(workspace))
    return [replace(baseline, data_set=first.data, backbone=first.backbone) for baseline in found]


def baseline_summary(run: Run, at: TaskProgress) -> list[RunSummary]:
    """The summaries of a baseline for the report: updated at every stage, and static after stage 0."""
    assert run.task.baseline is not None
    label = baseline_label(run.task.baseline)
    return [
        replace(
            found,
            name=found.name.replace(label, run.name, 1),
            strategy=found.strategy.replace(label, run.strategy, 1),
            seed=run.seed,
            expected_stages=at.stages or 0,
        )
        for found in BaselineRun(run.task.workspace, run.task.baseline).summaries()
    ]


def results_table(collected: Collected) -> pa.Table:
    """One row per run or baseline and tested stage: metrics, validation loss, distance moved, cost.

    Columns that do not apply to a row are null.
    """
    rows = [row for run, _ in collected.runs for row in _rows(run)]
    rows += [row for run, at in collected.baselines for row in _baseline_rows(run, at)]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: pa.array([row.get(name) for row in rows]) for name in columns})


def _rows(run: Run) -> list[dict[str, Any]]:
    rows = []
    for stage in _tested(run):
        test, training = stage.metrics["test"], stage.training
        losses, cost = training.get("validation_losses"), report.stage_cost(stage)
        rows.append(
            {
                "data_set": run.data,
                "backbone": run.backbone,
                "strategy": run.strategy,
                "seed": run.seed,
                "stage": stage.number,
                "strategy_name": run.task.config.strategy.name,
                "options": json.dumps(run.options),
                "learning_rate": training.get("learning_rate"),
                **{name: figures["value"] for name, figures in test["metrics"].items()},
                "cases": next(iter(test["metrics"].values()))["cases"],
                "validation_loss": min(losses) if losses else None,
                "best_epoch": training.get("best_epoch"),
                **{f"moved_{k}": v for k, v in training.get("moved", {}).items() if isinstance(v, float)},
                "seconds": cost.seconds,
                "steps": training.get("steps"),
                "peak_memory_bytes": cost.peak_memory_bytes,
                "trained_parameters": cost.trained_parameters,
                "bytes_on_disk": cost.bytes_on_disk,
                "workspace": str(run.task.root),
                "determined_by": stage.determined_by,
            }
        )
    return rows


def _baseline_rows(run: Run, at: TaskProgress) -> Iterator[dict[str, Any]]:
    for found in baseline_summary(run, at):
        assert run.task.baseline is not None
        for stage, answers in found.stages.items():
            metrics = default_metrics(run.task.config.evaluation.k)
            estimates = stage_metrics(answers.predictions, metrics)
            yield {
                "data_set": run.data,
                "backbone": run.backbone,
                "strategy": found.strategy,
                "seed": run.seed,
                "stage": stage,
                "strategy_name": run.task.baseline.name,
                "options": json.dumps({}),
                **{name: estimate.value for name, estimate in estimates.items()},
                "cases": len(answers.predictions),
                "seconds": answers.cost.seconds if answers.cost else None,
                "bytes_on_disk": answers.cost.bytes_on_disk if answers.cost else None,
                "workspace": str(run.task.root),
            }


def _tested(run: Run) -> list[RunStage]:
    return [stage for stage in run.task.workspace.stages if stage.is_tested]
