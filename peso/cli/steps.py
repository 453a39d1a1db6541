"""The single steps of `peso run` (ingest, tokenize, train, update, evaluate, report), and undo."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from peso.cli.display import (
    Directory,
    Json,
    OnError,
    Overrides,
    Stage,
    Terminal,
    Trust,
    confirm,
    next_step_of,
    next_steps,
    say,
    say_json,
    show_results,
    table,
    watcher,
)
from peso.cli.promotion import show_drift, show_verdict
from peso.config import DataConfig
from peso.config.data import FORMATS
from peso.errors import ConfigError, DataError, PesoError, UsageError
from peso.runs.place import CONFIG, require_place
from peso.runs.workspace import Workspace, trusted_classes
from peso.runtime.processes import current


def ingest(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="[SOURCE]", help="The data: a file, a directory, or a CONFIG.yaml that gives their path."
        ),
    ] = None,
    data_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help=f"{', '.join(FORMATS)}. "
            "Default: a published data set that its files show, which is then named; else by the extension "
            "of the file, or of the files in the directory.",
        ),
    ] = None,
    workspace: Annotated[
        Path | None, typer.Option("-w", "--workspace", help="Default: runs/NAME-OF-SOURCE.")
    ] = None,
    append: Annotated[
        bool, typer.Option("--append", help="Add new events to the stream of -w as further stages.")
    ] = False,
    items: Annotated[
        str | None,
        typer.Option(
            "--items",
            help="The product table (data.items.path). Without SOURCE: correct the titles, texts and "
            "categories of the items in the stream of -w.",
        ),
    ] = None,
    on_error: OnError = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Read the data and split them into stages; print what each cleaning step kept and the stage sizes.

    With SOURCE, create a new workspace; without it, read the data that the workspace -w is configured with.
    With --append, read new events from SOURCE, in any format, or from the configured path; the other `data`
    settings also apply, unless --set changes them for this call. With --items and without SOURCE, read only
    the product table.

    Example: peso ingest shop.csv --set data.columns.item=sku -w runs/shop

    Example: peso ingest shop.yaml -w runs/shop

    Example: peso ingest --format peso-release data/Video_Games_cl_0.6_0_5_3_0 -w runs/games

    Example: peso ingest week_12.csv --append -w runs/shop

    Example: peso ingest --items products_12.csv -w runs/shop
    """

    from peso.config import load_config
    from peso.events.sources import format_at
    from peso.runs import preparation

    overrides = [*(overrides or []), *([f"data.on_error={on_error}"] if on_error else [])]
    overrides = [*([f"data.items.path={_quoted(items)}"] if items else []), *overrides]
    is_config = source is not None and source.lower().endswith((".yaml", ".yml"))
    if is_config and (append or data_format):
        raise UsageError(
            f"{source} is a configuration: omit --format, and give --append a log of new events instead"
        )
    if append or (items and source is None and data_format is None):
        if workspace is None:
            raise UsageError(f"{'--append' if append else '--items'} needs a workspace (-w) to change")
        if append:
            _append(workspace, source, data_format, overrides, as_json)
        else:
            assert items is not None
            _update_items(workspace, items, overrides, as_json)
        return
    with ExitStack() as held:
        if source is not None or data_format is not None:
            if is_config:
                config = load_config(str(source), overrides)
            else:
                named = any(text.startswith("data.columns") for text in overrides)
                data = {
                    "format": data_format or format_at(source or "", Terminal(), columns_given=named),
                    "path": source,
                }
                config = load_config({"data": data}, overrides, base=Path())
            name = Path(source or "simulated").resolve()
            root = workspace or Path("runs") / (name.stem if is_config else name.name)
            opened = held.enter_context(Workspace.hold(root, config))
        elif workspace is not None:
            opened = held.enter_context(Workspace.change(workspace, overrides, anew="stream"))
        else:
            raise UsageError("name the data (SOURCE) or a workspace (-w)")
        manifest = preparation.ingest(opened, Terminal())
    if as_json:
        say_json(manifest)
        return
    _show_stream(opened, manifest, manifest)
    if not opened.config.data.items and manifest.get("items_without_title") == manifest["items"]:
        say(
            "no item has a title or text, because there is no product table. Add one: "
            f"`peso ingest --items FILE --set data.items.columns.title=… -w {opened.root}`"
        )
    next_steps(next_step_of(opened))


