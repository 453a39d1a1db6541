"""Training of one stage of a workspace with its strategy; the result is stages/{t}/."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from peso.adapters.anchor_report import AnchorMonitor, anchor_effect, anchor_report
from peso.adapters.groups import find_groups
from peso.items.semantic_ids import INDEX_FILE
from peso.model.build import has_adapter, save_stage_weights
from peso.model.generative import GenerativeModel
from peso.runs.checks import require_shareable
from peso.runs.health import check_health
from peso.runs.models import backbone_fingerprint, changed_codes, trains_backbone, write_memory
from peso.runs.phases import FINISHED, begin, begin_phase, directory_of, keep, restore, training_of
from peso.runs.pool_weights import choose_pool_weights
from peso.runs.stage import CHANGED_CODES, CODES_OF, ERASURES, FORMAT, LOG, METRICS, RunStage
from peso.runs.tracking import Tracking
from peso.runs.trust import strategy_of
from peso.runs.workspace import Workspace
from peso.runtime import assets
from peso.runtime.files import commit_directory, read_json_lines, size_of, write_json
from peso.runtime.machine import threads
from peso.runtime.manifest import write_manifest
from peso.runtime.processes import current
from peso.runtime.progress import Observer
from peso.runtime.provenance import provenance
from peso.training.loop import train_stage
from peso.training.rate_trials import choose_rates, read_choice
from peso.training.strategies.strategy import StageContext, Strategy
from peso.training.task import Progress, StageResult, StageTask


def learn_stage(stage: RunStage, observer: Observer) -> None:
    """Train one stage from the state of the previous one, and commit stages/{t}/.

    If interrupted, it continues at its newest checkpoint with bit-identical results. Several processes
    (:mod:`peso.runtime.processes`) train together; the main one writes.

    Raises:
        TrainingError: see :func:`peso.training.loop.train_stage`.
    """
    workspace, determined_by = stage.workspace, stage.determination()
    require_shareable(workspace)
    unfinished = stage.unfinished / determined_by[:16]

    def prepare() -> None:
        pull_backbone(workspace, observer)
        for stale in set(unfinished.parent.glob("*")) - {unfinished}:  # of an earlier configuration
            shutil.rmtree(stale)

    current().on_main(prepare)
    strategy = strategy_of(workspace)  # raises before stage 0 is trained if it cannot be created
    if stage.number == 0:
        strategy = Strategy()  # the base stage is the same for all
    model, context = begin(stage)
    training: dict[str, Any] = {}
    if strategy.learns(stage.number):
        with threads(model, workspace.config.training.threads, observer):
            training = _train(stage, model, strategy, context, unfinished, observer)
    else:
        name = workspace.config.strategy.name
        observer.note(f"stage {stage.number}: strategy {name} trains nothing and keeps the previous model")
    current().on_main(partial(_commit, stage, model, context.memory, training, unfinished, determined_by))


def _commit(
    stage: RunStage,
    model: GenerativeModel,
    memory: dict[str, Tensor],
    training: dict[str, Any],
    unfinished: Path,
    determined_by: str,
) -> None:
    """Write stages/{stage}/ and remove the checkpoints."""
    workspace, number = stage.workspace, stage.number
    with commit_directory(stage.directory) as directory:
        save_stage_weights(model, directory, whole_backbone=trains_backbone(stage))
        write_memory(directory, memory)
        served = size_of(directory)
        if (unfinished / LOG).exists():
            shutil.copyfile(unfinished / LOG, directory / LOG)
        write_json(directory / METRICS, {"training": training})
        parent = {"stage": number - 1, "determined_by": stage.before.determined_by} if number else None
        manifest = {
            "stage": number,
            "determined_by": determined_by,
            "parent": parent,
            "inputs": {
                "stream": workspace.stream.fingerprint(number),
                "semantic_ids": workspace.semantic_ids_manifest["files"][INDEX_FILE],
            },
            "backbone_sha256": backbone_fingerprint(model),
            "bytes_on_disk": served,
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "configuration": workspace.config.model_dump(mode="json"),
            **({ERASURES: erasures} if (erasures := workspace.stream.erasures) else {}),
            "seed": workspace.config.seed_of_stage(number),
            **_codes(stage),
            **_chosen_rates(training),
            **provenance(),
        }
        write_manifest(directory, FORMAT, manifest)
    shutil.rmtree(unfinished.parent, ignore_errors=True)


def _codes(stage: RunStage) -> dict[str, Any]:
    """With ``items.refresh``: the stage whose codes the model uses, and the number of items whose codes
    differ from those of the previous stage's model, for the manifest."""
    if stage.workspace.config.items.refresh is None:
        return {}
    changed = len(changed_codes(stage)) if stage.number else 0
    return {CODES_OF: stage.codes_of, CHANGED_CODES: changed}


def _chosen_rates(training: dict[str, Any]) -> dict[str, Any]:
    """The rates that trials chose, for the manifest; {} without trials."""
    keys = ("phase", "learning_rate", "rows")
    chosen = [{key: choice[key] for key in keys} for choice in training.get("trials", [])]
    return {"chosen_by_trials": chosen} if chosen else {}


