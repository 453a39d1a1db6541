"""The training of one stage: batches, gradients, steps, validation, the best epoch.

:func:`train_stage` is the recipe and reads top to bottom. Every random choice is a function of (seed, stage,
position).
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from peso.adapters.fused import fast_dropout, fused_lora
from peso.adapters.lora import adapter_parameters
from peso.config import TrainingConfig
from peso.errors import Divergence, TrainingError
from peso.events.histories import Cases, TargetSequence
from peso.model.generative import GenerativeModel
from peso.model.head import token_log_probabilities
from peso.runtime.device import Precision, peak_memory, reproducible
from peso.runtime.files import digest
from peso.runtime.processes import ALONE, Processes
from peso.training.acceleration import as_written, compiled, gradient_checkpointing
from peso.training.batches import Packed
from peso.training.checkpoint import Checkpoint, TrainingLog, fingerprint
from peso.training.likelihood import (
    item_log_probabilities,
    target_states,
    tokens_of_target,
    validation_loss,
)
from peso.training.optimizer import Schedule, make_optimizer, total_rate
from peso.training.penalty import MEASURED_EVERY, Movement, Penalty, TrainingPass
from peso.training.plan import StagePlan, most_targets
from peso.training.strategies.strategy import StageContext, Strategy


@dataclass(frozen=True)
class Progress:
    """Where training stands after a step. ``epoch`` and ``step`` count from 1; ``record``: the step's line of
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
    """What the training of a stage came to.

    ``training_losses``, ``validation_losses``: nats per target token, one value an epoch (the first is the
    mean over the epoch's steps, measured while it learnt). ``best_epoch`` counts from 1. ``seconds``: time
    at work, over all interruptions, validation included. ``targets_per_second``, ``tokens_per_second``:
    without validation. ``peak_memory``: bytes, of the process on the CPU, of the device on a GPU.
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


@dataclass
class _State:
    """What a checkpoint holds beside the tensors of model, optimiser and schedule."""

    step: int = 0  # steps done
    seconds: float = 0.0  # at work, validation included
    step_seconds: float = 0.0
    targets: int = 0
    tokens: int = 0
    epoch_loss: float = 0.0  # Σ loss · targets over the steps of the epoch so far
    epoch_targets: int = 0
    logged: int = 0  # bytes of log.jsonl
    log_sha256: str = ""
    training_losses: list[float] = field(default_factory=list)
    validation_losses: list[float] = field(default_factory=list)

    def count(self, seconds: float, targets: int, tokens: int, loss: float) -> None:
        """Add one step."""
        self.step += 1
        self.seconds += seconds
        self.targets += targets
        self.tokens += tokens
        self.epoch_loss += loss * targets
        self.epoch_targets += targets

    def result(self, peak: int) -> StageResult:
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
            peak_memory=peak,
        )


@dataclass(frozen=True)
class StageTask:
    """What one training of a stage is to learn, and how.

    Args:
        sequences, validation: the stage's targets, and the cases that pick the best epoch.
        settings: the section ``training`` as it applies to this stage.
        stage: its number; with ``seed`` it fixes the order of the batches and what dropout drops.
        learning_rate: the peak of the schedule.
        strategy: its ``begin`` sees the model first and decides what of it is trained; its ``end`` is called
            when the weights of the best epoch are back.
        directory: where the checkpoint of this training lives; made if absent.
        log: ``log.jsonl``, a line a step and a line an epoch.
        context: what the strategy is told of the stage; steps and rates are filled in here. None: only what
            the other fields say.
        on_progress: called after every step.
        checkpoint_seconds: least time between two checkpoints within an epoch.
        processes: those that train this model together, each with the same task: they share the targets of
            every step and the validation cases, and take the same steps. The main one writes.
        item_weight: of the item head's loss: of an item's log-probability beside that of all its codes
            together. 0: the model has no item head.
        head_scale: learning rate of the item head, relative to that of the vocabulary's rows.
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


def train_stage(model: GenerativeModel, task: StageTask) -> StageResult:
    """Train everything of the model that requires a gradient; leave it as it was after its best epoch.

    The loss of a step is the mean negative log-probability over the target tokens of its batch (end token
    included where it is predicted), as the ``Trainer`` of Transformers computes it; the gradient of the
    strategy's penalty is added to its gradient. AdamW; weight decay on matrices only. Interrupted anywhere
    and called again with the same task and the same starting weights, it continues at its newest checkpoint
    and ends with the same parameters, bit for bit, as if it had not been interrupted.

    Args:
        model: on its device; what is trained requires a gradient and is float32.

    Raises:
        TrainingError: no targets or nothing trainable, a checkpoint of another training, or processes that
            do not hold the same.
        Divergence: a loss or gradient that is not finite; the parameters are then as before that step.
    """
    training = _begin(model, task)
    was_training = model.training
    with _records(training.state, task) as records, _training_mode(model, task.settings, training.precision):
        _advance(model, task, training, records, len(training.plan))
    _put(training.trained, training.best)
    model.train(was_training)
    task.strategy.end(training.context)
    return training.state.result(peak_memory(model.device))


