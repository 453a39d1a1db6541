"""`peso items`: retire discontinued products, recommend them again, and rename items."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peso.cli.display import Directory, Json, next_steps, say, say_json, table
from peso.errors import UsageError
from peso.runtime.files import read_given

Items = Annotated[list[str] | None, typer.Argument(metavar="[ITEM]", help="Ids of items in the log.")]
File = Annotated[
    Path | None, typer.Option("--file", metavar="FILE", help="A text file of further ids, one per line.")
]

SHOWN = 20  # renamed items that are printed


def retire(
    workspace: Directory,
    items: Items = None,
    file: File = None,
    reason: Annotated[str | None, typer.Option(help="Why; shown by `peso items list`.")] = None,
    as_json: Json = False,
) -> None:
    """Stop recommending items, such as discontinued products. This takes effect with the next answer.

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
    next_steps(["items", "list", "-w", workspace])


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
    next_steps(["items", "list", "-w", workspace])


def rename(
    workspace: Directory,
    old: Annotated[str | None, typer.Argument(metavar="[OLD", help="The id of an item in the log.")] = None,
    new: Annotated[str | None, typer.Argument(metavar="NEW]", help="Its new id.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file", metavar="FILE", help="A CSV file with two columns, old and new, for many items."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the names without changing anything.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Give items new ids. This takes effect with the next answer.

    Answers, exports and comparisons then have the new id. The old id is still understood: in histories, in
    new logs and product tables, and in received events. The item keeps its semantic ID and everything that
    the model has learned about it. A running `peso serve` uses the new ids within a second.

    Two items cannot become one, and two items cannot exchange their ids.

    Example: peso items rename sku-17 product-17 -w runs/shop

    Example: peso items rename --file new_ids.csv --dry-run -w runs/shop
    """
    from peso.runs.pairs import read_pairs
    from peso.runs.rename import rename as give_names
    from peso.runs.workspace import Workspace

    if (old is None) != (new is None):
        raise UsageError("give the old and the new id of the item")
    pairs = read_pairs(file, "item", ("old", "new")) if file else []
    if old is not None and new is not None:
        pairs.insert(0, (old, new))
    if not pairs:
        raise UsageError("name an item and its new id, or a file of such pairs with --file")
    done = give_names(Workspace.open(workspace), pairs, dry_run=dry_run)
    if as_json:
        say_json({"renamed": done.items, "unchanged": done.same, "dry_run": dry_run})
        return
    rows = [[before, now] for before, now in done.items.items()]
    if rows:
        table(f"{workspace}: new ids", ["before", "now"], rows[:SHOWN])
    more = f", {SHOWN} of them shown" if len(rows) > SHOWN else ""
    known = f"; {len(done.same):,} have their new id already" if done.same else ""
    say(f"{workspace}: {len(rows):,} items {'would be ' * dry_run}renamed{more}{known}")
    named = [] if old is None or new is None else [old, new]
    given = [*named, *(["--file", file] if file else [])]
    next_steps(["items", *(["rename", *given] if dry_run else ["list"]), "-w", workspace])


def show(workspace: Directory, as_json: Json = False) -> None:
    """Show the retired and the renamed items.

    Example: peso items list -w runs/shop
    """
    from peso.runs.names import renamings
    from peso.runs.retired import retired
    from peso.runs.workspace import Workspace

    opened = Workspace.open(workspace)
    found, renamed, names = retired(opened.root), renamings(opened.root), opened.names
    if as_json:
        say_json(
            {
                "retired": {names.now(item): told.model_dump() for item, told in found.items()},
                "renamed": {item: told.model_dump() for item, told in renamed.items()},
            }
        )
        return
    titles = dict(zip(opened.stream.item_ids, opened.stream.titles, strict=True))
    rows = [
        [names.now(item), titles.get(item) or "", told.time, told.reason or ""]
        for item, told in found.items()
    ]
    if renamed:
        known = [
            [told.name, ", ".join([item, *told.earlier] if told.name != item else told.earlier), told.time]
            for item, told in renamed.items()
        ]
        table(f"{workspace}: {len(known):,} items are renamed", ["item", "earlier ids", "since"], known)
    table(f"{workspace}: {len(rows):,} items are retired", ["item", "title", "since", "reason"], rows)
    next_steps(["items", "restore" if rows else "retire", "ITEM", "-w", workspace])


def _given(items: list[str] | None, file: Path | None) -> list[str]:
    """The ids of the command line and of the file."""
    lines = read_given(file, "--file").splitlines() if file else []
    given = [*(items or []), *(line.strip() for line in lines if line.strip())]
    if not given:
        raise UsageError("name items, or a file of items with --file")
    return given
