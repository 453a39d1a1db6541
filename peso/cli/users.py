"""`peso users`: merge users who are the same person."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peso.cli.display import Directory, Json, Terminal, confirm, next_steps, say, say_json, table
from peso.errors import UsageError
from peso.runtime.failures import listed

SHOWN = 20  # merged users that are printed


def merge(
    workspace: Directory,
    user: Annotated[
        str | None, typer.Argument(metavar="[FROM", help="The user to merge into the other one.")
    ] = None,
    into: Annotated[
        str | None, typer.Argument(metavar="INTO]", help="The user who gets both histories.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file", metavar="FILE", help="A CSV file with two columns, from and into, for many users."
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    as_json: Json = False,
) -> None:
    """Merge users: two histories become one, in order of time. This cannot be undone.

    Recommendations, the histories of a running `peso serve` and later stages use the merged history from
    then on. The id FROM then means INTO: in requests, in received events and in logs that are appended.
    Stages that are trained already, their data and their tests do not change. `peso forget --user INTO` also
    erases FROM.

    Times are looked up in the logs. If these no longer exist, the order within a stage is not known, and the
    events of FROM come first.

    Example: peso users merge visitor-93 anna -w runs/shop

    Example: peso users merge --file logins.csv --yes -w runs/shop
    """
    from peso.runs.merge_users import merge as make_one
    from peso.runs.merge_users import plan
    from peso.runs.pairs import read_pairs
    from peso.runs.workspace import Workspace

    if (user is None) != (into is None):
        raise UsageError("give two users: the one to merge, then the one to merge it into")
    pairs = read_pairs(file, "user", ("from", "into")) if file else []
    if user is not None and into is not None:
        pairs.insert(0, (user, into))
    if not pairs:
        raise UsageError("name two users, or a file of such pairs with --file")
    opened = Workspace.open(workspace)
    with opened.lock():
        planned = plan(opened, pairs)
        known = f"; {len(planned.same):,} were merged before" if planned.same else ""
        fresh = f" ({listed(planned.new, 3)} without events so far)" if planned.new else ""
        what = f"{len(planned.users):,} users into others{fresh}{known}"
        if rows := list(planned.users.items()):
            if not as_json:
                table(f"{workspace}: users to merge", ["from", "into"], rows[:SHOWN])
            go = yes or confirm(f"{workspace}: merge {what}?", "nothing was merged")
            if go:
                make_one(opened, pairs, Terminal())
        else:
            go = True
    if as_json:
        say_json({"merged": planned.users, "unchanged": planned.same, "new": planned.new, "done": go})
        return
    say(f"{workspace}: merged {what}" if go else "nothing was merged")
    next_steps(["users", "list", "-w", workspace])


def show(workspace: Directory, as_json: Json = False) -> None:
    """Show the users that were merged, and the user that each was merged into.

    Example: peso users list -w runs/shop
    """
    from peso.events.stream import MERGED
    from peso.runs.workspace import Workspace

    stream = Workspace.open(workspace).stream
    times = {merge["from"]: merge["time"] for merge in stream.manifest.get(MERGED, [])}
    if as_json:
        say_json({"merged": stream.merged_users})
        return
    rows = [[before, now, times[before]] for before, now in stream.merged_users.items()]
    table(f"{workspace}: {len(rows):,} users were merged", ["user", "is now", "since"], rows)
    next_steps(["users", "merge", "FROM", "INTO", "-w", workspace])