def _append(
    path: Path, source: str | None, data_format: str | None, overrides: list[str], as_json: bool
) -> None:

    from peso.config import changed_keys, load_config
    from peso.runs import preparation
    from peso.runs.undo import stages_named

    with Workspace.change(path) as opened:
        new = _keys_of_format(opened.config.data, source, data_format)
        new += [f"data.path={_quoted(source)}"] if source else []
        config = load_config(path / CONFIG, [*new, *overrides])
        others = [key for key in changed_keys(opened.config, config) if not key.startswith("data.")]
        if others:
            raise UsageError(f"with --append, --set can change only keys of `data`, not {', '.join(others)}")
        manifest = preparation.append(opened, Terminal(), config.data)
        pending = opened.items_without_id
    command = f"peso tokenize --append -w {path}" if pending else f"peso update -w {path}"
    if not opened.has_semantic_ids:
        command = f"peso tokenize -w {path}"
    added = manifest["appended"][-1]
    if as_json:
        say_json({**manifest, "next": command})
        return
    _show_stream(opened, manifest, added)
    first, end = added["first_stage"], added["first_stage"] + added["stages"]
    say(
        f"appended: {added['events']:,} events of {added['users']:,} users "
        f"({added['new_users']:,} new) as {stages_named(range(first, end))}; "
        f"{added['new_items']:,} new items"
    )
    if bare := added["new_items_without_text"]:
        table = config.data.items
        why = f"{table.path} has none for them" if table else "there is no product table"
        say(
            f"WARNING: {bare:,} of the new items have no title and no text ({why}), so their semantic IDs "
            f"will carry little information. Before the next step, run: peso ingest --items FILE -w {path}"
        )
    next_steps(shlex.split(command)[1:])


def _keys_of_format(data: DataConfig, source: str | None, data_format: str | None) -> list[str]:
    """The changes to the data section, as texts for ``--set``, for new events in another format.

    The format of a user's own file is that of its extension. The format of a folder is the previous one if
    the folder contains such files, else that of the files in it.
    """
    from peso.events.sources.files import find_files, format_of, kind_of

    own, wanted = ("csv", "jsonl", "parquet"), data_format
    if wanted is None and source is not None and data.format in own:
        wanted = kind_of(source)
        if Path(source).is_dir():
            try:
                find_files(source, data.format)
            except DataError:
                wanted = format_of(source)
    if wanted is None or wanted == data.format:
        return []
    keys = [f"data.format={wanted}"]
    if data.format == "csv":  # keys that only CSV has; the product table keeps its format
        keys += ["data.separator=null", "data.encoding=utf-8", "data.quote='\"'"]
    if data.items and wanted in own and data.items.format is None and kind_of(data.items.path) is None:
        keys += [f"data.items.format={data.format}"]
    return keys


def _update_items(path: Path, items: str, overrides: list[str], as_json: bool) -> None:
    """Update the items from a product table that has the same columns as the workspace's one, unless --set
    names other columns."""

    from peso.config import load_config
    from peso.events.sources.files import find_files, kind_of
    from peso.runs import preparation

    if others := [text for text in overrides if not text.startswith("data.")]:
        raise ConfigError(f"with --items, --set can change only keys of `data`, not {', '.join(others)}")
    opened = Workspace.open(path)
    find_files(items, kind_of(items) or "csv", "--items")  # raises where there is none
    data, known = opened.config.data, opened.config.data.items
    kind = kind_of(items) or (known and known.format) or data.format
    tree = {
        "format": kind if kind in ("csv", "jsonl", "parquet") else "csv",
        "path": items,
        "items": {**(known.model_dump(mode="json") if known else {}), "path": items, "format": None},
        **({"encoding": data.encoding} if kind == data.format == "csv" else {}),
    }
    given = load_config({"data": tree}, overrides, base=Path()).data
    assert given.items is not None
    named = given.items.columns
    if named.title is None and named.category is None and not named.text:
        raise ConfigError(
            f"give the columns of {items}: --set data.items.columns.title=… (or .category=…, .text=…)"
        )
    with opened.lock():
        done = preparation.update_items(opened, given, Terminal())
        pending = opened.items_without_id
    command = f"peso tokenize --append -w {path}" if pending and opened.has_semantic_ids else None
    if as_json:
        say_json({**done, "next": command})
        return
    say(
        f"{path}: {done['changed']:,} items corrected ({done['titles']:,} titles, {done['texts']:,} texts, "
        f"{done['categories']:,} categories); {items} has {done['items_found']:,} of the items in the stream "
        f"and {done['rows'] - done['items_found']:,} others. Existing semantic IDs do not change"
    )
    next_steps(next_step_of(opened))


