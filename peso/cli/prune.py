"""`peso prune`: remove the weights of old stages."""

from __future__ import annotations

from typing import Annotated

import typer

from peso.cli.display import Directory, Json, confirm, say, say_json


def prune(
    workspace: Directory,
    keep: Annotated[int, typer.Option(help="Number of newest stages that keep their weights.", min=1)],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    as_json: Json = False,
) -> None:
    """Remove the weights of old stages from the disk.

    Their configuration, tests and logs stay, so reports, `peso status` and further updates work as before.
    The weights of the stage that serves, of the stage that a rollback would return to, and of a stage 0 that
    trained the backbone are never removed. A stage without weights cannot make recommendations, and
    `peso undo` cannot return to it.

    Example: peso prune -w runs/shop --keep 3
    """
    from dataclasses import asdict

    from peso.runs.prune import prune as remove
    from peso.runs.prune import pruning
    from peso.runs.workspace import Workspace

    opened = Workspace.open(workspace)
    with opened.lock():
        wanted = pruning(opened, keep)
        what = f"the weights of stages {wanted.stages} ({wanted.bytes / 1e6:,.1f} MB)"
        question = f"{workspace}: remove {what}? They cannot be restored"
        go = bool(wanted.stages) and (yes or confirm(question, "nothing was removed"))
        if go:
            wanted = remove(opened, keep)
    if as_json:
        say_json({**asdict(wanted), "removed": go})
        return
    if go:
        say(f"{workspace}: removed {what}")
    else:
        say("nothing was removed" if wanted.stages else f"{workspace}: no older stage has weights to remove")
    for number, why in wanted.kept.items():
        say(f"stage {number} keeps its weights: {why}")
