"""Summaries of workspaces for a report, and their results as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import duckdb

from peso.config import STRATEGIES, Config, baseline_label, dump_config
from peso.config.baselines import default_baselines, read_baseline
from peso.errors import DataError, WorkspaceError
from peso.evaluation.catalogue import Catalogue
from peso.evaluation.metrics import average_metrics, headline_metrics
from peso.evaluation.report.tables import Quantity
from peso.evaluation.run_summary import RunSummary, StageCost, StageSummary, TrainingCurve
from peso.events.database import identifier, temporary_database
from peso.events.merge import members_of
from peso.events.sources.files import kind_of, require_content
from peso.events.sources.reading import Reading
from peso.events.sources.tables import ALIKE, FileTable, csv_table, folded, jsonl_table, parquet_table, plain
from peso.events.sources.user_files import separator_of
from peso.events.stream import Stream
from peso.runs.baselines import BaselineRun, baseline_summaries, found_baselines
from peso.runs.diagnosis import stream_drift
from peso.runs.health import known_warnings
from peso.runs.stage import RunStage
from peso.runs.workspace import Workspace
from peso.runtime.progress import Observer

CURVE_POINTS = 400  # of a training curve: more than a plot can show
INDEX = ("items", "distinct_ids", "tokens_in_use", "quality", "fitness")  # of the semantic IDs' manifest


def report(workspaces: Sequence[Workspace], directory: Path) -> None:
    """Write the report of one or several runs, with their baselines, atomically.

    Args:
        workspaces: the runs; title, k and segments are those of the first one's configuration.
        directory: the directory of the report; it is replaced.

    Raises:
        WorkspaceError: a workspace has no tested stage.
    """
    from peso.evaluation.report.page import write_report  # draws plots: slow to import

    config = workspaces[0].config
    title = config.report.title or f"peso: {', '.join(names(workspaces))}"
    write_report(directory, runs_of(workspaces), title, config.evaluation.k, config.report.segments)


def renew_report(workspace: Workspace, observer: Observer) -> None:
    """Write the report again after a change of the workspace. If no stage is tested, none is written; an
    error is only noted, because the change itself succeeded."""
    try:
        if any(stage.is_tested for stage in workspace.stages):
            observer.begin("writing the report", 0, "")
            report([workspace], workspace.report_directory)
            observer.end()
    except WorkspaceError as error:
        observer.note(f"the report was not written again: {error}")


def results(workspaces: Sequence[Workspace]) -> tuple[list[str], list[list[Any]], list[str]]:
    """The average metrics as a table (columns, and one row per run), and findings in sentences."""
    from peso.evaluation.comparison import Comparison
    from peso.evaluation.report.findings import findings

    runs, ks = runs_of(workspaces, drift=False), workspaces[0].config.evaluation.k
    return *run_table(runs, ks), findings(Comparison(runs, ks))


def runs_of(workspaces: Sequence[Workspace], drift: bool = True) -> list[RunSummary]:
    """The summary of each workspace, then of popularity and the baselines of the first workspace, on the
    stages that were tested. Renamed items have their names in the first workspace. Static variants of default
    baselines are left out. A baseline without all stages counts as unfinished."""
    named = zip(workspaces, names(workspaces), strict=True)
    runs = [summarize(workspace, name, drift) for workspace, name in named]
    first, ids = workspaces[0], workspaces[0].stream.item_ids
    runs = [
        run.named(first.names.after(each.names)) if of_one_log(ids, each.stream.item_ids) else run
        for run, each in zip(runs, workspaces, strict=True)
    ]
    static = {f"{baseline_label(config)} (static)" for config in default_baselines()}
    found = baseline_summaries(workspaces[0], found_baselines(workspaces[0]))
    found = [run for run in found if run.name not in static]
    if all(run.name != "popularity" for run in found):
        found = [popularity(workspaces[0]), *found]
    tested = {stage for run in runs for stage in run.stages}
    least = min(len(run.stages) for run in runs)
    baselines = [
        replace(run, stages={t: s for t, s in run.stages.items() if t in tested}, expected_stages=least)
        for run in found
    ]
    return [replace(runs[0], catalogue=catalogue(workspaces[0])), *runs[1:], *baselines]


def of_one_log(ids: Sequence[str], others: Sequence[str]) -> bool:
    """Whether the items of two streams are of one log, of which one stream may have more stages.

    >>> of_one_log(["a", "b"], ["a", "b", "c"]), of_one_log(["a", "b"], ["a", "c"])
    (True, False)
    """
    common = min(len(ids), len(others))
    return ids[:common] == others[:common]


def summarize(workspace: Workspace, name: str, drift: bool = True) -> RunSummary:
    """The summary of all tested stages of a workspace.

    Args:
        workspace: the workspace.
        name: the name of the run.
        drift: whether to compute the drift of the stream, which reads all of its events.

    Raises:
        WorkspaceError: no stage is tested, or a file that the report needs is missing or damaged.
    """
    stages = workspace.stages
    for stage in stages:
        stage.require_answers()
    tested = [stage for stage in stages if stage.is_tested]
    if not tested:
        raise WorkspaceError(
            f"{workspace.root} has no tested stage yet; run `peso evaluate -w {workspace.root}`"
        )
    ids = workspace.semantic_ids_manifest
    # the configuration of later stages may change from one to the next
    updates = [stage.config for stage in tested if stage.number] or [workspace.config]
    return RunSummary(
        name=name,
        strategy=" → ".join(dict.fromkeys(map(strategy_label, updates))),
        stages={stage.number: _stage(stage) for stage in tested},
        configuration=dump_config(workspace.config),
        manifests=[stage.manifest for stage in stages],
        drift=stream_drift(workspace) if drift else [],
        semantic_ids={key: ids[key] for key in INDEX if key in ids},
        seed=workspace.config.seed,
        item_head=workspace.config.head.name == "items",
        family=updates[-1].strategy.name,
        reference=STRATEGIES.find(updates[-1].strategy.name).reference,
        across={
            (stage.number, on.number): test.predictions
            for stage in stages
            for on in tested
            if on != stage and (test := stage.on(on.number)).is_done
        },
        untested=[
            stage.number
            for stage in stages
            # without cases if all of its users were erased
            if not stage.is_tested and len(workspace.stream.stage(stage.number).eligible())
        ],
        verdicts={stage.number: verdict for stage in tested if (verdict := stage.verdict) is not None},
    )


def catalogue(workspace: Workspace) -> Catalogue:
    """The catalog of a workspace, for metrics that depend on items and users."""
    stream = workspace.stream
    table = of_merged(read_user_table(workspace.config.report.users), stream.merged_users)
    return Catalogue.of(stream, workspace.semantic_ids, table)


def popularity(workspace: Workspace) -> RunSummary:
    """The summary of the popularity baseline, updated at every stage whose items have semantic IDs."""
    counted = read_baseline({"name": "popularity", "repeats": workspace.config.decoding.repeats})
    run = BaselineRun(workspace, counted)
    answers = {stage: run.computed(stage) for stage in run.stages}
    return RunSummary("popularity", "popularity (all time)", answers, baseline=True)


def strategy_label(config: Config) -> str:
    """The strategy's name and the options that are set and are not defaults: ``peso (strength 2)``."""
    usual = config.strategy.usual()
    given = {k: v for k, v in config.strategy.model_dump().items() if v is not None}
    options = {k: v for k, v in given.items() if k not in usual or usual[k] != v}
    text = ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in options.items())
    return f"{config.strategy.name} ({text})" if text else config.strategy.name


