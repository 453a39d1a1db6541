"""`peso init`: write a first configuration for a log."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peso.cli.display import Overrides, Terminal, next_steps, say, table


def register(app: typer.Typer) -> None:
    app.command()(init)


def init(
    log: Annotated[str, typer.Argument(metavar="LOG", help="A file, or a directory of files of one kind.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The file to write. Default: NAME-OF-LOG.yaml.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the output file.")] = False,
    data_format: Annotated[
        str | None, typer.Option("--format", help="As in `peso ingest`. Default: by the files.")
    ] = None,
    user: Annotated[str | None, typer.Option(metavar="COLUMN", help="The user.")] = None,
    item: Annotated[str | None, typer.Option(metavar="COLUMN", help="The item.")] = None,
    time: Annotated[str | None, typer.Option(metavar="COLUMN", help="The time.")] = None,
    rating: Annotated[str | None, typer.Option(metavar="COLUMN", help="The rating.")] = None,
    items: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="The product table. Default: the log itself, if it has titles."),
    ] = None,
    item_id: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Of the product table: the item.")
    ] = None,
    title: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Of the product table: the title.")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN", help="Of the product table: a text. Can be repeated."),
    ] = None,
    category: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Of the product table: the category.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Write a configuration with comments for a log. Columns are guessed; options correct the guess.

    A column is its name, or its number where a CSV file has no header. The log is read once, as `peso ingest`
    reads it, so that the written configuration runs.

    Example: peso init shop.csv --items products.csv

    Example: peso init log.csv --user 1 --item 2 --time 4 -o log.yaml --set data.min_user=5
    """
    from peso.errors import UsageError
    from peso.runs.first_config import first_config
    from peso.runs.workspace import require_place
    from peso.runtime.files import write_atomically

    name = Path(log).name.split(".")[0] or "log"
    target = output or Path(f"{name}.yaml")
    if target.suffix not in (".yaml", ".yml"):
        raise UsageError(f"{target}: the name of a configuration ends in .yaml")
    if target.exists() and not force:
        raise UsageError(f"{target} is there already; use --force to overwrite it, or -o for another name")
    require_place(target)
    columns = {"user": user, "item": item, "time": time, "rating": rating}
    of_items = {"item": item_id, "title": title, "category": category}
    named = {role: [column] for role, column in of_items.items() if column}
    made = first_config(
        log,
        target,
        Terminal(),
        form=data_format,
        columns={role: column for role, column in columns.items() if column},
        items=items,
        item_columns=named | ({"text": text} if text else {}),
        overrides=overrides or [],
    )
    write_atomically(target, made.text.encode())
    if made.columns:
        table("columns", ["file", "holds", "column", "for example"], made.columns)
    stages = made.manifest["stages"]
    say(
        f"{target}: {sum(stage['events'] for stage in stages):,} events, {made.manifest['items']:,} items, "
        f"{len(stages)} stages. A wrong column? Name the right one (`peso init --help`) with --force"
    )
    next_steps(["run", target, "--dry-run"], ["run", target])