def train_until(model: GenerativeModel, task: StageTask, step: int) -> tuple[float, float]:
    """The first steps of :func:`train_stage`, which continues from the checkpoint that this leaves and ends
    with the same bits. Called again with a later step, it continues too.

    Args:
        model: as in :func:`train_stage`; it is left in the middle of its training, of no further use.
        step: how many steps are done at the end, unless patience ends the training before.

    Returns:
        The lowest validation loss so far (ends of epochs, and that of now), and the seconds spent.
    """
    training = _begin(model, task)
    state = training.state
    with _records(state, task) as records, _training_mode(model, task.settings, training.precision):
        _advance(model, task, training, records, step)
        losses = [*state.validation_losses]
        if state.epoch_targets:  # within an epoch
            losses.append(_validate(model, task, training, f"step {state.step}"))
        if task.processes.is_main:
            training.save(records)
    return min(losses), state.seconds


def _advance(
    model: GenerativeModel, task: StageTask, training: _Training, records: TrainingLog, until: int
) -> None:
    """Take the steps that are left until so many are done."""
    plan, state, processes = training.plan, training.state, task.processes
    saved_at = clock = time.monotonic()
    passes = plan.batch(state.step, model, processes) if state.step < until else []
    for step in range(state.step, until):
        if _has_converged(state.validation_losses, task.settings.patience):
            break
        began = time.monotonic()
        # what dropout draws from: something else on every process, which see other targets
        ranks = [processes.rank] if processes.rank else []
        torch.manual_seed(_number(task.seed, task.stage, step, *ranks))
        penalty, parts = _forward_backward(model, task, training, step, passes)
        tokens: float = sum(packed.tokens for packed in passes)
        if step + 1 < until:  # while a GPU is still at this one
            passes = plan.batch(step + 1, model, processes)
        loss, tokens = processes.sum_numbers(sum(map(float, parts)), tokens)
        figures = _optimizer_step(task, training, step, loss, penalty)

        now = time.monotonic()
        state.step_seconds += now - began
        state.count(now - clock, plan.targets(step), int(tokens), loss)
        clock = now
        epoch = plan.epoch(step) + 1
        record = {
            "epoch": epoch,
            "step": state.step,
            "loss": loss,
            **figures,
            "targets": plan.targets(step),
            "tokens": int(tokens),
            "tokens_per_second": int(tokens) / (now - began),
            **training.movement.figures(),
        }
        records.write(**record)
        if task.on_progress is not None:
            speed = state.tokens / state.step_seconds
            left = state.seconds / state.step * (len(plan) - state.step)
            task.on_progress(Progress(epoch, plan.epochs, state.step, len(plan), loss, speed, left, record))

        if plan.ends_epoch(step):
            losses = _end_epoch(model, task, training, epoch)
            now = time.monotonic()
            state.seconds += now - clock
            clock = now
            records.write(epoch=epoch, step=state.step, **losses)
        due = plan.ends_epoch(step) or time.monotonic() - saved_at >= task.checkpoint_seconds
        if due and processes.is_main:
            training.save(records)
            saved_at = time.monotonic()


@dataclass
class _Training:
    """A training on its way: what :func:`train_stage` works with from step to step."""

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
    state: _State
    best: dict[str, Tensor]  # the values of ``trained`` after the best epoch so far

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.trained.values())

    def save(self, records: TrainingLog) -> None:
        self.state.logged, self.state.log_sha256 = records.sync(), records.sha256
        self.checkpoint.save(
            state=asdict(self.state),
            trained=self.trained,
            best=self.best,
            optimizer=self.optimizer.state_dict(),
            schedule=self.schedule.state_dict(),
        )


