"""`peso forget`: erase one user from a workspace."""

from __future__ import annotations

from typing import Annotated

import typer

from peso.cli.display import Directory, Json, Terminal, confirm, say, say_json


def forget(
    workspace: Directory,
    user: Annotated[str, typer.Option(help="The user's id in the log.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    as_json: Json = False,
) -> None:
    """Erase one user from the workspace: stream, predictions, received events, histories and caches. Users
    that were merged into this one (`peso users merge`) are erased, too.

    Metrics are computed again without the user's cases, the report is written again, and baselines are
    removed (`peso run` runs them again). Stages stay trained and can be updated. The command lists your own
    files that still contain the user, and the trained stages that may reflect the user's events. Only
    training from scratch (strategy retrain, or a new workspace) removes these traces. An interrupted call
    can be repeated.

    Example: peso forget -w runs/shop --user 4711
    """
    from dataclasses import asdict

    from peso.runs.forget import forget as erase
    from peso.runs.forget import holdings
    from peso.runs.workspace import Workspace

    opened = Workspace.open(workspace)
    with opened.lock():
        held = holdings(opened, user)
        stream = "the rare users of the stream" if held.rare else f"stages {held.stages} of the stream"
        where = f"{stream}, {held.received:,} received events, {len(held.tests)} files of predictions"
        sure = yes or not held.anything
        who = " and ".join(map(repr, held.users))  # with those that were merged into the user
        go = sure or confirm(f"{workspace}: erase {who} ({where})?", "nothing was erased")
        if go:
            erase(opened, user, Terminal())
    if as_json:
        say_json({**asdict(held), "erased": go})
        return
    if not go:
        say("nothing was erased")
        return
    say(f"{workspace}: erased user {' and '.join(map(repr, held.users))} ({where})")
    for file in held.own_files:
        say(f"warning: {file} still contains the user, or cannot be read; peso does not change your files")
    if held.trained:
        say(
            f"warning: stages {held.trained} were trained with the user's events, and their weights may "
            "reflect them. To remove these traces, train from scratch on the remaining events: when there is "
            f"a new stage, run `peso update -w {workspace} --set strategy.name=retrain`"
        )
