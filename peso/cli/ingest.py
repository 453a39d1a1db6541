"""`peso ingest`: reads data into a stream, appends events, corrects items."""

from __future__ import annotations

import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from peso.cli.display import (
    Json,
    OnError,
    Overrides,
    Terminal,
    counted,
    next_step_of,
    next_steps,
    say,
    say_json,
    table,
)
from peso.config import DataConfig
from peso.config.data import FORMATS, LOG_FORMATS
from peso.errors import ConfigError, DataError, UsageError
from peso.runs.place import CONFIG
from peso.runs.workspace import Workspace


def ingest(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="[SOURCE]",
            help="The data: a file, a directory, their address (s3://, gs://, https://, "
            "hf://datasets/…), or a CONFIG.yaml that gives their path.",
        ),
    ] = None,
    data_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help=f"{', '.join(FORMATS)}. "
            "Default: recognized from the files of a published data set, whose name is then printed; else "
            "from the extension of the file, or of the files in the directory.",
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

    Example: peso ingest s3://bucket/logs/2024/ --items https://example.org/products.csv -w runs/shop

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
    step, added = next_step_of(opened), manifest["appended"][-1]
    if as_json:
        say_json({**manifest, "next": shlex.join(["peso", *map(str, step)])})
        return
    _show_stream(opened, manifest, added)
    first, end = added["first_stage"], added["first_stage"] + added["stages"]
    say(
        f"appended: {counted(added['events'], 'event')} of {counted(added['users'], 'user')} "
        f"({added['new_users']:,} new) as {stages_named(range(first, end))}; "
        f"{counted(added['new_items'], 'new item')}"
    )
    if bare := added["new_items_without_text"]:
        table = config.data.items
        why = f"{table.path} has none for them" if table else "there is no product table"
        say(
            f"warning: new items without a title and a text: {bare:,} ({why}). Their semantic IDs will carry "
            f"little information. Before the next step, run `peso ingest --items FILE -w {path}`"
        )
    next_steps(step)


def _keys_of_format(data: DataConfig, source: str | None, data_format: str | None) -> list[str]:
    """The changes to the data section, as texts for ``--set``, for new events in another format.

    The format of a user's own file is that of its extension. The format of a folder is the previous one if
    the folder contains such files, else that of the files in it.
    """
    from peso.events.sources.files import find_files, format_of, kind_of

    wanted = data_format
    if wanted is None and source is not None and data.format in LOG_FORMATS:
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
    items = data.items
    if items and items.format is None and kind_of(items.path) is None and wanted in LOG_FORMATS:
        keys += [f"data.items.format={data.format}"]
    return keys


def _update_items(path: Path, items: str, overrides: list[str], as_json: bool) -> None:
    """Update the items from a product table that has the same columns as the workspace's one, unless --set
    names other columns."""
    from peso.config import load_config
    from peso.events.sources.files import find_files, kind_of
    from peso.runs import preparation
    from peso.runtime.remote import local

    if others := [text for text in overrides if not text.startswith("data.")]:
        raise ConfigError(f"with --items, --set can change only keys of `data`, not {', '.join(others)}")
    opened = Workspace.open(path)
    find_files(local(items, Terminal()), kind_of(items) or "csv", "--items")  # raises where there is none
    data, known = opened.config.data, opened.config.data.items
    kind = kind_of(items) or (known and known.format) or data.format
    tree = {
        "format": kind if kind in LOG_FORMATS else "csv",
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
        pending = opened.lacks_semantic_ids
    command = None
    if pending and opened.has_semantic_ids:
        command = shlex.join(["peso", "tokenize", "--append", "-w", str(path)])
    if as_json:
        say_json({**done, "next": command})
        return
    say(
        f"{path}: {done['changed']:,} items corrected ({done['titles']:,} titles, {done['texts']:,} texts, "
        f"{done['categories']:,} categories); {items} has {done['items_found']:,} of the items in the stream "
        f"and {done['rows'] - done['items_found']:,} others. Existing semantic IDs and content vectors "
        "do not change"
    )
    next_steps(next_step_of(opened))


def _quoted(path: str) -> str:
    """A path relative to the current directory as an absolute value for --set. An address stays as it is."""
    import json

    return json.dumps(path if "://" in path else str(Path(path).absolute()))


def _show_stream(opened: Workspace, manifest: dict[str, Any], read: dict[str, Any]) -> None:
    """Print the cleaning steps and the stages of a stream.

    Args:
        manifest: the stream's manifest.
        read: the manifest's entry for the log that was just read.
    """
    from peso.events.histories import trained_counts

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
    counts = [trained_counts(stage, opened.config.training.users) for stage in manifest["stages"]]
    rows = [[number, *stage.values()] for number, stage in enumerate(counts)]
    title = (
        f"{opened.stream_directory}: {counted(manifest['items'], 'item')}, {counted(len(counts), 'stage')}"
    )
    table(title, ["stage", *(name.replace("_", " ") for name in counts[0])], rows)
