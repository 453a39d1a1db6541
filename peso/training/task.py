"""The input of the training of one stage, its progress and its result."""

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
    """The progress of a training after a step.

    Attributes:
        epoch, step: the current epoch and step, counted from 1.
        epochs, steps: their total numbers.
        loss: the loss of the step, in nats per target token.
        tokens_per_second: the mean speed so far, without validation.
        seconds_left: an estimate of the remaining time.
        record: the step's line of ``log.jsonl``.
    """

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
    """The losses, counts and cost of the training of a stage.

    Attributes:
        training_losses: the mean loss of each epoch in nats per target token. The loss of a step is measured
            before its update.
        validation_losses: the validation loss at the end of each epoch, in nats per target token.
        best_epoch: the epoch whose weights are kept, counted from 1.
        steps: the number of optimizer steps.
        targets, tokens: the number of targets, and of all tokens without padding, over all steps.
        seconds: the computing time including validation. It does not count the time between interruptions.
        targets_per_second, tokens_per_second: the mean speed without validation.
        peak_memory: the largest memory in bytes, of the process on a CPU, of the device on a GPU.
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

    Attributes:
        sequences: the training targets of the stage, with the items before them.
        validation: the cases whose loss determines the best epoch.
        settings: the section ``training`` of the configuration, as it applies to this stage.
        stage: the number of the stage. Together with ``seed``, it determines the order of the batches and the
            dropout masks.
        learning_rate: the peak of the schedule.
        strategy: the strategy. Its ``begin`` decides which parameters are trained, and its ``end`` is called
            when the model has the weights of the best epoch.
        seed: the seed of the run.
        directory: the directory of the checkpoint. It is created if it is missing.
        log: the path of ``log.jsonl``, which gets one line per step and per epoch.
        context: the strategy's context, without ``total_steps`` and ``total_rate``, which training sets. None
            to build it from the other attributes.
        on_progress: called after every step.
        checkpoint_seconds: the shortest time between two checkpoints within an epoch.
        processes: the processes that train this model together. All have the same task. They split the
            targets of every step and the validation cases, and take the same steps. The main process writes
            the files.
        item_weight: the weight of the item head's loss, relative to the loss of all codes of an item; 0 for a
            model without an item head.
        head_scale: the learning rate of the item head, relative to that of the vocabulary rows.
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