def _begin(model: GenerativeModel, task: StageTask) -> _Training:
    """The training before its first step, or where its newest checkpoint left it."""
    settings, strategy = task.settings, task.strategy
    plan = StagePlan(
        task.sequences, model.layout.window, settings, task.seed, task.stage, most_targets(model.layout)
    )
    validation = _sample(task.validation, settings.validation_cases, (task.seed, task.stage))
    context = task.context or StageContext(
        task.stage, model.backbone, 0, seed=task.seed, vocabulary=model.vocabulary
    )
    rates = total_rate(settings, len(plan), task.learning_rate)
    context = replace(context, total_steps=len(plan), total_rate=rates)
    options = _options(strategy)
    with gradient_checkpointing(model, settings.gradient_checkpointing), reproducible(model.device):
        strategy.begin(context)  # a strategy that cannot work with these settings says so
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
    checkpoint = Checkpoint(task.directory, determined_by)
    movement = Movement(adapter)  # from here: what a checkpoint restores has moved already
    state, best = _State(), dict[str, Tensor]()
    if (saved := checkpoint.load()) is not None:
        state, best = _State(**saved["state"]), saved["best"]
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        _put(trained, saved["trained"])
    precision = Precision.of(settings.precision, str(model.device))
    return _Training(
        plan,
        validation,
        precision,
        context,
        trained,
        adapter,
        optimizer,
        schedule,
        checkpoint,
        movement,
        state,
        best,
    )


def _records(state: _State, task: StageTask) -> TrainingLog:
    """The log of the training; processes beside the main one write nowhere."""
    if task.processes.is_main:
        return TrainingLog(task.log, state.logged, state.log_sha256)
    return TrainingLog(Path(os.devnull), 0)


@contextmanager
def _training_mode(model: GenerativeModel, settings: TrainingConfig, precision: Precision) -> Iterator[None]:
    """The model while it is trained: same draws and same sums in every run, and the faster layers."""
    gpus = [model.device] if model.device.type == "cuda" else []
    with (
        torch.random.fork_rng(gpus),
        reproducible(model.device),
        disable_input_dtype_casting(model, precision.mixed),
        fast_dropout(model) if model.device.type == "cpu" else nullcontext(),
        fused_lora(model),
        compiled(model, settings.compile),
    ):
        model.train()
        yield


def _forward_backward(
    model: GenerativeModel, task: StageTask, training: _Training, step: int, passes: list[Packed]
) -> tuple[Penalty, list[Tensor]]:
    """Gradients of the loss into the parameters; returns the penalties of the step so far, and the loss pass
    by pass, see :func:`_backward`."""
    count = training.plan.targets(step) * tokens_of_target(model)
    penalty = Penalty(training.parameters, training.adapter, measured=step % MEASURED_EVERY == 0)
    penalized = partial(_penalized, task.strategy, training.context, penalty)
    with gradient_checkpointing(model, task.settings.gradient_checkpointing):
        return penalty, _backward(
            model, passes, count, task.settings.temperature, training.precision, task.item_weight, penalized
        )


def _optimizer_step(
    task: StageTask, training: _Training, step: int, loss: float, penalty: Penalty
) -> dict[str, float | None]:
    """Add the gradient of the strategy's penalty, clip, step; returns the figures for the log."""
    parameters, optimizer, strategy = training.parameters, training.optimizer, task.strategy
    _sum_gradients(parameters, task.processes)
    penalty.gather(task.processes)
    gradient_norm = _norm(training.adapter) if penalty.separate else None
    penalty.add(strategy.penalty(training.context))
    penalty_norm = penalty.apply()
    whole_norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    _check_finite(step, loss + penalty.value, whole_norm, training.trained)
    clip_grads_with_norm_(parameters, task.settings.max_grad_norm, whole_norm)
    rate = training.schedule.rate
    training.movement.begin(step)
    optimizer.step()
    training.movement.stepped()
    strategy.after_step(training.context, rate)
    training.schedule.step()
    optimizer.zero_grad()
    return {
        "penalty": penalty.value,
        "gradient_norm": gradient_norm,
        "penalty_gradient_norm": penalty_norm,
        "learning_rate": rate,
    }


def _end_epoch(model: GenerativeModel, task: StageTask, training: _Training, epoch: int) -> dict[str, float]:
    """Validate, and keep the parameters if they are the best so far; returns both losses of the epoch."""
    state, processes = training.state, task.processes
    processes.require_same(fingerprint(training.trained), f"what they have learned until epoch {epoch}")
    validated = _validate(model, task, training, f"epoch {epoch}")
    if validated < min(state.validation_losses, default=math.inf):
        training.best = {name: p.detach().cpu().clone() for name, p in training.trained.items()}
    state.validation_losses.append(validated)
    state.training_losses.append(state.epoch_loss / state.epoch_targets)
    state.epoch_loss, state.epoch_targets = 0.0, 0
    return {"training_loss": state.training_losses[-1], "validation_loss": validated}


