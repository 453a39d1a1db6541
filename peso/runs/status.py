"""The state of a workspace: its stages, which one serves, and what is waiting."""

from __future__ import annotations

from typing import Any

from peso.errors import WorkspaceError
from peso.events.received import ReceivedEvents
from peso.runs.served import is_lost, previous, served, serving_stage
from peso.runs.stage import CHANGED_CODES, RunStage
from peso.runs.user_histories import cuts_of
from peso.runs.workspace import Workspace

NEVER_PROMOTED = "no stage was promoted yet, so the newest trained one serves"
NOTHING_SERVES = {
    **dict.fromkeys(("stage", "since", "by", "reason")),
    "forced": False,
    "pinned": False,
    "previous": None,
    "problem": None,
}


def status(workspace: Workspace) -> dict[str, Any]:
    """The output of ``peso status``, JSON-serializable.

    Returns:
        ``gate``: whether it is enabled. ``serves``: ``stage`` (None: none is trained, or ``served.json`` is
        lost), ``since``, ``by`` (None: never promoted), ``reason``, ``forced``, ``pinned``, ``previous`` (the
        target of a rollback) and ``problem`` (why the stage that should serve cannot be loaded, or is not
        known; or None). ``stages``: the lineage, see :func:`_stage`. ``waiting``: untrained stages, items
        without a semantic ID, stages whose codes are not refreshed (if there are any), and received events
        that are in no stage yet (None: no event was received).

    Raises:
        WorkspaceError: a file is damaged.
    """
    trained = workspace.stages
    serves = _serves(workspace) if trained else NOTHING_SERVES
    stages = workspace.stream.stages if workspace.has_stream else 0
    unrefreshed = workspace.stages_without_refresh
    return {
        "workspace": str(workspace.root),
        "gate": workspace.config.gate.enabled,
        "serves": serves,
        "stages": [{**_stage(stage), "serves": stage.number == serves["stage"]} for stage in trained],
        "waiting": {
            "stages": list(range(len(trained), stages)),
            "items_without_id": workspace.items_without_id,
            **({"stages_without_refresh": unrefreshed} if unrefreshed else {}),
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
        if is_lost(workspace):
            return {**NOTHING_SERVES, "problem": problem}
        newest = workspace.trained()
        serves = {"stage": newest.number, "since": newest.manifest.get("created"), "by": None}
        serves |= {"reason": NEVER_PROMOTED, "forced": False, "pinned": False}
    else:
        serves = latest.model_dump(include={"stage", "by", "reason", "forced", "pinned"})
        serves["since"] = latest.time
    return {**serves, "previous": previous(workspace, known), "problem": problem}


def _stage(stage: RunStage) -> dict[str, Any]:
    """One stage of the lineage: parent, strategy, time of training, number of items that changed codes (with
    ``items.refresh``), time of pruning (None: it has its weights), metrics on its own test cases (None:
    not tested), and the gate's verdict (None: not judged)."""
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
        **({CHANGED_CODES: manifest[CHANGED_CODES]} if CHANGED_CODES in manifest else {}),
        "pruned": None if stage.pruned is None else stage.pruned["time"],
        "metrics": metrics,
        "gate": verdict and {key: verdict[key] for key in ("decision", "champion", "says", "time")},
    }
