"""The steps of `peso run` after `ingest` (tokenize, train, update, evaluate, report)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import typer

from peso.cli.display import (
    Directory,
    Json,
    Overrides,
    Stage,
    Terminal,
    Trust,
    counted,
    next_step_of,
    next_steps,
    say,
    say_json,
    show_results,
    table,
    watcher,
)
from peso.cli.promotion import show_drift, show_verdict
from peso.errors import PesoError, UsageError
from peso.runs.place import CONFIG, require_place
from peso.runs.workspace import Workspace, trusted_classes
from peso.runtime.processes import current


def tokenize(
    workspace: Directory,
    append: Annotated[
        bool,
        typer.Option(
            "--append",
            help="Only for new items in the stream; existing IDs do not change, unless items.refresh is set.",
        ),
    ] = False,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Give every item a semantic ID; print the quality of the IDs.

    Example: peso tokenize -w runs/games

    Example: peso tokenize --append -w runs/shop
    """
    from peso.runs import diagnosis, preparation

    anew = "" if append else "semantic IDs"
    with Workspace.change(workspace, overrides or [], anew=anew) as opened:
        manifest = (preparation.tokenize_new if append else preparation.tokenize)(opened, Terminal())
    if as_json:
        say_json(manifest)
        return
    for title, columns, rows in diagnosis.quality_tables(manifest):
        table(f"{opened.semantic_ids_directory}: {title}", columns, rows)
    next_steps(next_step_of(opened))


def train(workspace: Directory, overrides: Overrides = None, trust: Trust = None) -> None:
    """Train the base stage (stage 0).

    Example: peso train -w runs/games --set training.epochs=2
    """
    from peso.runs import pipeline

    with _together(workspace, overrides, trust) as opened:
        current().on_main(lambda: pipeline.require_next(opened.stage(0)))
        current().on_main(lambda: pipeline.rehearse_stages(opened, watcher()))
        pipeline.learn(opened.stage(0), watcher())
    if current().is_main:
        next_steps(["evaluate", "-w", workspace], next_step_of(opened))


def update(
    workspace: Directory,
    alert: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND",
            help="Run this program when the gate keeps the previous stage, drift is high (gate.drift), or "
            "the update fails. It gets one JSON object on its standard input, and runs without a shell.",
        ),
    ] = None,
    from_events: Annotated[
        bool,
        typer.Option(
            "--from-events", help="First make a stage from the events that were received since the last one."
        ),
    ] = False,
    items: Annotated[
        str | None,
        typer.Option("--items", help="With --from-events: the product table. Default: data.items.path."),
    ] = None,
    overrides: Overrides = None,
    trust: Trust = None,
) -> None:
    """Train the next stage, starting from the last one, and compare the new model with the previous one.

    Both models are tested on the new stage's test cases, and the report is updated. With
    evaluation.enabled: false, the stage is only trained.

    With gate.enabled: true, the new stage serves only if it passes against the stage that serves.

    With --from-events, an interrupted update is finished first; then the events that `peso serve` has
    received become a stage, and its new items get semantic IDs. Events wait for a later stage if no user has
    three of them yet, or if their item is not in the product table.

    --set can change the settings of later stages (strategy, training.later); they apply from this stage on.

    Example: peso update -w runs/games

    Example: peso update -w runs/shop --from-events

    Example: peso update -w runs/games --set strategy.strength=2 --set training.later.epochs=2

    Example: peso update -w runs/shop --set gate.enabled=true --alert "mail -s peso ops@example.org"
    """
    from peso.cli.alert import Alert
    from peso.runs import pipeline
    from peso.runs.report import before_and_after

    if items is not None and not from_events:
        raise UsageError("--items needs --from-events; `peso ingest --items FILE` corrects the product table")
    alerts, stage = Alert.of(alert, workspace), None
    with (
        alerts.on_failure(),
        suppress(_NothingToDo),
        _together(workspace, overrides, trust, later=True) as opened,
    ):
        if overrides:
            current().on_main(lambda: pipeline.refuse_unused(opened))
        if from_events:
            current().on_main(lambda: _give_new_ids(opened))
            stage = _finish(opened)
            current().on_main(lambda: _cut_received(opened, items))
        stage = pipeline.update(opened, watcher()) or stage
        if stage is None:
            raise _NothingToDo
    if not current().is_main:
        return
    if stage is None:
        stages = len(opened.finished_stages)
        unused = "; the values of --set are not stored" if overrides else ""
        say(f"{opened.root}: all {stages} stages are trained; there is nothing to do{unused}")
        next_steps(next_step_of(opened))
        return
    say(f"{opened.root}: stage {stage} is trained")
    show_drift(opened.stage(stage), alerts)
    if not opened.config.evaluation.enabled:
        say("not tested, because evaluation.enabled is false")
        next_steps(["evaluate", "-w", opened.root])
        return
    table(*before_and_after(opened))
    show_results("averages so far", [opened])
    say(f"report: {opened.report_directory / 'index.html'}")
    show_verdict(opened.stage(stage), alerts)
    next_steps(["diagnose", "-w", opened.root], next_step_of(opened))


