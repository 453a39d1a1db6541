"""`peso run` and `peso update`: the steps of a run in order, skipping those that are done.

A step is done when its files exist: ingest → stream/, tokenize → semantic_ids/, learn → stages/{t}/, test →
predictions and metrics in stages/{t}/. PyTorch is imported only where it is needed, so that a refused command
answers at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from peso.config import Config
from peso.config.shape import changed_shape, is_later
from peso.errors import WorkspaceError
from peso.runs import report
from peso.runs.baselines import check_data, run_baselines
from peso.runs.challenger import is_judged, judge, keep_serving
from peso.runs.checks import check_configuration, check_surroundings, rehearse
from peso.runs.evaluate import require_enough_ids, test
from peso.runs.preparation import ingest, tokenize, tokenize_new
from peso.runs.reuse import refuse_base, take_base
from peso.runs.sizes import require_sizes
from peso.runs.stage import METRICS, RunStage
from peso.runs.workspace import Workspace
from peso.runtime.machine import require_device
from peso.runtime.processes import current
from peso.runtime.progress import Observer, Silent


@dataclass(frozen=True)
class Step:
    """`ingest`, `tokenize`, or `learn` or `test` of a stage, the latter on its own cases or on those of the
    stage ``on``."""

    name: str
    stage: int | None = None
    on: int | None = None

    def __str__(self) -> str:
        where = "" if self.on is None else f" on stage {self.on}"
        return self.name if self.stage is None else f"{self.name} stage {self.stage}{where}"


def missing_steps(workspace: Workspace, stages: int, previous: bool = False) -> Iterator[Step]:
    """The steps that are not done, in order.

    Args:
        stages: number of stages in the stream.
        previous: whether the model before the newest one is also tested on the newest stage's cases.
    """
    if not workspace.has_stream:
        yield Step("ingest")
    if not workspace.has_semantic_ids or workspace.lacks_semantic_ids:
        yield Step("tokenize")
    for number in range(stages):
        stage = workspace.stage(number)
        if not stage.is_trained:
            yield Step("learn", number)
        pruned = stage.is_trained and stage.pruned is not None
        if workspace.config.evaluation.enabled and not pruned and not stage.is_tested:
            if workspace.has_stream and not stage.on(number).has_cases:
                continue
            yield Step("test", number)
    if previous and stages > 1 and workspace.config.evaluation.enabled:
        newest, before = stages - 1, workspace.stage(stages - 2)
        answers = before.on(newest)
        pruned = before.is_trained and before.pruned is not None
        if not pruned and not answers.is_done and (not workspace.has_stream or answers.has_cases):
            yield Step("test", before.number, on=newest)


def run(
    workspace: Workspace,
    base: Path | None = None,
    observer: Observer | None = None,
    previous: bool = False,
) -> None:
    """Do all steps that are not done, then write the report. The caller holds the workspace's lock.

    Several processes (:mod:`peso.runtime.processes`) learn and test together; the main one does the rest.

    Args:
        base: a workspace from which stage 0 is taken over.
        observer: receives the progress; by default nothing is printed.
        previous: whether the model before the newest one is also tested on the newest stage's cases, as
            :func:`update` does, so that the report compares the two.

    Raises:
        PesoError: a step failed. Completed steps stay.
    """
    observer = observer or Silent()
    prepare = partial(_prepare, workspace, base, observer, previous)
    steps, workspace.config = current().on_main(prepare)
    for step in steps:
        assert step.stage is not None
        if step.name == "learn":
            learn(workspace.stage(step.stage), observer)
        else:
            test(workspace.stage(step.stage).on(step.stage if step.on is None else step.on), observer)
    if workspace.config.evaluation.enabled:
        current().on_main(partial(_conclude, workspace, observer))


def _prepare(
    workspace: Workspace, base: Path | None, observer: Observer, previous: bool
) -> tuple[list[Step], Config]:
    """Do the steps before the stages; returns the missing steps of the stages, and the configuration with the
    sizes that the stream determines."""
    source = None if base is None else Workspace.open(base)
    if 0 in workspace.finished_stages:
        source = None
    else:
        if source is not None:
            refuse_base(workspace, source)
        rehearse_stages(workspace, observer)
    if not workspace.has_stream:
        ingest(workspace, observer)
        if source is not None:
            refuse_base(workspace, source)
    require_sizes(workspace.stream.manifest, workspace.config)
    check_data(workspace.config, workspace.stream)
    if not workspace.has_semantic_ids:
        tokenize(workspace, observer)
    elif workspace.lacks_semantic_ids:
        tokenize_new(workspace, observer)
    require_catalogue(workspace)
    if source is not None:
        take_base(workspace, source, observer)
    return list(missing_steps(workspace, workspace.stream.stages, previous)), workspace.config


def _run_hybrids(workspace: Workspace, observer: Observer) -> None:
    """Run the configured hybrids before the gate promotes a stage, because a server may answer with one."""
    run_baselines(workspace, [config for config in workspace.config.baselines if config.fused], observer)


def _conclude(workspace: Workspace, observer: Observer) -> None:
    """Run the baselines and write the report."""
    run_baselines(workspace, workspace.config.baselines, observer)
    observer.begin("writing the report", 0, "")
    report.report([workspace], workspace.report_directory)
    observer.end()
    if workspace.config.tracking:
        from peso.runs.tracking import publish

        publish(workspace, observer, workspace.report_directory)


def rehearse_stages(workspace: Workspace, observer: Observer) -> None:
    """Download the backbone if needed, and check that a stage can be trained, see :mod:`peso.runs.checks`."""
    check_configuration(workspace.config)
    check_surroundings(workspace)
    from peso.runs.learn import pull_backbone

    pull_backbone(workspace, observer)
    rehearse(workspace)


def require_catalogue(workspace: Workspace) -> None:
    """Raise DataError if the evaluation asks for longer lists than the catalog allows, or the report for
    unknown segments."""
    if workspace.config.evaluation.enabled:
        require_enough_ids(workspace.config, workspace.semantic_ids)
    if workspace.config.report.segments:
        known = report.catalogue(workspace)
        for column in workspace.config.report.segments:
            known.require_column(column)


def learn(stage: RunStage, observer: Observer) -> None:
    """Train one stage from the state of the previous one, and commit stages/{t}/.

    If interrupted and called again, it continues at its newest checkpoint with bit-identical results.

    Raises:
        WorkspaceError: the previous stage is not trained, or this one already is.
        TrainingError: see :func:`peso.training.loop.train_stage`.
    """
    current().on_main(partial(require_next, stage))
    require_device(stage.workspace.config.training.device)
    from peso.runs.learn import learn_stage

    learn_stage(stage, observer)
    if stage.workspace.config.tracking:
        from peso.runs.tracking import publish

        publish(stage.workspace, observer)


def require_next(stage: RunStage) -> None:
    """Raise WorkspaceError unless this stage is the next one to train."""
    workspace, number = stage.workspace, stage.number
    workspace.require_semantic_ids()
    require_sizes(workspace.stream.manifest, workspace.config)
    if new := workspace.items_without_id:
        raise WorkspaceError(
            f"{new:,} item{'s' * (new > 1)} of the stream in {workspace.root} "
            f"{'have' if new > 1 else 'has'} no semantic ID yet; "
            f"run `peso tokenize --append -w {workspace.root}` first"
        )
    if workspace.stages_without_refresh:
        raise WorkspaceError(
            f"the semantic IDs of {workspace.root} are not refreshed for its newest stages yet "
            f"(items.refresh); run `peso tokenize --append -w {workspace.root}` first"
        )
    if stage.is_trained:
        raise WorkspaceError(
            f"stage {number} of {workspace.root} is trained already; `peso undo -w {workspace.root}` removes "
            "the last stage"
        )
    if number and not stage.before.is_trained:
        raise WorkspaceError(
            f"stage {number} of {workspace.root} starts from stage {number - 1}, which is not trained yet"
        )


def update(workspace: Workspace, observer: Observer) -> int | None:
    """Train the next stage, or finish an interrupted update.

    With evaluation enabled, the new model and the one before it are tested on the new stage's test cases, the
    gate decides if it is enabled, and the report is written again.

    Returns:
        The stage that was trained or finished; None if there was nothing to do.

    Raises:
        WorkspaceError: stage 0 is not trained.
    """
    number, trained = current().on_main(partial(unfinished, workspace))
    if number is None:
        return None
    gated = workspace.config.gate.enabled
    if gated:
        current().on_main(partial(keep_serving, workspace))
    stage = workspace.stage(number)
    if not trained:
        learn(stage, observer)
    if workspace.config.evaluation.enabled:
        for later in range(1, number + 1):
            own = workspace.stage(later)
            if own.pruned is None and own.on(later).has_cases:
                test(own.on(later), observer)
        if stage.before.pruned is None and stage.on(number).has_cases:
            test(stage.before.on(number), observer)
        if gated:
            current().on_main(partial(_run_hybrids, workspace, observer))
            judge(stage, observer)
        current().on_main(partial(_conclude, workspace, observer))
    return number


def refuse_unused(workspace: Workspace) -> None:
    """Raise WorkspaceError if settings of later stages were changed, but :func:`update` has only a trained
    stage to finish, to which they would not apply."""
    number, trained = unfinished(workspace)
    if number is None or not trained:
        return
    changed = changed_shape(workspace.stage(number).config, workspace.config, number)
    if unused := [key for key in changed if is_later(key)]:
        raise WorkspaceError(
            f"{', '.join(unused)}: no stage is left to train with this. Stage {number} of {workspace.root} "
            "was trained with other settings; finish its tests and the report (`peso update -w "
            f"{workspace.root}`), or undo its training (`peso undo -w {workspace.root}`)"
        )


def unfinished(workspace: Workspace) -> tuple[int | None, bool]:
    """The stage that an update would train or finish, or None, and whether it is trained already.

    Raises:
        WorkspaceError: stage 0 is not trained.
    """
    finished = workspace.finished_stages
    if not finished:
        raise WorkspaceError(
            f"{workspace.root} has no base stage yet; run `peso train -w {workspace.root}` first"
        )
    newest = finished[-1]
    judged = not newest or not workspace.config.gate.enabled or is_judged(workspace.stage(newest))
    if not judged:
        return newest, True
    if newest + 1 < workspace.stream.stages:
        return newest + 1, False
    enabled = workspace.config.evaluation.enabled
    concluded = newest == 0 or not enabled or _is_reported(workspace.stage(newest))
    return (None if concluded else newest), True


def _is_reported(stage: RunStage) -> bool:
    """Whether the stage and the model before it (unless pruned) are tested, and the report is newer."""
    page = stage.workspace.report_directory / "index.html"
    due = [stage.on(stage.number)]
    due += [stage.before.on(stage.number)] if stage.before.pruned is None else []
    return page.is_file() and all(
        tested.is_done and page.stat().st_mtime >= tested.path(METRICS).stat().st_mtime
        for tested in due
        if tested.has_cases
    )