def _validate(model: GenerativeModel, task: StageTask, training: _Training, after: str) -> float:
    """The validation loss as the model stands. Raises Divergence where it is not finite."""
    model.eval()
    with training.precision.products(), as_written():
        validated = validation_loss(
            model, training.validation, task.settings.temperature, task.processes, task.item_weight
        )
    model.train()
    if not math.isfinite(validated):
        raise Divergence(f"the validation loss after {after} is {validated}; {_CURE}")
    return validated


def _has_converged(validation_losses: Sequence[float], patience: int | None) -> bool:
    """Whether the last ``patience`` epochs brought no lower validation loss than an epoch before them."""
    if patience is None or not validation_losses:
        return False
    return len(validation_losses) - 1 - int(np.argmin(validation_losses)) >= patience


def _backward(
    model: GenerativeModel,
    passes: list[Packed],
    count: int,
    temperature: float,
    precision: Precision,
    item_weight: float = 0.0,
    penalized: Callable[[Tensor, TrainingPass, float], Tensor] | None = None,
) -> list[Tensor]:
    """Gradients of the passes' part of the loss of a batch into the parameters; returns that part, pass by
    pass, still on the device: to read it is to wait for all that the device was told to do.

    Args:
        count: target tokens of the whole batch.
        item_weight: of the log-probabilities of items under the item head; 0: there is none.
        penalized: given a pass's loss, the pass and its share of the targets: what is to be differentiated.
    """
    losses = []
    for packed in passes:
        with precision.products():
            states = target_states(model, packed)
            scores = token_log_probabilities(model, states, packed.targets, temperature)
            loss = -scores.sum() / count
            if item_weight:
                loss = loss - item_weight * item_log_probabilities(model, packed, states).sum() / count
            losses.append(loss.detach())
            if penalized is not None:
                outputs = TrainingPass(model, packed, states, temperature)
                loss = penalized(loss, outputs, len(packed.targets) / count)
        loss.backward()
    return losses


def _sum_gradients(parameters: Sequence[nn.Parameter], processes: Processes) -> None:
    """Gradients of the loss of the whole batch from those of the processes' parts."""
    summed = processes.sum_tensors([p.grad for p in parameters], parameters)
    for p, gradient in zip(parameters, summed, strict=True):
        p.grad = gradient


def _penalized(
    strategy: Strategy,
    context: StageContext,
    penalty: Penalty,
    loss: Tensor,
    outputs: TrainingPass,
    share: float,
) -> Tensor:
    extra = strategy.output_penalty(context, outputs)
    return loss if extra is None else penalty.with_loss(loss, extra * share)


def _norm(parameters: list[nn.Parameter]) -> float | None:
    """Norm of the gradients over the adapter; None where there is no adapter."""
    return float(get_total_norm([p.grad for p in parameters if p.grad is not None])) if parameters else None


_CURE = "lower training.learning_rate, or set training.precision: float32"


def _check_finite(step: int, loss: float, norm: Tensor, trained: Mapping[str, Tensor]) -> None:
    if math.isfinite(loss) and bool(norm.isfinite()):
        return
    broken = [name for name, p in trained.items() if p.grad is not None and not bool(p.grad.isfinite().all())]
    where = f", gradient not finite in {broken[0]} and {len(broken) - 1} more" if broken else ""
    raise Divergence(f"step {step + 1}: the loss is {loss}{where}; {_CURE}")


def _sample(cases: Cases, most: int | None, seed: tuple[int, ...]) -> Cases:
    if most is None or most >= len(cases):
        return cases
    return cases.take(np.sort(np.random.default_rng(seed).choice(len(cases), most, replace=False)))


def _number(*values: int) -> int:
    """A seed from several whole numbers."""
    return int(np.random.SeedSequence(values).generate_state(1, np.uint64)[0])


@torch.no_grad()
def _put(trained: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, p in trained.items():
        p.copy_(values[name])


def _data_digest(model: GenerativeModel, sequences: Sequence[TargetSequence], validation: Cases) -> str:
    """Of the tokens trained on and validated with, in order."""
    result = hashlib.sha256()
    for sequence in sequences:
        result.update(model.item_token_ids(sequence.items).tobytes())
        result.update(sequence.first_target.to_bytes(8))
    for history, target in zip(validation.histories, validation.targets, strict=True):
        result.update(model.item_token_ids(np.append(history, target)).tobytes())
    return result.hexdigest()


def _options(value: Any) -> Any:
    """What an object was made with, as JSON: its type and public attributes that are plain values."""
    if isinstance(value, str | int | float | None):
        return value
    if isinstance(value, list | tuple):
        return [_options(each) for each in value]
    attributes = {} if isinstance(value, nn.Module | Tensor) else getattr(value, "__dict__", {})
    public = {name: _options(each) for name, each in attributes.items() if not name.startswith("_")}
    return {type(value).__name__: public}