def names(workspaces: Sequence[Workspace]) -> list[str]:
    """The names of the workspaces' directories, or their paths if the names are not distinct."""
    short = [workspace.root.resolve().name for workspace in workspaces]
    return short if len(set(short)) == len(short) else [str(workspace.root) for workspace in workspaces]


def run_table(runs: Sequence[RunSummary], ks: Sequence[int]) -> tuple[list[str], list[list[Any]]]:
    """The main metrics averaged over the tested stages 1 … T (or stage 0 if there is no other), one row per
    run."""
    metrics = headline_metrics(ks)
    rows: list[list[Any]] = []
    for run in runs:
        later = [stage for stage in run.stages if stage] or list(run.stages)
        averages = average_metrics([run.stages[stage].predictions for stage in later], metrics)
        cases = sum(len(run.stages[stage].predictions) for stage in later)
        values = [
            Quantity.of(averages[metric.name], metric.decimals).text  # type: ignore[union-attr]
            for metric in metrics
        ]
        rows.append([run.name, _span(later), cases, *values])
    return ["", "stages", "cases", *(metric.label for metric in metrics)], rows


def before_and_after(workspace: Workspace) -> tuple[str, list[str], list[list[Any]]]:
    """The effect of the newest stage: title, columns and rows of a table that compares the models before and
    after it on the same test cases."""
    from peso.evaluation.comparison import Comparison

    comparison = Comparison([summarize(workspace, "w", drift=False)], workspace.config.evaluation.k)
    (system,), stage, rows = comparison.systems, comparison.averaged[-1], list[list[Any]]()
    cases = len(system.first.stages[stage].predictions)
    for metric in comparison.metrics:
        change, digits = comparison.last_change(system, metric), metric.decimals
        if change is not None:
            means = [f"{m:.{digits}f}" for m in comparison.before_and_after(system, metric, change)]
            interval = f"{change.low:+.{digits}f} … {change.high:+.{digits}f}" if change.has_interval else ""
            rows.append([metric.label, *means, f"{change.value:+.{digits}f}", interval])
    title = f"the model before and after stage {stage}, on the same {cases:,} test cases of stage {stage}"
    return title, ["metric", "before", "after", "difference", "95 % interval"], rows


