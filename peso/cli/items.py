"""`peso items`: retire discontinued products, and recommend them again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peso.cli.display import Directory, Json, say, say_json, table
from peso.errors import UsageError

Items = Annotated[list[str] | None, typer.Argument(metavar="[ITEM]", help="Ids of items in the log.")]
File = Annotated[
    Path | None, typer.Option("--file", metavar="FILE", help="A text file of further ids, one a line.")
]


def retire(
    workspace: Directory,
    items: Items = None,
    file: File = None,
    reason: Annotated[str | None, typer.Option(help="Why; shown by `peso items list`.")] = None,
    as_json: Json = False,
) -> None:
    """Never recommend items again, such as discontinued products. This takes effect with the next answer.

    It applies to `peso recommend`, to hybrids, to the most popular items, to exports and to a running `peso
    serve`. Retired items stay in the histories of users, which the model still reads. Nothing is trained.

    Example: peso items retire sku-17 sku-18 --reason discontinued -w runs/shop

    Example: peso items retire --file discontinued.txt -w runs/shop
    """
    from peso.runs.retired import retire as leave_out
    from peso.runs.retired import retired
    from peso.runs.workspace import Workspace

    opened = Workspace.open(workspace)
    given = _given(items, file)
    new = leave_out(opened, given, reason)
    if as_json:
        say_json({"retired": new})
        return
    known = f" ({len({*given}) - len(new):,} were retired before)" if len(new) < len({*given}) else ""
    say(f"{workspace}: {len(new):,} items retired{known}; {len(retired(opened.root)):,} are retired now")


def restore(workspace: Directory, items: Items = None, file: File = None, as_json: Json = False) -> None:
    """Recommend retired items again, from the next answer on.

    Example: peso items restore sku-17 -w runs/shop
    """
    from peso.runs.retired import restore as take_back
    from peso.runs.retired import retired
    from peso.runs.workspace import Workspace

    opened = Workspace.open(workspace)
    back = take_back(opened, _given(items, file))
    if as_json:
        say_json({"restored": back})
        return
    say(f"{workspace}: {len(back):,} items restored; {len(retired(opened.root)):,} are retired now")


def show(workspace: Directory, as_json: Json = False) -> None:
    """Show the retired items, in the order in which they were retired.

    Example: peso items list -w runs/shop
    """
    from peso.runs.retired import retired
    from peso.runs.workspace import Workspace

    opened = Workspace.open(workspace)
    found = retired(opened.root)
    if as_json:
        say_json({"retired": {item: told.model_dump() for item, told in found.items()}})
        return
    titles = dict(zip(opened.stream.item_ids, opened.stream.titles, strict=True))
    rows = [[item, titles.get(item) or "", told.time, told.reason or ""] for item, told in found.items()]
    table(f"{workspace}: {len(rows):,} items are retired", ["item", "title", "since", "reason"], rows)


def _given(items: list[str] | None, file: Path | None) -> list[str]:
    """The ids of the command line and of the file."""
    lines = file.read_text(encoding="utf-8").splitlines() if file else []
    given = [*(items or []), *(line.strip() for line in lines if line.strip())]
    if not given:
        raise UsageError("name items, or a file of items with --file")
    return given
