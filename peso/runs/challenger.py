"""The gate of an update: it compares the new stage with the serving one, records a verdict, and promotes.

``gate.json`` of a stage contains the verdict with its figures and settings. It is written before the
promotion, so that an interrupted update can be finished. A verdict is final: changed settings of the gate
apply from the next stage on.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from peso.evaluation.verdict import Pair, compare, decide, metric_of
from peso.runs.diagnosis import stream_drift
from peso.runs.evaluate import test
from peso.runs.served import promote, serve_from_now, served, serving_stage
from peso.runs.stage import FORMAT, VERDICT, RunStage
from peso.runs.workspace import Workspace
from peso.runtime.files import write_json
from peso.runtime.manifest import replace_file
from peso.runtime.processes import current
from peso.runtime.progress import Observer
from peso.runtime.provenance import timestamp


def keep_serving(workspace: Workspace) -> None:
    """Record the serving stage before a newer one is trained, unless it is recorded already."""
    if workspace.finished_stages and served(workspace).current is None:
        serve_from_now(workspace, reason="the newest stage when the gate was turned on")


def is_judged(stage: RunStage) -> bool:
    """Whether the newest stage serves already, or has a verdict that was acted on."""
    known = served(stage.workspace)
    if known.current in (None, stage.number):
        return True
    verdict = stage.verdict
    if verdict is None:
        return False
    acted = any(  # the time excludes verdicts about an identical stage that was undone and trained again
        change.by == "gate"
        and (change.stage, change.determined_by) == (stage.number, stage.determined_by)
        and change.time >= verdict["time"]
        for change in known.changes
    )
    return acted or not verdict["promote"]


def judge(stage: RunStage, observer: Observer) -> None:
    """Test the newest stage against the serving one, write the verdict, and promote the stage if it passed.
    Several processes share the tests.

    Raises:
        WorkspaceError: the serving stage is missing, or a file is damaged.
    """
    processes = current()
    if processes.on_main(partial(is_judged, stage)):
        return
    if not processes.on_main(lambda: stage.verdict is not None):
        champion = processes.on_main(lambda: serving_stage(stage.workspace).number)
        _test(stage, stage.workspace.stage(champion), observer)
        processes.on_main(partial(_decide, stage, stage.workspace.stage(champion)))
    processes.on_main(partial(_act, stage, observer))


def _test(challenger: RunStage, champion: RunStage, observer: Observer) -> None:
    """Make the predictions on which the verdict is based."""
    gate, number = challenger.workspace.config.gate, challenger.number
    for model in (champion, challenger):
        test(model.on(number), observer)
        if gate.cases == "validation":
            test(model.on(number, "validation"), observer)
        if model.on(champion.number).has_cases:
            test(model.on(champion.number), observer)


def _decide(challenger: RunStage, champion: RunStage) -> None:
    """Write the verdict."""
    config, number = challenger.workspace.config, challenger.number
    gate = config.gate

    def pair(cases: int, part: Any = "test") -> Pair:
        return Pair(champion.on(cases, part).predictions, challenger.on(cases, part).predictions)

    def compared(given: Pair) -> dict[str, Any]:
        return compare(given, metric_of(gate), gate.delta, gate.confidence)

    tested, known = pair(number), served(challenger.workspace)
    earlier = pair(champion.number) if champion.on(champion.number).has_cases else None
    verdict = decide(
        gate,
        tested if gate.cases == "test" else pair(number, gate.cases),
        earlier,
        gate.k or max(config.evaluation.k),
        _anchor(challenger),
    )
    content = {
        "stage": number,
        "champion": champion.number,
        "determined_by": {"stage": challenger.determined_by, "champion": champion.determined_by},
        "time": timestamp(),
        "settings": {**dict(gate), "segments": gate.segments.margins},  # with defaults
        **verdict.as_json(),
        "says": verdict.says,
        "promote": verdict.decision == "passed" and not known.pinned,
        "pinned": known.pinned,
        "test": compared(tested),
        "earlier": {"cases": 0} if earlier is None else compared(earlier),
    }
    with replace_file(challenger.directory, VERDICT, FORMAT) as aside:
        write_json(aside, content)


def _act(stage: RunStage, observer: Observer) -> None:
    """Promote the stage if it passed."""
    verdict = stage.verdict
    assert verdict is not None
    champion = verdict["champion"]
    if verdict["decision"] != "passed":
        observer.note(f"gate: stage {stage.number} is {verdict['decision']}, stage {champion} keeps serving")
    elif not verdict["promote"]:
        observer.note(f"gate: stage {stage.number} passed, but stage {champion} is pinned and keeps serving")
    elif promote(stage.workspace, stage.number, by="gate", reason=verdict["says"], instead_of=champion):
        observer.note(f"gate: stage {stage.number} passed and serves now, in place of stage {champion}")
    else:
        observer.note(
            f"gate: stage {stage.number} passed against stage {champion}, but another stage was promoted or "
            "pinned meanwhile and keeps serving"
        )


def _anchor(stage: RunStage) -> tuple[bool, str] | None:
    """Whether the anchor of the stage had an effect or was disabled, and a sentence; None if nothing was
    trained."""
    training = stage.training
    if not training:
        return None
    found, strategy = training.get("anchor") or {}, training.get("strategy", {})
    if found.get("finding"):
        return False, f"anchor: {found['finding']}"
    if found.get("says"):
        return True, f"anchor: {found['says']}"
    if strategy.get("weight") or strategy.get("strength"):
        return False, f"anchor: stage {stage.number} has one, but it restrained no step"
    return True, f"anchor: stage {stage.number} was trained without one"


def high_drift(stage: RunStage) -> str | None:
    """A warning if the items of a stage differ from those of the previous stage by more than ``gate.drift``;
    else None."""
    most = stage.workspace.config.gate.drift
    if most is None or not stage.number:
        return None
    divergence = stream_drift(stage.workspace)[stage.number]["item_divergence"]
    if divergence is None or divergence <= most:
        return None
    return (
        f"the items of stage {stage.number} diverge from those of stage {stage.number - 1} by "
        f"{divergence:.3f} bits, more than gate.drift {most:g}"
    )