def metric_table(test: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """The metrics of one test with their 95 % intervals."""
    rows = [
        [name, m["value"], "" if m["low"] is None else f"{m['low']:.4g} … {m['high']:.4g}", m["cases"]]
        for name, m in test["metrics"].items()
    ]
    return ["metric", "value", "95 % interval", "cases"], rows


def stage_cost(stage: RunStage) -> StageCost:
    """Time and memory of a stage's training, and its size on disk (None if its weights were removed)."""
    training, manifest = stage.training, stage.manifest
    weights = [stage.directory / name for name in stage.weight_files]
    return StageCost(
        seconds=training.get("seconds"),
        peak_memory_bytes=training.get("peak_memory"),
        trained_parameters=manifest["trained_parameters"] if training else 0,
        bytes_on_disk=(
            manifest.get("bytes_on_disk") or sum(path.stat().st_size for path in weights)
            if stage.pruned is None and all(path.is_file() for path in weights)
            else None
        ),
    )


def _stage(stage: RunStage) -> StageSummary:
    training = stage.training
    held: dict[str, Any] = {key: training[key] for key in ("moved", "strategy") if key in training}
    return StageSummary(
        stage.predictions,
        stage_cost(stage),
        _curve(stage.log),
        {**training.get("anchor", {}), **held},
        stage.metrics["test"].get("repeats") == "leave-out",
        stage.config.training.users,
        known_warnings(stage),
        training.get("trials", ()),
    )


def _curve(records: Sequence[Mapping[str, Any]]) -> TrainingCurve | None:
    if not records:
        return None
    steps = [record for record in records if "loss" in record]
    thinned = steps[:: max(1, len(steps) // CURVE_POINTS)]
    return TrainingCurve.of_records(thinned + [record for record in records if "validation_loss" in record])


def _span(stages: list[int]) -> str:
    return f"{stages[0]}–{stages[-1]}" if len(stages) > 1 else str(stages[0])


USER = "user_id"


def read_user_table(path: str | Path | None) -> Mapping[str, Mapping[str, str]]:
    """The values of the user table: column name → user → value.

    Args:
        path: CSV or TSV with a header, Parquet or JSON lines, with a column ``user_id``. None: no table.

    Raises:
        DataError: the file is missing or unreadable, has no column ``user_id``, or two rows for a user.
    """
    if path is None:
        return {}
    path = Path(path)
    try:
        table = _table(path)
        with TemporaryDirectory() as aside, temporary_database(Path(aside)) as connection:
            reading = Reading(connection, table, skip=False, key=USER, cure="correct the line")
            user = reading.id(USER, "the name of the column with the users to user_id")
            others = [name for name in table.columns if name not in (USER, "")]
            for name in others:
                table.require(name, "")
            fields = [f"{plain(table, name, join=', ')} AS f{place}" for place, name in enumerate(others)]
            reading.create("users", ", ".join([f"{user} AS {identifier(USER)}", *fields]))
            rows = connection.execute("SELECT * FROM users").fetchall()
    except DataError as error:
        raise DataError(f"report.users: {error}") from None
    values: dict[str, dict[str, str]] = {name: {} for name in others}
    seen: set[str] = set()
    for number, (user, *row) in enumerate(rows, 1):
        if user is None:
            raise DataError(
                f"report.users: {path}: row {number} (not counting the header) has no user; remove it"
            )
        if user in seen:
            raise DataError(f"report.users: {path} has two rows for user {user!r}; keep one")
        seen.add(user)
        for name, value in zip(others, row, strict=True):
            if value is not None:
                values[name][user] = value
    return values


def of_merged(
    table: Mapping[str, Mapping[str, str]], into: Mapping[str, str]
) -> Mapping[str, Mapping[str, str]]:
    """A user table in which all users that are one person have a value if one of them has one.

    Args:
        table: the result of :func:`read_user_table`. A user's own value counts, then that of the user whom
            the others were merged into.
        into: :attr:`Stream.merged_users`.

    >>> of_merged({"country": {"a": "de", "c": "fr"}}, {"a": "b"})
    {'country': {'b': 'de', 'a': 'de', 'c': 'fr'}}
    """
    groups = [[now, *members] for now, members in members_of(into).items()]
    filled = {}
    for column, values in table.items():
        told = [(group, next((values[user] for user in group if user in values), None)) for group in groups]
        given = {user: value for group, value in told if value is not None for user in group}
        filled[column] = {**given, **values}
    return filled


def report_users_found(table: Mapping[str, Mapping[str, str]], stream: Stream, observer: Observer) -> None:
    """Report how many users of the stream are in the user table, and ids that are only spelled differently.

    Args:
        table: the result of :func:`read_user_table`.
    """
    if not table:
        return
    known, meant = (
        {user for column in rows.values() for user in column}
        for rows in (table, of_merged(table, stream.merged_users))
    )
    users = {user for number in range(stream.stages) for user in stream.stage(number).users}
    found = len(users & meant)
    observer.note(
        f"{found:,} of {len(users):,} users of the log have a row in report.users, which has {len(known):,} "
        "users" + (f" (the log has {min(users)!r}, the table {min(known)!r})" if known and not found else "")
    )
    near, example, there = duckdb.execute(
        f"""SELECT count(DISTINCT a), min(a), arg_min(b, a)
        FROM (SELECT unnest(?::VARCHAR[]) AS a) JOIN (SELECT unnest(?::VARCHAR[]) AS b)
          ON {folded("a")} = {folded("b")}""",
        [sorted(users - meant), sorted(known - users)],
    ).fetchall()[0]
    if near:
        observer.note(
            f"note: {near:,} users of the log without a row differ from an id there only in {ALIKE}, for "
            f"example {example!r} and {there!r}; use one spelling for each id"
        )


def _table(path: Path) -> FileTable:
    kind = kind_of(path.name)
    if kind is None:
        raise DataError(f"{path} must end in .csv, .tsv, .parquet or .jsonl")
    require_content(path, "report.users")
    if kind == "parquet":
        return parquet_table([path])
    if kind == "jsonl":
        return jsonl_table([path])
    return csv_table([path], separator_of(path), header=True)
