"""The state of a workspace in production: its stages and their parents, and which one serves."""

from __future__ import annotations

from typing import Any

from peso.errors import WorkspaceError
from peso.events.received import ReceivedEvents
from peso.runs.served import previous, served, serving_stage
from peso.runs.stage import RunStage
from peso.runs.user_histories import cuts_of
from peso.runs.workspace import Workspace

NEVER_PROMOTED = "no stage was promoted yet, so the newest trained one serves"


def status(workspace: Workspace) -> dict[str, Any]:
    """What ``peso status`` tells, as plain values.

    Returns:
        ``gate``: whether it is on. ``serves``: ``stage`` (None: none is trained), ``since``, ``by`` (None:
        never promoted), ``reason``, ``forced``, ``pinned``, ``previous`` (where a rollback leads) and
        ``problem`` (None, or why the recorded stage cannot answer). ``stages``: the lineage, see
        :func:`_stage`. ``waiting``: stages that are not trained yet, items without a semantic ID, and
        received events that are in no stage (None: no event was received yet).

    Raises:
        WorkspaceError: a file that is needed is damaged.
    """
    trained = workspace.stages
    serves = _serves(workspace) if trained else dict.fromkeys(("stage", "since", "by", "reason"))
    stages = workspace.stream.stages if workspace.has_stream else 0
    return {
        "workspace": str(workspace.root),
        "gate": workspace.config.gate.enabled,
        "serves": serves,
        "stages": [{**_stage(stage), "serves": stage.number == serves["stage"]} for stage in trained],
        "waiting": {
            "stages": list(range(len(trained), stages)),
            "items_without_id": workspace.items_without_id,
            "received": _received(workspace),
        },
    }


def _received(workspace: Workspace) -> int | None:
    if not workspace.events_file.exists():
        return None
    with ReceivedEvents(workspace.events_file) as received:
        cuts = cuts_of(workspace.stream, received.id) if workspace.has_stream else []
        return sum(map(len, received.waiting(cuts)))


def _serves(workspace: Workspace) -> dict[str, Any]:
    known = served(workspace)
    problem = None
    try:
        serving_stage(workspace)
    except WorkspaceError as error:
        problem = str(error)
    if (latest := known.latest) is None:
        newest = workspace.trained()
        told = {"stage": newest.number, "since": newest.manifest.get("created"), "by": None}
        told |= {"reason": NEVER_PROMOTED, "forced": False, "pinned": False}
    else:
        told = latest.model_dump(include={"stage", "by", "reason", "forced", "pinned"})
        told["since"] = latest.time
    return {**told, "previous": previous(workspace, known), "problem": problem}


def _stage(stage: RunStage) -> dict[str, Any]:
    """One stage of the lineage: what it was trained from, how and when, when its weights were pruned (None:
    they are there), its metrics on its own test cases (None where it is not tested), and the verdict of its
    gate (None where it was not judged)."""
    from peso.runs.report import strategy_label

    manifest, config, verdict = stage.manifest, stage.config, stage.verdict
    parent = manifest.get("parent")
    metrics = None
    if stage.is_tested:
        tested = stage.metrics["test"]["metrics"]
        metrics = {name: estimate["value"] for name, estimate in tested.items()}
    return {
        "stage": stage.number,
        "parent": None if parent is None else parent["stage"],
        "strategy": strategy_label(config) if stage.number else None,
        "trained": manifest.get("created"),
        "determined_by": stage.determined_by,
        "pruned": None if stage.pruned is None else stage.pruned["time"],
        "metrics": metrics,
        "gate": verdict and {key: verdict[key] for key in ("decision", "champion", "says", "time")},
    }
