"""The state of a training: how it begins, and how it is saved and restored."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peso.adapters.lora import adapter_parameters
from peso.errors import TrainingError
from peso.events.histories import Cases, TargetSequence
from peso.model.generative import GenerativeModel
from peso.runtime.device import Precision, reproducible
from peso.runtime.files import digest
from peso.training.acceleration import gradient_checkpointing
from peso.training.checkpoint import Checkpoint, TrainingLog, fingerprint
from peso.training.optimizer import Schedule, make_optimizer, total_rate
from peso.training.penalty import Movement
from peso.training.plan import StagePlan, most_targets
from peso.training.strategies.strategy import StageContext
from peso.training.task import StageResult, StageTask


@dataclass
class Counters:
    """The counts and losses so far, which are the part of a checkpoint that is not tensors."""

    step: int = 0  # completed steps
    seconds: float = 0.0  # computing time, including validation
    step_seconds: float = 0.0  # computing time of the steps alone
    targets: int = 0
    tokens: int = 0
    epoch_loss: float = 0.0  # Σ loss · targets over the completed steps of the current epoch
    epoch_targets: int = 0
    logged: int = 0  # the length of log.jsonl in bytes
    log_sha256: str = ""
    training_losses: list[float] = field(default_factory=list)
    validation_losses: list[float] = field(default_factory=list)

    def count(self, seconds: float, targets: int, tokens: int, loss: float) -> None:
        """Add one step with its computing time, its targets and tokens, and its loss."""
        self.step += 1
        self.seconds += seconds
        self.targets += targets
        self.tokens += tokens
        self.epoch_loss += loss * targets
        self.epoch_targets += targets

    def result(self, peak_memory: int) -> StageResult:
        """The result of the training, with the peak memory in bytes."""
        return StageResult(
            training_losses=self.training_losses,
            validation_losses=self.validation_losses,
            best_epoch=int(np.argmin(self.validation_losses)) + 1,
            steps=self.step,
            targets=self.targets,
            tokens=self.tokens,
            seconds=self.seconds,
            targets_per_second=self.targets / self.step_seconds,
            tokens_per_second=self.tokens / self.step_seconds,
            peak_memory=peak_memory,
        )


@dataclass
class TrainingState:
    """A training in progress.

    Attributes:
        plan: the batches.
        validation: the cases whose loss determines the best epoch.
        precision: the precision of the forward passes.
        context: the context of the strategy.
        trained: the trained parameters by name.
        adapter: those of them that belong to the adapter.
        optimizer, schedule: the optimizer and its learning rates.
        checkpoint: the file to which :meth:`save` writes.
        movement: measures how far steps move the adapter.
        counters: the counts and losses so far.
        running: the values that the strategy keeps instead of ``trained`` (:meth:`Strategy.running`); empty
            for most strategies.
        best: the values of the best epoch so far, on the CPU.
    """

    plan: StagePlan
    validation: Cases
    precision: Precision
    context: StageContext
    trained: dict[str, nn.Parameter]
    adapter: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    checkpoint: Checkpoint
    movement: Movement
    counters: Counters
    running: Mapping[str, Tensor]
    best: dict[str, Tensor]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.trained.values())

    def save(self, log: TrainingLog) -> None:
        """Write a checkpoint after everything in ``log`` is on disk."""
        self.counters.logged, self.counters.log_sha256 = log.sync(), log.sha256
        self.checkpoint.save(
            state=asdict(self.counters),
            trained=self.trained,
            running=dict(self.running),
            best=self.best,
            optimizer=self.optimizer.state_dict(),
            schedule=self.schedule.state_dict(),
        )

    @torch.no_grad()
    def put(self, values: Mapping[str, Tensor]) -> None:
        """Set the trained parameters to these values."""
        for name, p in self.trained.items():
            p.copy_(values[name])

    @contextmanager
    def values_to_keep(self) -> Iterator[None]:
        """A context in which the model has the values that would be kept now."""
        if not self.running:
            yield
            return
        own = {name: p.detach().clone() for name, p in self.trained.items()}
        self.put(self.running)
        try:
            yield
        finally:
            self.put(own)


def begin_training(model: GenerativeModel, task: StageTask) -> TrainingState:
    """The state before the first step, or at the newest checkpoint if there is one.

    Raises:
        TrainingError: see :func:`peso.training.loop.train_stage`.
    """
    settings, strategy = task.settings, task.strategy
    plan = StagePlan(
        task.sequences, model.layout.window, settings, task.seed, task.stage, most_targets(model.layout)
    )
    if not len(task.validation):
        raise TrainingError(
            f"stage {task.stage} has no validation case: no user has three items in it. Use fewer stages "
            "(data.stages); if the stage was appended, remove it (`peso undo`)"
        )
    validation = _sample(task.validation, settings.validation_cases, (task.seed, task.stage))
    context = task.context or StageContext(
        task.stage, model.backbone, 0, seed=task.seed, vocabulary=model.vocabulary
    )
    rates = total_rate(settings, len(plan), task.learning_rate)
    context = replace(context, total_steps=len(plan), total_rate=rates)
    options = _options(strategy)
    with gradient_checkpointing(model, settings.gradient_checkpointing), reproducible(model.device):
        strategy.begin(context)  # raises if the strategy cannot work with these settings
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise TrainingError("no parameter of the model requires a gradient: there is nothing to train")
    adapter = [p for p in adapter_parameters(model.backbone).values() if p.requires_grad]
    optimizer = make_optimizer(trained, settings, task.learning_rate, task.head_scale)
    schedule = Schedule(optimizer, settings, task.learning_rate, len(plan))
    determined_by = digest(
        settings.determining(),
        (
            task.learning_rate,
            task.seed,
            task.stage,
            options,
            *([task.item_weight] if task.item_weight else []),
            *([{"head_scale": task.head_scale}] if task.head_scale != 1 else []),
        ),
        asdict(model.layout),
        model.loss_vocabulary,
        _data_digest(model, task.sequences, validation),
        fingerprint(trained),
    )
    task.processes.require_same(determined_by, "settings, data or starting weights")
    state = TrainingState(
        plan=plan,
        validation=validation,
        precision=Precision.of(settings.precision, str(model.device)),
        context=context,
        trained=trained,
        adapter=adapter,
        optimizer=optimizer,
        schedule=schedule,
        checkpoint=Checkpoint(task.directory, determined_by),
        movement=Movement(adapter),  # before a checkpoint is restored, to measure from the stage's start
        counters=Counters(),
        running=strategy.running(),
        best={},
    )
    if (saved := state.checkpoint.load()) is not None:
        state.counters, state.best = Counters(**saved["state"]), saved["best"]
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        state.put(saved["trained"])
        for name, value in state.running.items():
            value.copy_(saved["running"][name])
    return state


def open_log(task: StageTask, counters: Counters) -> TrainingLog:
    """The log, continued from the checkpoint. Only the main process writes one."""
    if task.processes.is_main:
        return TrainingLog(task.log, counters.logged, counters.log_sha256)
    return TrainingLog(Path(os.devnull), 0)


def _sample(cases: Cases, most: int | None, seed: tuple[int, ...]) -> Cases:
    """At most ``most`` of the cases, drawn at random."""
    if most is None or most >= len(cases):
        return cases
    return cases.take(np.sort(np.random.default_rng(seed).choice(len(cases), most, replace=False)))


def _data_digest(model: GenerativeModel, sequences: Sequence[TargetSequence], validation: Cases) -> str:
    """The sha256 of the training and validation tokens, in order."""
    result = hashlib.sha256()
    for sequence in sequences:
        result.update(model.item_token_ids(sequence.items).tobytes())
        result.update(sequence.first_target.to_bytes(8))
    for history, target in zip(validation.histories, validation.targets, strict=True):
        result.update(model.item_token_ids(np.append(history, target)).tobytes())
    return result.hexdigest()


def _options(value: Any) -> Any:
    """The type and the public attributes of an object as plain JSON values, recursively."""
    if isinstance(value, str | int | float | None):
        return value
    if isinstance(value, list | tuple):
        return [_options(each) for each in value]
    attributes = {} if isinstance(value, nn.Module | Tensor) else getattr(value, "__dict__", {})
    public = {name: _options(each) for name, each in attributes.items() if not name.startswith("_")}
    return {type(value).__name__: public}
