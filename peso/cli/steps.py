"""The single steps of `peso run`: ingest, tokenize, train, update, evaluate, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from peso.cli.display import Terminal, table, watcher
from peso.cli.options import Directory, Json, OnError, Overrides, Stage
from peso.processes import current
from peso.workspace import Workspace


def register(app: typer.Typer) -> None:
    for command in (ingest, tokenize, train, update, evaluate, report):
        app.command()(command)


def ingest(
    source: Annotated[str | None, typer.Argument(help="File or directory of the data.")] = None,
    data_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="csv, parquet, jsonl, amazon-2023, movielens, movietweetings, yelp, peso-release, simulate. "
            "None given: by the file's ending; of a folder peso-release.",
        ),
    ] = None,
    workspace: Annotated[
        Path | None, typer.Option("-w", "--workspace", help="Default: runs/NAME-OF-SOURCE.")
    ] = None,
    append: Annotated[
        bool, typer.Option("--append", help="Add new events to the stream at -w as further stages.")
    ] = False,
    on_error: OnError = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Read the data into stages; print what the cleaning left and the counts of each stage.

    With SOURCE and --format a new workspace is made; without, the one at -w goes on with its configuration.
    With --append the new events are those of SOURCE, or of the path that the workspace was made from; its
    other data keys hold too, unless --set changes them for this time.

    Example: peso ingest shop.csv --set data.columns.item=sku -w runs/shop

    Example: peso ingest --format peso-release data/Video_Games_cl_0.6_0_5_3_0 -w runs/games

    Example: peso ingest week_12.csv --append -w runs/shop
    """
    import json

    from peso import pipeline
    from peso.config import load_config
    from peso.errors import ConfigError
    from peso.events.sources.files import kind_of

    overrides = [*(overrides or []), *([f"data.on_error={on_error}"] if on_error else [])]
    if append:
        if workspace is None:
            raise ConfigError("--append needs the workspace (-w) whose stream goes on")
        _append(workspace, source, data_format, overrides, as_json)
        return
    if data_format is not None or source is not None:
        data = {"format": data_format or kind_of(source or "") or "peso-release", "path": source}
        config = load_config({"data": data}, overrides, base=Path())
        root = workspace or Path("runs") / (Path(source).resolve().name if source else "simulated")
        opened = Workspace.create_or_open(root, config)
    elif workspace is not None:
        opened = _configured(workspace, overrides)
    else:
        raise ConfigError("name the data (SOURCE with --format) or a workspace (-w)")
    with opened.lock():
        manifest = pipeline.ingest(opened, Terminal())
    if as_json:
        print(json.dumps(manifest, ensure_ascii=False))
        return
    _show_stream(opened, manifest, manifest)


def _append(
    path: Path, source: str | None, data_format: str | None, overrides: list[str], as_json: bool
) -> None:
    import json

    from peso import pipeline
    from peso.config import changed_keys, load_config
    from peso.errors import ConfigError

    opened = Workspace.open(path)
    new = [f"data.format={data_format}"] if data_format else []
    new += [f"data.path={json.dumps(str(Path(source).absolute()))}"] if source else []
    config = load_config(path / "config.yaml", [*new, *overrides])
    others = [key for key in changed_keys(opened.config, config) if not key.startswith("data.")]
    if others:
        raise ConfigError(f"--append takes --set for keys of data only, not {', '.join(others)}")
    with opened.lock():
        manifest = pipeline.append(opened, Terminal(), config.data)
    if as_json:
        print(json.dumps(manifest, ensure_ascii=False))
        return
    _show_stream(opened, manifest, manifest["appended"][-1])
    if pipeline.items_without_id(opened):
        print(f"next: peso tokenize --append -w {path}")


def _show_stream(opened: Workspace, manifest: dict[str, Any], read: dict[str, Any]) -> None:
    """``read``: what the manifest says of the log that was read now."""
    if "funnel" in read:
        when = read["time"]
        title = f"times are {when['recognised']}: {when['from']} to {when['until']}"
        left_out = [
            f"{read[key]:,} {words}"
            for key, words in (("skipped", "unreadable rows"), ("older", "events older than the stream"))
            if read.get(key)
        ]
        title += f"; left out: {', '.join(left_out)}" if left_out else ""
        table(title, list(read["funnel"][0]), [step.values() for step in read["funnel"]])
    counts = manifest["stages"]
    rows = [[number, *stage.values()] for number, stage in enumerate(counts)]
    title = f"{opened.stream_directory}: {manifest['items']:,} items, {len(counts)} stages"
    table(title, ["stage", *(name.replace("_", " ") for name in counts[0])], rows)