def _give_new_ids(opened: Workspace) -> None:
    """As `peso tokenize --append`, if it is needed."""
    from peso.runs import preparation

    if opened.lacks_semantic_ids:
        preparation.tokenize_new(opened, watcher())


def _finish(opened: Workspace) -> int | None:
    """Finish earlier updates, so that received events become the stage after theirs. Returns the newest stage
    that was trained or finished; None if nothing was left."""
    from peso.runs import pipeline

    done = None
    while (left := current().on_main(lambda: pipeline.unfinished(opened)[0])) is not None and left != done:
        done = pipeline.update(opened, watcher())
    return done


def _cut_received(opened: Workspace, items: str | None) -> None:
    from peso.runs.intake import cut_received

    cut = cut_received(opened, watcher(), items)
    if cut.stage is None:
        say(f"{opened.root}: no stage was made from received events: {cut.why}")
    else:
        say(
            f"stage {cut.stage}: {cut.events:,} received events of {cut.users:,} users; "
            f"{counted(cut.new_items, 'new item')}"
        )
    if cut.unknown_items:
        say(
            f"warning: items of received events that are not in the product table: {cut.unknown_items:,} "
            f"(such as {cut.example!r}). Their events wait. Add rows for them, or give another table with "
            "--items FILE"
        )
    if cut.waiting:
        say(f"{cut.waiting:,} received events wait for a later stage")
    _give_new_ids(opened)


def evaluate(
    workspace: Directory,
    stage: Stage = None,
    on: Annotated[
        int | None, typer.Option(help="Use the test cases of this stage. Default: the model's stage.")
    ] = None,
    overrides: Overrides = None,
    trust: Trust = None,
    as_json: Json = False,
) -> None:
    """Test a stage's model on a stage's test cases: hits, NDCG, MRR and the log-probability of the target.

    Example: peso evaluate -w runs/games --stage 0 --on 4
    """
    from peso.runs.evaluate import test
    from peso.runs.report import metric_table

    with _together(workspace, overrides, trust) as opened:
        wanted = opened.trained(stage)
        cases = wanted.number if on is None else on
        metrics = test(wanted.on(cases), watcher())
    if not current().is_main:
        return
    if as_json:
        say_json(metrics)
        return
    title = f"{opened.root}: model after stage {wanted.number} on the test cases of stage {cases}"
    table(title, *metric_table(metrics))
    next_steps(["report", "-w", opened.root], next_step_of(opened))


def report(
    workspaces: Annotated[
        list[Path], typer.Option("-w", "--workspace", help="A workspace. Can be repeated.")
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Default: report/ of the first workspace.")
    ] = None,
) -> None:
    """Write the report: one self-contained HTML page, with its tables and plots as separate files.

    Example: peso report -w runs/none -w runs/single -w runs/peso -o runs/report
    """
    from peso.errors import WorkspaceError
    from peso.evaluation.report import refuse_foreign
    from peso.runs.baselines import run_cheap_baselines
    from peso.runs.report import report as write_report

    for path in workspaces:
        if [other.resolve() for other in workspaces].count(path.resolve()) > 1:
            raise UsageError(f"-w {path} is given more than once; give each workspace once")
    opened = [Workspace.open(path) for path in workspaces]
    directory = output or opened[0].report_directory
    if directory.resolve() != opened[0].report_directory.resolve():
        require_place(directory)
    refuse_foreign(directory)
    try:
        with opened[0].lock():
            run_cheap_baselines(opened[0], watcher())
    except WorkspaceError as reason:  # for example, a run holds the lock
        watcher().note(f"the report shows only the finished baselines: {reason}")
    observer = watcher()
    observer.begin("writing the report", 0, "")
    write_report(opened, directory)
    observer.end()
    show_results("averages over the later stages", opened)
    say(f"report: {directory / 'index.html'}")
    next_steps(["diagnose", "-w", opened[-1].root], ["recommend", "-w", opened[-1].root, "--user", "USER"])


class _NothingToDo(PesoError):
    """Raised within :meth:`Workspace.change`, so that the configuration of the workspace does not change."""


@contextmanager
def _together(
    path: Path, overrides: list[str] | None, trust: list[str] | None, *, later: bool = False
) -> Iterator[Workspace]:
    """:meth:`Workspace.change` for commands that can run in several processes."""
    from peso.config import load_config
    from peso.runs.checks import check_configuration
    from peso.runtime.processes import join

    Workspace.open(path)  # raises where there is none
    config = load_config(path / CONFIG, overrides or [])
    if overrides:
        check_configuration(config)
    join(config.training.device)
    trusted = [*(trust or []), *trusted_classes(config, overrides or [])]
    with Workspace.change(path, overrides or [], trust=trusted, later=later) as opened:
        yield opened
