"""What a run still has to do, and what that will take: for `peso run --dry-run`.

Knows the steps of the pipeline; times a few optimiser steps and a few searches on this machine and
multiplies. Writes nothing: data that are not ingested yet are read into a temporary directory.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from peso import assets, pipeline
from peso.continual.strategy import make_strategy
from peso.decoding import search
from peso.events.histories import Stage
from peso.events.stream import Stream
from peso.pipeline import Step
from peso.progress import Silent
from peso.stages import fresh_model, trains_backbone
from peso.training.likelihood import target_token_log_probabilities, validation_loss
from peso.training.loop import StagePlan, most_targets, peak_memory
from peso.workspace import Workspace

TIMED_STEPS, TIMED_CASES = 4, 64
READABLE_AT_ONCE = ("simulate", "peso-release")  # sources that take seconds to read
BYTES_A_PREDICTION = 250  # ten items with scores, labels; compressed


@dataclass(frozen=True)
class Estimate:
    """What one step will take; None where it cannot be said yet (the note says why)."""

    step: Step
    minutes: float | None = None
    memory_gib: float | None = None
    disk_mib: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Speed:
    """Seconds of one optimiser step, of validating one case, of testing one case; peak memory; weights."""

    step: float
    validation: float
    test: float
    memory_gib: float
    trained_bytes: int
    most_targets: int | None  # of a chunk, see peso.training.plan


def estimate(workspace: Workspace) -> list[Estimate]:
    """Every missing step of a run, with minutes, memory and disk.

    Raises:
        PesoError: as the run itself would, for bad data or an unusable backbone.
    """
    config = workspace.config
    if not workspace.has_stream and config.data.format not in READABLE_AT_ONCE:
        note = "the later steps are known once the log is ingested: `peso ingest`, then ask again"
        return [Estimate(Step("ingest"), note=note)]
    name = config.backbone.name
    with _readable(workspace) as source:
        stream = Stream.open(source.stream_directory)
        missing = list(pipeline.missing_steps(workspace, stream.stages))
        if name in assets.names("backbone") and assets.find(name) is None:
            note = f"`peso run` fetches the backbone; to know before: `peso pull {name}`"
            return [Estimate(step, note="" if step.stage is None else note) for step in missing]
        speeds: dict[bool, Speed] = {}  # by whether the whole backbone is trained
        result = []
        for step in missing:
            if step.stage is None:
                result.append(Estimate(step, minutes=0.1, note="seconds"))
                continue
            whole = trains_backbone(workspace, step.stage)
            if whole not in speeds:
                speeds[whole] = _measure(source, stream.stage(0), whole)
            result.append(_stage_estimate(workspace, step, stream.stage(step.stage), speeds[whole]))
        return result


def _stage_estimate(workspace: Workspace, step: Step, stage: Stage, speed: Speed) -> Estimate:
    config = workspace.config
    cases = len(stage.eligible())
    if step.name == "test":
        disk = cases * BYTES_A_PREDICTION / 2**20
        return Estimate(step, cases * speed.test / 60, speed.memory_gib, disk, f"{cases:,} cases")
    disk = speed.trained_bytes / 2**20
    if not make_strategy(config.strategy).learns(stage.number):
        return Estimate(step, 0.1, speed.memory_gib, disk, "keeps the last state")
    settings = config.training
    sequences, window = stage.training_sequences(), config.prompt.window
    plan = StagePlan(
        sequences, window, settings, config.seed_of_stage(stage.number), stage.number, speed.most_targets
    )
    validated = min(cases, settings.validation_cases or cases) * plan.epochs
    seconds = len(plan) * speed.step + validated * speed.validation
    return Estimate(step, seconds / 60, speed.memory_gib, disk, f"{len(plan):,} optimiser steps")


def _measure(workspace: Workspace, stage: Stage, whole: bool) -> Speed:
    model = fresh_model(workspace, whole=whole)
    config = workspace.config
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
    learn(int(steps[0]))  # the first pays for what is set up once
    step_seconds = sum(_timed(partial(learn, int(step))) for step in steps[1:]) / TIMED_STEPS
    cases = stage.test_cases(config.prompt.window)
    some = cases.take(np.linspace(0, len(cases) - 1, min(len(cases), TIMED_CASES)).astype(int))
    validation = _timed(lambda: validation_loss(model.eval(), some)) / len(some)
    found = _timed(lambda: search(model, some.histories, beams=config.decoding.beams)) / len(some)
    weights = sum(p.numel() * p.element_size() for p in trained)
    return Speed(
        step_seconds, validation, found + validation, peak_memory(model.device) / 2**30, weights, most
    )


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@contextmanager
def _readable(workspace: Workspace) -> Iterator[Workspace]:
    """The workspace if its data are there, else a temporary one into which they are read."""
    if workspace.has_semantic_ids:
        yield workspace
        return
    with tempfile.TemporaryDirectory() as directory:
        copy = Workspace.create_or_open(Path(directory) / "preview", workspace.config)
        pipeline.ingest(copy, Silent())
        pipeline.tokenize(copy, Silent())
        yield copy