def tokenize(
    workspace: Directory,
    append: Annotated[
        bool, typer.Option("--append", help="Only the items that the stream has gained; no ID changes.")
    ] = False,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Give every item its semantic ID; print how good the IDs are.

    Example: peso tokenize -w runs/games

    Example: peso tokenize --append -w runs/shop
    """
    import json

    from peso import diagnosis, pipeline

    opened = _configured(workspace, overrides)
    with opened.lock():
        manifest = (pipeline.tokenize_new if append else pipeline.tokenize)(opened, Terminal())
    if as_json:
        print(json.dumps(manifest, ensure_ascii=False))
        return
    for title, columns, rows in diagnosis.quality_tables(manifest):
        table(f"{opened.semantic_ids_directory}: {title}", columns, rows)


def train(workspace: Directory, overrides: Overrides = None) -> None:
    """Learn the base stage (stage 0).

    Example: peso train -w runs/games --set training.epochs=2
    """
    from peso import pipeline

    opened = _together(workspace, overrides)
    with opened.lock():
        pipeline.learn(opened, 0, watcher())


def update(workspace: Directory, overrides: Overrides = None) -> None:
    """Train the next stage from where the last one left the adapter. Say whether the new model is better.

    Both the new model and the one before it are tested on the new stage's test cases, and the report is
    renewed. With evaluation.enabled: false the stage is only trained.

    Example: peso update -w runs/games
    """
    from peso import pipeline, summary

    opened = _together(workspace, overrides)
    with opened.lock():
        stage = pipeline.update(opened, watcher())
    if not current().is_main:
        return
    if stage is None:
        stages = len(opened.finished_stages)
        print(f"{opened.root}: all {stages} stages are trained; nothing to do. A further stage needs new")
        print(f"events: peso ingest NEW --append -w {opened.root}")
        return
    print(f"{opened.root}: stage {stage} is trained")
    if not opened.config.evaluation.enabled:
        print(f"not tested: evaluation.enabled is false. To test it: peso evaluate -w {opened.root}")
        return
    title, columns, rows, sentences = summary.before_and_after(opened, stage)
    table(title, columns, rows)
    for sentence in sentences:
        print(f"- {sentence}")
    table("averages so far", *summary.result_table([opened]))
    print(f"report: {opened.report_directory / 'index.html'}")


def evaluate(
    workspace: Directory,
    stage: Stage = None,
    on: Annotated[
        int | None, typer.Option(help="Which stage's test cases; by default the same stage's.")
    ] = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Test a stage's model on a stage's test cases: hits, NDCG, MRR, log-probability of the target.

    Example: peso evaluate -w runs/games --stage 0 --on 4
    """
    import json

    from peso import summary, testing

    opened = _together(workspace, overrides)
    number = opened.require_stage(stage)
    cases = number if on is None else on
    with opened.lock():
        metrics = testing.test(opened, number, cases, watcher())
    if not current().is_main:
        return
    if as_json:
        print(json.dumps(metrics))
        return
    title = f"{opened.root}: model after stage {number} on the test cases of stage {cases}"
    table(title, *summary.metric_table(metrics))


def report(
    workspaces: Annotated[list[Path], typer.Option("-w", "--workspace", help="One or several.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Default: report/ of the first workspace.")
    ] = None,
) -> None:
    """Write the report: one HTML page that needs no network, with tables and plots as files beside it.

    Example: peso report -w runs/none -w runs/single -w runs/peso -o runs/report
    """
    from peso import summary

    opened = [Workspace.open(path) for path in workspaces]
    directory = output or opened[0].report_directory
    summary.report(opened, directory)
    table("averages over the later stages", *summary.result_table(opened))
    print(f"report: {directory / 'index.html'}")


def _configured(path: Path, overrides: list[str] | None) -> Workspace:
    """A workspace, with keys changed where nothing that is done depends on them."""
    from peso.config import load_config

    opened = Workspace.open(path)
    if not overrides:
        return opened
    return Workspace.create_or_open(path, load_config(path / "config.yaml", overrides))


def _together(path: Path, overrides: list[str] | None) -> Workspace:
    """As :func:`_configured`, for commands that several processes may do together."""
    from peso.config import load_config
    from peso.processes import join

    Workspace.open(path)  # raises where there is none
    device = load_config(path / "config.yaml", overrides or []).training.device
    return join(device).on_main(lambda: _configured(path, overrides))
