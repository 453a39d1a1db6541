"""`peso status`, `peso promote` and `peso rollback`: which stage of a workspace serves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from peso.cli.alert import Alert
from peso.cli.display import Directory, Json, next_step_of, next_steps, say, say_json, table
from peso.runs.workspace import Workspace

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peso.runs.served import Change
    from peso.runs.stage import RunStage

Reason = Annotated[str | None, typer.Option("--reason", help="The reason, which is recorded.")]
Pin = Annotated[
    bool,
    typer.Option(
        "--pin", help="Keep the stage until the next manual promotion: the gate does not replace it."
    ),
]

REPORTED = {"test": "the test cases of the stage", "earlier": "the test cases of the stage that serves"}


def promote(
    workspace: Directory,
    stage: Annotated[int, typer.Option("--stage", help="The stage to serve from now on.")],
    reason: Reason = None,
    force: Annotated[
        bool, typer.Option("--force", help="Promote a stage that did not pass its gate; this is recorded.")
    ] = False,
    pin: Pin = False,
    as_json: Json = False,
) -> None:
    """Make a stage the one that serves: `peso recommend`, `peso export` and servers use it from now on.

    The change is atomic and is recorded in served.json with its time and reason. It does not wait for a
    running update.

    Example: peso promote -w runs/shop --stage 3 --reason "checked by hand"
    """
    from peso.runs import served

    opened = Workspace.open(workspace)
    _warn_of_hybrids(opened, stage)
    changed = served.promote(opened, stage, reason=reason, force=force, pinned=pin)
    latest = served.served(opened).latest
    assert latest is not None
    if as_json:
        say_json({**latest.model_dump(by_alias=True), "changed": changed})
    elif not changed:
        say(f"{workspace}: stage {stage} has been serving since {latest.time}; nothing was changed")
    else:
        say(f"{workspace}: {_promoted(served.served(opened).changes)}")
    next_steps(["status", "-w", workspace])


def _warn_of_hybrids(opened: Workspace, stage: int) -> None:
    """Print which hybrids cannot answer with a stage that is about to serve."""
    from peso.errors import WorkspaceError
    from peso.runs.hybrids import hybrids_not_run

    if stage not in opened.finished_stages or not opened.has_semantic_ids:
        return
    try:
        told = hybrids_not_run(opened, stage)
    except WorkspaceError as error:  # no reason not to promote the model
        told = [str(error)]
    for why in told:
        say(f"note: {why}. Until then, `peso serve --with` keeps the stage that it has loaded", error=True)


def _promoted(changes: Sequence[Change]) -> str:
    """What the last change did."""
    latest, earlier = changes[-1], changes[:-1]
    if latest.before != latest.stage:
        return f"stage {latest.stage} now serves instead of stage {latest.before}"
    if not earlier:
        return (
            f"stage {latest.stage}, which has served as the newest one, now serves until another is promoted"
        )
    if earlier[-1].determined_by != latest.determined_by:
        return f"stage {latest.stage} was trained again; its new model now serves"
    return f"stage {latest.stage} still serves and is now {'pinned' if latest.pinned else 'not pinned'}"


def rollback(workspace: Directory, reason: Reason = None, pin: Pin = False, as_json: Json = False) -> None:
    """Return to the stage that served before the current one.

    Repeat the command to go back further. No stage is removed. The change is recorded in served.json.

    Example: peso rollback -w runs/shop --reason "complaints since Monday"
    """
    from peso.runs import served

    opened = Workspace.open(workspace)
    if (target := served.previous(opened)) is not None:
        _warn_of_hybrids(opened, target)
    change = served.rollback(opened, reason=reason, pinned=pin)
    if as_json:
        say_json(change.model_dump(by_alias=True))
    else:
        say(f"{workspace}: stage {change.stage} serves again instead of stage {change.before}")
    next_steps(["status", "-w", workspace])


def status(workspace: Directory, as_json: Json = False) -> None:
    """Show the stages of a workspace, the verdicts of the gate, and which stage serves, since when and why.

    Example: peso status -w runs/shop
    """
    from peso.runs.status import status as read_status

    opened = Workspace.open(workspace)
    told = read_status(opened)
    if as_json:
        say_json(told)
    else:
        _show(told)
    next_steps(next_step_of(opened))


def _show(told: dict[str, Any]) -> None:
    from peso.runs.undo import stages_named

    if told["stages"]:
        metrics = list(dict.fromkeys(name for stage in told["stages"] for name in stage["metrics"] or {}))
        shown = [name for name in metrics if name.startswith(("ndcg@", "hit@"))]
        table(
            f"{told['workspace']}: stages, with their metrics on their own test cases",
            ["stage", "from", "strategy", "trained", *shown, "gate", "serves"],
            [
                [
                    stage["stage"],
                    stage["parent"],
                    stage["strategy"] or "base",
                    stage["trained"] or "unknown",
                    *((stage["metrics"] or {}).get(name) for name in shown),
                    stage["gate"]["decision"] if stage["gate"] else "",
                    "serves" if stage["serves"] else "no weights (pruned)" if stage["pruned"] else "",
                ]
                for stage in told["stages"]
            ],
        )
    for stage in told["stages"]:
        if changed := stage.get("changed_codes"):
            say(f"stage {stage['stage']}: items with new codes: {changed:,}")
    for stage in told["stages"]:
        if stage["gate"] and stage["gate"]["decision"] != "passed":
            verdict = stage["gate"]
            say(
                f"stage {stage['stage']} was {verdict['decision']} against stage {verdict['champion']}: "
                f"{verdict['says']}"
            )
    serves, waiting = told["serves"], told["waiting"]
    if serves["stage"] is None:
        say(
            f"warning: {serves['problem']}"
            if serves["problem"]
            else "no stage serves, because none is trained yet"
        )
    else:
        how = f", by {serves['by']}" if serves["by"] else ""
        how += " (forced: it had not passed its gate)" if serves["forced"] else ""
        how += ", pinned" if serves["pinned"] else ""
        why = f": {serves['reason']}" if serves["reason"] else ""
        say(f"stage {serves['stage']} has been serving since {serves['since'] or 'its training'}{how}{why}")
        if serves["problem"]:
            say(f"warning: {serves['problem']}")
        if serves["previous"] is not None:
            say(f"a rollback would return to stage {serves['previous']}")
    if stages := waiting["stages"]:
        say(f"not trained yet: {stages_named(range(stages[0], stages[-1] + 1))}")
    if waiting["items_without_id"]:
        say(f"new items without a semantic ID: {waiting['items_without_id']:,}")
    if unrefreshed := waiting.get("stages_without_refresh"):
        say(f"newest stages whose codes are not refreshed yet: {unrefreshed:,}")
    if waiting["received"]:
        say(f"{waiting['received']:,} received events are not in a stage yet")


def show_verdict(stage: RunStage, alerts: Alert) -> None:
    """Print the gate's verdict on a stage, if there is one, and send an alert if the stage did not pass."""
    verdict = stage.verdict
    if verdict is None:
        return
    what = f"stage {stage.number} against stage {verdict['champion']}"
    say(f"gate: {what}: {verdict['decision']}")
    for condition in verdict["conditions"]:
        waived = condition["outcome"] != "passed" and not condition["blocks"]
        say(f"- {condition['outcome']}{' (not required)' * waived}: {condition['says']}")
    for key, cases in REPORTED.items():
        if "difference" in verdict[key]:
            say(f"- reported: difference {verdict[key]['difference']:+.4f} on {cases}")
    if verdict["decision"] != "passed":
        alerts.send(
            verdict["decision"],
            f"{what} is {verdict['decision']}, so stage {verdict['champion']} continues to serve: "
            f"{verdict['says']}",
            stage.number,
            verdict=verdict,
        )


def show_drift(stage: RunStage, alerts: Alert) -> None:
    """Print a warning and send an alert if the items of a stage drift more than ``gate.drift`` allows."""
    from peso.runs.challenger import high_drift

    if (finding := high_drift(stage)) is not None:
        say(f"warning: {finding}")
        alerts.send("drift", finding, stage.number)
