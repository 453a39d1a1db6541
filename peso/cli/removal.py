"""`peso undo`, `peso forget` and `peso prune`: remove the last step, a user, or the weights of old stages."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from peso.cli.display import Directory, Json, Terminal, confirm, next_step_of, next_steps, say, say_json
from peso.runs.workspace import Workspace

Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")]


def undo(
    workspace: Directory,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Undo the last step: the training of the last stage, or the last append if it is not trained yet.

    Undoing the training of a stage removes its model and its tests; the events stay, and `peso update` trains
    the stage again. Undoing an append removes its events, its new items and their semantic IDs. The report is
    updated. Stage 0 and the first ingested stream are never removed. If the command is interrupted, run it
    again: it finishes the removal and removes nothing else.

    Example: peso undo -w runs/shop
    """
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


def forget(
    workspace: Directory,
    user: Annotated[str, typer.Option(help="The user's id in the log.")],
    yes: Yes = False,
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
    from peso.runs.forget import forget as erase
    from peso.runs.forget import holdings

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
    again = held.anything and opened.config.baselines and opened.finished_stages
    next_steps(["baseline" if again else "status", "-w", workspace])


def prune(
    workspace: Directory,
    keep: Annotated[int, typer.Option(help="Number of newest stages that keep their weights.", min=1)],
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Remove the weights of old stages from the disk.

    Their configuration, tests and logs stay, so reports, `peso status` and further updates work as before.
    The weights of the stage that serves, of the stage that a rollback would return to, and of a stage 0 that
    trained the backbone are never removed. A stage without weights cannot make recommendations, and
    `peso undo` cannot return to it.

    Example: peso prune -w runs/shop --keep 3
    """
    from peso.runs.prune import prune as remove
    from peso.runs.prune import pruning

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
    next_steps(["status", "-w", workspace])