def _quoted(path: str) -> str:
    """A path relative to the current directory as an absolute value for --set."""
    import json

    return json.dumps(str(Path(path).absolute()))


def _show_stream(opened: Workspace, manifest: dict[str, Any], read: dict[str, Any]) -> None:
    """Print the cleaning steps and the stages of a stream.

    Args:
        opened: the workspace.
        manifest: the stream's manifest.
        read: the manifest's entry for the log that was just read.
    """
    if "funnel" in read:
        title = "no times: events in the order of the files"
        if when := read.get("time"):
            title = f"times read as {when['recognised']}: {when['from']} to {when['until']}"
        left_out = [
            f"{read[key]:,} {words}"
            for key, words in (("skipped", "unreadable rows"), ("older", "events older than the stream"))
            if read.get(key)
        ]
        title += f"; skipped: {', '.join(left_out)}" if left_out else ""
        table(title, list(read["funnel"][0]), [step.values() for step in read["funnel"]])
    counts = manifest["stages"]
    rows = [[number, *stage.values()] for number, stage in enumerate(counts)]
    title = f"{opened.stream_directory}: {manifest['items']:,} items, {len(counts)} stages"
    table(title, ["stage", *(name.replace("_", " ") for name in counts[0])], rows)


def tokenize(
    workspace: Directory,
    append: Annotated[
        bool, typer.Option("--append", help="Only for new items of the stream; existing IDs do not change.")
    ] = False,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Give every item a semantic ID; print the quality of the IDs.

    Example: peso tokenize -w runs/games

    Example: peso tokenize --append -w runs/shop
    """

    from peso.runs import diagnosis, preparation

    anew = "" if append else "semantic IDs"
    with Workspace.change(workspace, overrides or [], anew=anew) as opened:
        manifest = (preparation.tokenize_new if append else preparation.tokenize)(opened, Terminal())
    if as_json:
        say_json(manifest)
        return
    for title, columns, rows in diagnosis.quality_tables(manifest):
        table(f"{opened.semantic_ids_directory}: {title}", columns, rows)
    next_steps(next_step_of(opened))


def train(workspace: Directory, overrides: Overrides = None, trust: Trust = None) -> None:
    """Train the base stage (stage 0).

    Example: peso train -w runs/games --set training.epochs=2
    """
    from peso.runs import pipeline

    with _together(workspace, overrides, trust) as opened:
        current().on_main(lambda: pipeline.require_next(opened.stage(0)))
        current().on_main(lambda: pipeline.rehearse_stages(opened, watcher()))
        pipeline.learn(opened.stage(0), watcher())
    if current().is_main:
        next_steps(["evaluate", "-w", workspace], next_step_of(opened))


def update(
    workspace: Directory,
    alert: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND",
            help="Run this program when the gate keeps the previous stage, drift is high (gate.drift), or "
            "the update fails. It gets one JSON object on its standard input, and runs without a shell.",
        ),
    ] = None,
    from_events: Annotated[
        bool,
        typer.Option(
            "--from-events", help="First make a stage from the events that were received since the last one."
        ),
    ] = False,
    items: Annotated[
        str | None,
        typer.Option("--items", help="With --from-events: the product table. Default: data.items.path."),
    ] = None,
    overrides: Overrides = None,
    trust: Trust = None,
) -> None:
    """Train the next stage, starting from the last one, and compare the new model with the previous one.

    Both models are tested on the new stage's test cases, and the report is updated. With
    evaluation.enabled: false, the stage is only trained.

    With gate.enabled: true, the new stage serves only if it passes against the stage that serves.

    With --from-events, the events that `peso serve` has received become a stage first, and its new items get
    semantic IDs. What an interrupted update has left is finished before. Events wait for a later stage if no
    user has three of them yet, or if their item is not in the product table.

    --set can change the settings of later stages (strategy, training.later); they apply from this stage on.

    Example: peso update -w runs/games

    Example: peso update -w runs/shop --from-events

    Example: peso update -w runs/games --set strategy.strength=2 --set training.later.epochs=2

    Example: peso update -w runs/shop --set gate.enabled=true --alert "mail -s peso ops@example.org"
    """
    from peso.cli.alert import Alert
    from peso.runs import pipeline
    from peso.runs.report import before_and_after

    if items is not None and not from_events:
        raise UsageError("--items needs --from-events; `peso ingest --items FILE` corrects the product table")
    alerts, stage = Alert.of(alert, workspace), None
    with (
        alerts.on_failure(),
        suppress(_NothingToDo),
        _together(workspace, overrides, trust, later=True) as opened,
    ):
        if overrides:
            current().on_main(lambda: pipeline.refuse_unused(opened))
        if from_events:
            current().on_main(lambda: _give_new_ids(opened))
            stage = _finish(opened)
            current().on_main(lambda: _cut_received(opened, items))
        stage = pipeline.update(opened, watcher()) or stage
        if stage is None:
            raise _NothingToDo
    if not current().is_main:
        return
    if stage is None:
        stages = len(opened.finished_stages)
        unused = "; the values of --set are not stored" if overrides else ""
        say(f"{opened.root}: all {stages} stages are trained; there is nothing to do{unused}")
        next_steps(next_step_of(opened))
        return
    say(f"{opened.root}: stage {stage} is trained")
    show_drift(opened.stage(stage), alerts)
    if not opened.config.evaluation.enabled:
        say("not tested, because evaluation.enabled is false")
        next_steps(["evaluate", "-w", opened.root])
        return
    table(*before_and_after(opened))
    show_results("averages so far", [opened])
    say(f"report: {opened.report_directory / 'index.html'}")
    show_verdict(opened.stage(stage), alerts)
    next_steps(["diagnose", "-w", opened.root], next_step_of(opened))


def _give_new_ids(opened: Workspace) -> None:
    """As `peso tokenize --append`, if there are items without a semantic ID."""
    from peso.runs import preparation

    if opened.items_without_id:
        preparation.tokenize_new(opened, watcher())


def _finish(opened: Workspace) -> int | None:
    """Finish what earlier updates have left, so that received events become the stage after it.

    Returns: the newest stage that was trained or finished, None if nothing was left.
    """
    from peso.runs import pipeline

    done = None
    while (left := current().on_main(lambda: pipeline.unfinished(opened)[0])) is not None and left != done:
        done = pipeline.update(opened, watcher())
    return done


def _cut_received(opened: Workspace, items: str | None) -> None:
    from peso.runs.intake import cut_received

    cut = cut_received(opened, watcher(), items)
    if cut.stage is None:
        say(f"{opened.root}: no stage was made from received events: {cut.why}")
    else:
        say(
            f"stage {cut.stage}: {cut.events:,} received events of {cut.users:,} users; "
            f"{cut.new_items:,} new items"
        )
    if cut.unknown_items:
        say(
            f"WARNING: {cut.unknown_items:,} items of received events (such as {cut.example!r}) are not in "
            "the product table, so their events wait. Add rows for them, or give another table with "
            "--items FILE"
        )
    if cut.waiting:
        say(f"{cut.waiting:,} received events wait for a later stage")
    _give_new_ids(opened)


def undo(
    workspace: Directory,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    as_json: Json = False,
) -> None:
    """Undo the last step: the training of the last stage, or the last append if it is not trained yet.

    Undoing the training of a stage removes its model and its tests; the events stay, and `peso update` trains
    the stage again. Undoing an append removes its events, its new items and their semantic IDs. The report is
    updated. Stage 0 and the first ingested stream are never removed. If the command is interrupted, run it
    again: it finishes the removal and removes nothing else.

    Example: peso undo -w runs/shop
    """
    from dataclasses import asdict

    from peso.runs.undo import last_step
    from peso.runs.undo import undo as remove

    opened = Workspace.open(workspace)
    with opened.lock():
        step = last_step(opened)
        go = yes or step.gone or confirm(f"{workspace}: remove {step}?", "nothing was removed")
        if go:
            remove(opened, step, Terminal())
    if as_json:
        say_json({**asdict(step), "stages": list(step.stages), "removed": go})
    elif not go:
        say("nothing was removed")
    else:
        say(f"{workspace}: removed {step}")
        if step.gone:
            say("an earlier undo was interrupted; it is finished now, and nothing else was removed")
        next_steps(next_step_of(opened))


def evaluate(
    workspace: Directory,
    stage: Stage = None,
    on: Annotated[
        int | None, typer.Option(help="Use the test cases of this stage. Default: the model's stage.")
    ] = None,
    overrides: Overrides = None,
    trust: Trust = None,
    as_json: Json = False,
) -> None:
    """Test a stage's model on a stage's test cases: hits, NDCG, MRR and the log-probability of the target.

    Example: peso evaluate -w runs/games --stage 0 --on 4
    """

    from peso.runs.evaluate import test
    from peso.runs.report import metric_table

    with _together(workspace, overrides, trust) as opened:
        wanted = opened.trained(stage)
        cases = wanted.number if on is None else on
        metrics = test(wanted.on(cases), watcher())
    if not current().is_main:
        return
    if as_json:
        say_json(metrics)
        return
    title = f"{opened.root}: model after stage {wanted.number} on the test cases of stage {cases}"
    table(title, *metric_table(metrics))
    next_steps(["report", "-w", opened.root], next_step_of(opened))


def report(
    workspaces: Annotated[
        list[Path], typer.Option("-w", "--workspace", help="A workspace. Can be repeated.")
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Default: report/ of the first workspace.")
    ] = None,
) -> None:
    """Write the report: one self-contained HTML page, with its tables and plots as separate files.

    Example: peso report -w runs/none -w runs/single -w runs/peso -o runs/report
    """
    from peso.errors import WorkspaceError
    from peso.evaluation.report import refuse_foreign
    from peso.runs.baselines import run_cheap_baselines
    from peso.runs.report import report as write_report

    opened = [Workspace.open(path) for path in workspaces]
    directory = output or opened[0].report_directory
    if directory.resolve() != opened[0].report_directory.resolve():
        require_place(directory)
    refuse_foreign(directory)
    try:
        with opened[0].lock():
            run_cheap_baselines(opened[0], watcher())
    except WorkspaceError as reason:  # for example, a run holds the lock
        watcher().note(f"the report shows only the finished baselines: {reason}")
    observer = watcher()
    observer.begin("writing the report", 0, "")
    write_report(opened, directory)
    observer.end()
    show_results("averages over the later stages", opened)
    say(f"report: {directory / 'index.html'}")
    next_steps(["diagnose", "-w", opened[-1].root], ["recommend", "-w", opened[-1].root, "--user", "USER"])


class _NothingToDo(PesoError):
    """Raised within :meth:`Workspace.change`, so that the configuration of the workspace does not change."""


@contextmanager
def _together(
    path: Path, overrides: list[str] | None, trust: list[str] | None, *, later: bool = False
) -> Iterator[Workspace]:
    """:meth:`Workspace.change` for commands that can run in several processes."""
    from peso.config import load_config
    from peso.runs.checks import check_configuration
    from peso.runtime.processes import join

    Workspace.open(path)  # raises where there is none
    config = load_config(path / CONFIG, overrides or [])
    if overrides:
        check_configuration(config)
    join(config.training.device)
    trusted = [*(trust or []), *trusted_classes(config, overrides or [])]
    with Workspace.change(path, overrides or [], trust=trusted, later=later) as opened:
        yield opened