def _train(
    stage: RunStage,
    model: GenerativeModel,
    strategy: Strategy,
    context: StageContext,
    unfinished: Path,
    observer: Observer,
) -> dict[str, Any]:
    """Train all phases of the stage; returns the figures of the last one, with the total time."""
    number, memory = stage.number, context.memory
    before = [group.snapshot() for group in find_groups(model.backbone)] if has_adapter(model) else []
    *earlier, last = strategy.phases(number)
    spent = 0.0
    for phase in earlier:
        finished = unfinished / phase / FINISHED
        if finished.is_file():
            spent += restore(model, memory, finished)
            continue
        here = replace(context, phase=phase)
        result, _ = _train_phase(stage, model, strategy, here, unfinished, observer)
        current().on_main(partial(keep, model, memory, result.seconds, finished))
        spent += result.seconds
    here = replace(context, phase=last)
    result, task = _train_phase(stage, model, strategy, here, unfinished, observer)
    chosen = None
    if model.vocabulary.item_head is not None:
        chosen = choose_pool_weights(stage, model, observer)
    health = check_health(stage, model, observer) if stage.workspace.config.evaluation.enabled else {}
    if not current().is_main:  # only the main process writes figures
        return {}
    figures: dict[str, Any] = {"learning_rate": task.learning_rate, **asdict(result)}
    figures["seconds"] += spent
    if (scale := task.settings.rows_learning_rate_scale) != 1:
        figures["rows_learning_rate_scale"] = scale
    places = {phase: directory_of(unfinished, strategy, number, phase) for phase in (*earlier, last)}
    choices = [{"phase": phase, **(read_choice(place) or {})} for phase, place in places.items()]
    if trials := [choice for choice in choices if len(choice) > 1]:
        figures["trials"] = trials
    if chosen is not None:
        figures["item_head"] = chosen
    if health:
        figures["health"] = health
    if own := strategy.figures():
        figures["strategy"] = own
    if number and before:
        figures["moved"] = anchor_report(before, find_groups(model.backbone))
        figures["anchor"] = anchor_effect(number, read_json_lines(unfinished / LOG), own.get("rho"))
        if says := figures["anchor"]["says"]:
            observer.note(says)
    return figures


def _train_phase(
    stage: RunStage,
    model: GenerativeModel,
    strategy: Strategy,
    context: StageContext,
    unfinished: Path,
    observer: Observer,
) -> tuple[StageResult, StageTask]:
    """Train one phase; returns its result (the time includes trials) and the task that was trained."""
    config, number, phase = stage.workspace.config, stage.number, context.phase
    settings, candidates = training_of(config, strategy, number, phase)
    data = stage.workspace.stream.stage(number)
    tracking = Tracking(stage, observer)
    directory = directory_of(unfinished, strategy, number, phase)
    directory.mkdir(parents=True, exist_ok=True)
    chosen = strategy.choose(context)
    task = StageTask(
        data.training_sequences() if chosen is None else chosen,
        data.validation_cases(config.prompt.window),
        settings,
        stage=number,
        learning_rate=candidates[0].learning_rate,
        strategy=strategy,
        seed=context.seed,
        directory=directory,
        log=directory / LOG,
        context=context,
        on_progress=_progress_bar(
            number, phase, strategy, observer, lambda: tracking.follow(directory / LOG, phase)
        ),
        processes=current(),
        item_weight=0.0 if model.vocabulary.item_head is None else config.head.weight,
        head_scale=config.head.learning_rate_scale,
    )
    if len(candidates) == 1:
        seconds = 0.0
    else:
        assert config.training.later.trials is not None
        start = partial(begin_phase, stage, phase, unfinished)
        task, choice = choose_rates(model, task, candidates, config.training.later.trials, start, observer)
        observer.note(f"stage {number}{phase and ', ' + phase}: {choice}")
        seconds = choice.seconds
    result = train_stage(model, task)
    observer.end()
    tracking.follow(task.log, phase, last=True)
    tracking.close()
    return replace(result, seconds=result.seconds + seconds), task


def _progress_bar(
    stage: int, phase: str, strategy: Strategy, observer: Observer, follow: Callable[[], None]
) -> Callable[[Progress], None]:
    """Reports the steps of a training, also to trackers, and warns if the anchor has no effect."""
    title = f"learn stage {stage}" + (f", {phase}" if phase else "")
    begun, monitor = False, AnchorMonitor(stage, 0)

    def show(progress: Progress) -> None:
        nonlocal begun, monitor
        if not begun:
            observer.begin(title, progress.steps, "steps")
            begun = True
            monitor = AnchorMonitor(stage, progress.steps, strategy.figures().get("rho"))
        if stage and (warning := monitor.add(progress.record)):
            observer.note(f"warning: {warning}")
        observer.advance(
            progress.step,
            epoch=f"{progress.epoch}/{progress.epochs}",
            loss=progress.loss,
            tokens_per_second=progress.tokens_per_second,
        )
        follow()

    return show


def pull_backbone(workspace: Workspace, observer: Observer) -> None:
    """Download the backbone if it is one of peso's assets and not in the cache."""
    name = workspace.config.backbone.name
    if name in assets.names("backbone") and assets.find(name) is None:
        observer.note(f"downloading {name}, which is not in the cache yet")
        assets.pull(name, on_progress=None)
