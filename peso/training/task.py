"""What the training of one stage takes, reports and returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peso.config import TrainingConfig
from peso.events.histories import Cases, TargetSequence
from peso.runtime.processes import ALONE, Processes
from peso.training.strategies.strategy import StageContext, Strategy


@dataclass(frozen=True)
class Progress:
    """The state of training after a step. ``epoch`` and ``step`` count from 1; ``record``: the step's line of
    ``log.jsonl``."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    tokens_per_second: float
    seconds_left: float
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StageResult:
    """Losses, counts and cost of the training of a stage.

    ``training_losses``, ``validation_losses``: nats per target token, one value per epoch (the first is the
    mean over the epoch's steps, each measured before its update). ``best_epoch`` counts from 1. ``seconds``:
    computing time over all interruptions, validation included. ``targets_per_second``,
    ``tokens_per_second``: without validation. ``peak_memory``: bytes, of the process on a CPU, of the device
    on a GPU.
    """

    training_losses: list[float]
    validation_losses: list[float]
    best_epoch: int
    steps: int
    targets: int
    tokens: int
    seconds: float
    targets_per_second: float
    tokens_per_second: float
    peak_memory: int


@dataclass(frozen=True)
class StageTask:
    """The data, settings and environment of one training.

    Args:
        sequences: the training targets of the stage.
        validation: the cases whose loss selects the best epoch.
        settings: the section ``training`` as it applies to this stage.
        stage: number of the stage; with ``seed`` it determines batch order and dropout masks.
        learning_rate: the peak of the schedule.
        strategy: its ``begin`` decides which parameters are trained; its ``end`` is called with the weights
            of the best epoch in place.
        directory: where the checkpoint is stored; created if absent.
        log: path of ``log.jsonl``, one line per step and per epoch.
        context: the strategy's context; its ``total_steps`` and ``total_rate`` are set here. None: built from
            the other fields.
        on_progress: called after every step.
        checkpoint_seconds: minimum time between two checkpoints within an epoch.
        processes: the processes that train this model together. All have the same task: they split the
            targets of every step and the validation cases, and take the same steps. The main one writes
            files.
        item_weight: weight of the item head's loss relative to that of all codes of an item. 0: the model has
            no item head.
        head_scale: learning rate of the item head relative to that of the vocabulary rows.
    """

    sequences: Sequence[TargetSequence]
    validation: Cases
    settings: TrainingConfig
    stage: int
    learning_rate: float
    strategy: Strategy
    seed: int
    directory: Path
    log: Path
    context: StageContext | None = None
    on_progress: Callable[[Progress], None] | None = None
    checkpoint_seconds: float = 60.0
    processes: Processes = ALONE
    item_weight: float = 0.0
    head_scale: float = 1.0
