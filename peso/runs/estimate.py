"""`peso run --dry-run`: the missing steps of a run, with estimates of time, memory and disk.

A few optimizer steps and searches are timed on this machine. Nothing is written: data that are not ingested
yet are read into a temporary directory.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from peso.config import Config, TrainingConfig, TrialsConfig
from peso.config.baselines import BaselineOptions, baseline_label
from peso.config.data import STREAMS
from peso.decoding import search
from peso.events.histories import Stage, TargetSequence
from peso.events.stream import Stream
from peso.items.semantic_ids import SemanticIds, write_semantic_ids
from peso.model.generative import GenerativeModel
from peso.model.inference import for_inference
from peso.runs import pipeline, preparation
from peso.runs.baselines import BaselineRun
from peso.runs.models import fresh_model, trains_backbone
from peso.runs.phases import training_of
from peso.runs.pipeline import Step
from peso.runs.sizes import require_sizes
from peso.runs.trust import strategy_of
from peso.runs.workspace import Workspace
from peso.runtime import assets
from peso.runtime.device import peak_memory
from peso.runtime.machine import threads
from peso.runtime.progress import Observer, Silent
from peso.training.likelihood import target_token_log_probabilities, validation_loss
from peso.training.plan import StagePlan, most_targets
from peso.training.rate_trials import trial_rounds, trial_steps
from peso.training.strategies.strategy import Examples, StageContext

TIMED_STEPS, TIMED_CASES = 4, 64
BYTES_A_PREDICTION = 250  # ten items with scores and labels, compressed


@dataclass(frozen=True)
class Estimate:
    """Estimated cost of one step; None: not known yet (``note`` has the reason)."""

    step: Step
    minutes: float | None = None
    memory_gib: float | None = None
    disk_mib: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Training:
    """One training of a stage. ``candidates``: number of learning rates; ``trials``: how one is chosen."""

    settings: TrainingConfig
    sequences: Sequence[TargetSequence]
    candidates: int = 1
    trials: TrialsConfig | None = None


@dataclass(frozen=True)
class Speed:
    """Seconds per optimizer step, per validated case and per tested case; peak memory; size of the trained
    weights."""

    step: float
    validation: float
    test: float
    memory_gib: float
    trained_bytes: int
    most_targets: int | None  # of a chunk, see peso.training.plan


def estimate(
    workspace: Workspace,
    speeds: dict[bool, Speed] | None = None,
    observer: Observer | None = None,
    previous: bool = False,
) -> list[Estimate]:
    """The missing steps of a run, with minutes, memory and disk.

    Args:
        workspace: the workspace; it need not exist.
        speeds: measured speeds of runs of the same shape, keyed by whether the whole backbone is trained;
            missing ones are measured and added.
        observer: receives the progress of reading the data; by default nothing is printed.
        previous: see :func:`peso.runs.pipeline.run`.

    Raises:
        PesoError: as the run itself would, for invalid data or an unusable backbone.
    """
    with readable(workspace, observer or Silent()) as (source, seconds):
        config, stream = source.config, source.stream
        require_sizes(stream.manifest, config)
        workspace, name = workspace.with_config(config), config.backbone.name
        missing = list(pipeline.missing_steps(workspace, stream.stages, previous))
        if name in assets.names("backbone") and assets.find(name) is None:
            note = f"`peso run` downloads the backbone; for an estimate run `peso pull {name}` first"
            return [Estimate(step, note="" if step.stage is None else note) for step in missing]
        speeds = {} if speeds is None else speeds
        trainings = _trainings(workspace, stream) if any(step.name == "learn" for step in missing) else {}
        result = []
        for step in missing:
            if step.stage is None:
                result.append(_data_estimate(step, source, seconds.get(step.name)))
                continue
            whole = trains_backbone(workspace.stage(step.stage))
            if whole not in speeds:
                speeds[whole] = _measure(source, stream.stage(0), whole)
            stage = stream.stage(step.stage if step.on is None else step.on)
            result.append(
                _stage_estimate(workspace, step, stage, speeds[whole], trainings.get(step.stage, []))
            )
        baselines = [baseline_estimate(workspace, options) for options in config.baselines]
        return [*result, *(each for each in baselines if each is not None)]


@dataclass(frozen=True)
class _Examples:
    """The part of :class:`peso.training.strategies.strategy.Examples` that ``Strategy.choose`` uses."""

    window: int
    of: Callable[[int], Sequence[TargetSequence]]


def _trainings(workspace: Workspace, stream: Stream) -> dict[int, list[Training]]:
    """The trainings of each stage, one per phase, with settings and training examples."""
    config, memory = workspace.config, dict[str, Tensor]()

    @cache
    def sequences(stage: int) -> Sequence[TargetSequence]:
        return stream.stage(stage).training_sequences()

    result = {0: [Training(config.training, sequences(0))]}
    for number in range(1, stream.stages):
        strategy = strategy_of(workspace)
        result[number] = []
        for phase in strategy.phases(number):
            context = StageContext(
                number,
                nn.Identity(),
                total_steps=0,
                seed=config.seed_of_stage(number),
                phase=phase,
                examples=cast(Examples, _Examples(config.prompt.window, sequences)),
                memory=memory,
            )
            chosen = strategy.choose(context) if strategy.chooses_by_data else None
            settings, rates = training_of(config, strategy, number, phase)
            result[number].append(
                Training(
                    settings,
                    sequences(number) if chosen is None else chosen,
                    len(rates),
                    config.training.later.trials,
                )
            )
    return result


def _data_estimate(step: Step, source: Workspace, seconds: float | None) -> Estimate:
    """The estimate of ingest or tokenize: the time it took for the preview."""
    if seconds is None:
        return Estimate(step, note="not estimated: item texts are not encoded for an estimate")
    stream = source.stream
    events, items = sum(count["events"] for count in stream.counts), int(stream.manifest["items"])
    what = f"{events:,} events" if step.name == "ingest" else f"{items:,} items"
    return Estimate(step, seconds / 60, note=what)


def baseline_estimate(workspace: Workspace, options: BaselineOptions) -> Estimate | None:
    """The remaining time of a baseline, from the stages that are done; None: nothing is left."""
    step = Step(f"baseline {baseline_label(options)}")
    run = BaselineRun(workspace, options) if workspace.has_semantic_ids else None
    took = [] if run is None else [run.seconds(stage) for stage in run.stages if run.is_done(stage)]
    if run is None or not took:
        return Estimate(step, note="known once its first stage is done")
    left = len(run.stages) - len(took)
    return Estimate(step, left * sum(took) / len(took) / 60) if left else None


def _stage_estimate(
    workspace: Workspace, step: Step, stage: Stage, speed: Speed, trainings: Sequence[Training]
) -> Estimate:
    config = workspace.config
    cases, strategy = len(stage.eligible()), strategy_of(workspace)
    if step.name == "test":
        disk = cases * BYTES_A_PREDICTION / 2**20
        passes = strategy.passes_per_answer if step.stage else 1
        return Estimate(step, cases * speed.test * passes / 60, speed.memory_gib, disk, f"{cases:,} cases")
    disk = speed.trained_bytes / 2**20
    if not strategy.learns(stage.number):
        return Estimate(step, 0.1, speed.memory_gib, disk, "trains nothing")
    seed, window = config.seed_of_stage(stage.number), config.prompt.window
    longer = strategy.relative_step_time if stage.number else 1.0
    steps, in_trials, seconds = 0, 0, 0.0
    for training in trainings:
        settings = training.settings
        plan = StagePlan(training.sequences, window, settings, seed, stage.number, speed.most_targets)
        judged = min(cases, settings.validation_cases or cases)
        validated, tried = judged * plan.epochs, 0
        if training.candidates > 1:
            assert training.trials is not None
            rounds = trial_rounds(len(plan), settings, training.trials, training.candidates)
            tried = trial_steps(rounds)
            validated += judged * sum(size for size, _ in rounds)
        steps, in_trials = steps + len(plan), in_trials + tried
        larger = settings.batch_size / config.training.batch_size  # relative to the steps that were timed
        seconds += (len(plan) + tried) * speed.step * larger * longer + validated * speed.validation
    note = f"{steps:,} optimizer steps" + (f" in {len(trainings)} trainings" if len(trainings) > 1 else "")
    note += ", at most" if any(training.settings.patience for training in trainings) else ""
    note += f", and {in_trials:,} in trials of the learning rate" if in_trials else ""
    return Estimate(step, seconds / 60, speed.memory_gib, disk, note)


def _measure(workspace: Workspace, stage: Stage, whole: bool) -> Speed:
    model = fresh_model(workspace, whole=whole)
    with threads(model, workspace.config.training.threads):
        return _speed(workspace.config, model, stage)


def _speed(config: Config, model: GenerativeModel, stage: Stage) -> Speed:
    sequences, most = stage.training_sequences(), most_targets(model.layout)
    plan = StagePlan(sequences, config.prompt.window, config.training, config.seed_of_stage(0), 0, most)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)

    def learn(step: int) -> None:
        for packed in plan.batch(step, model):
            (-target_token_log_probabilities(model, packed).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()

    steps = np.linspace(0, len(plan) - 1, TIMED_STEPS + 1).astype(int)
    learn(int(steps[0]))  # warm-up
    step_seconds = sum(_timed(partial(learn, int(step))) for step in steps[1:]) / TIMED_STEPS
    cases = stage.test_cases(config.prompt.window)
    some = cases.spread(TIMED_CASES)
    validation = _timed(lambda: validation_loss(model.eval(), some)) / len(some)
    answering = for_inference(model)
    beams = config.decoding.beams
    test = _timed(lambda: search(answering, some.histories, beams=beams, targets=some.targets)) / len(some)
    weights = sum(p.numel() * p.element_size() for p in trained)
    return Speed(step_seconds, validation, test, peak_memory(model.device) / 2**30, weights, most)


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@contextmanager
def readable(workspace: Workspace, observer: Observer) -> Iterator[tuple[Workspace, dict[str, float]]]:
    """The workspace if it has semantic IDs, else a temporary copy with ingested data, and the seconds that
    ingest and tokenize took. In the copy, items of a log get random semantic IDs, because encoding texts can
    take hours and the measured times hardly depend on the IDs."""
    if workspace.has_semantic_ids:
        yield workspace, {}
        return
    seconds = dict[str, float]()
    with tempfile.TemporaryDirectory() as directory:
        copy = Workspace.create_or_open(Path(directory) / "preview", workspace.config)
        if workspace.has_stream:
            shutil.copytree(workspace.stream_directory, copy.stream_directory)
        else:
            seconds["ingest"] = _timed(lambda: preparation.ingest(copy, observer))
        if workspace.config.data.format in STREAMS:
            seconds["tokenize"] = _timed(lambda: preparation.tokenize(copy, Silent()))
        else:
            _draw_semantic_ids(copy)
        yield copy, seconds


def _draw_semantic_ids(workspace: Workspace) -> None:
    items, stream = workspace.config.items, workspace.stream
    sizes = (min(items.codes, len(stream.item_ids)),) * items.levels
    random, count = np.random.default_rng(0), len(stream.item_ids)
    codes = random.integers(0, sizes, (count, items.levels), dtype=np.int32)
    contents = None
    if workspace.config.head.contents:
        contents = random.standard_normal((count, items.dimensions), dtype=np.float32)
    workspace.semantic_ids_directory.mkdir()
    ids = SemanticIds(stream.item_ids, codes, sizes, contents)
    write_semantic_ids(ids, workspace.semantic_ids_directory)
