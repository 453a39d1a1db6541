"""The training of one stage: steps, validation, checkpoints, and the choice of the best epoch.

:func:`train_stage` is the entry point. Every random number is a function of (seed, stage, position).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from peft.helpers import disable_input_dtype_casting

from peso.adapters.fused import fast_dropout, fused_lora
from peso.config import TrainingConfig
from peso.errors import Divergence
from peso.model.generative import GenerativeModel
from peso.runtime.device import Precision, peak_memory, reproducible
from peso.training.acceleration import compiled, not_compiled
from peso.training.checkpoint import TrainingLog, fingerprint
from peso.training.likelihood import validation_loss
from peso.training.state import TrainingState, begin_training, open_log
from peso.training.step import DIVERGENCE_FIX, forward_backward, optimizer_step
from peso.training.task import Progress, StageResult, StageTask


def train_stage(model: GenerativeModel, task: StageTask) -> StageResult:
    """Train all parameters that require a gradient, and leave the model with the weights of its best epoch.

    The loss of a step is the mean negative log-probability over the target tokens of its batch, including the
    end token if it is a target, as in the ``Trainer`` of Transformers. The gradient of the strategy's penalty
    is added to that of the loss. The optimizer is AdamW, with weight decay on matrices only.

    If training is interrupted, call the function again with the same task and starting weights. It continues
    from the newest checkpoint, and the final parameters are bit-identical to those without an interruption.

    Args:
        model: the model, on its device. Trained parameters require a gradient and are float32.

    Returns:
        The losses, counts and cost of the training.

    Raises:
        TrainingError: there are no targets or no trainable parameters, the checkpoint belongs to another
            training, or the processes differ in settings, data or weights.
        Divergence: a loss or a gradient is not finite. The parameters are those before that step.
    """
    state = begin_training(model, task)
    was_training = model.training
    with open_log(task, state.counters) as log, _training_mode(model, task.settings, state.precision):
        _run_steps(model, task, state, log, len(state.plan))
    state.put(state.best)
    model.train(was_training)
    task.strategy.end(replace(state.context, validate=partial(_loss_of_current_weights, model, task, state)))
    return state.counters.result(peak_memory(model.device))


def train_until(model: GenerativeModel, task: StageTask, step: int) -> tuple[float, float]:
    """Take the first steps of :func:`train_stage` and write a checkpoint.

    :func:`train_stage`, or this function with a later step, continues from the checkpoint with bit-identical
    results.

    Args:
        model: see :func:`train_stage`. Its training is not complete, so it cannot be used afterwards.
        step: the number of steps that are completed at the end, unless patience ends the training earlier.

    Returns:
        The lowest validation loss so far, of the completed epochs and the current weights, in nats per target
        token; and the computing time in seconds.

    Raises:
        TrainingError, Divergence: see :func:`train_stage`.
    """
    state = begin_training(model, task)
    counters = state.counters
    with open_log(task, counters) as log, _training_mode(model, task.settings, state.precision):
        _run_steps(model, task, state, log, step)
        losses = [*counters.validation_losses]
        if counters.epoch_targets:  # within an epoch
            with state.values_to_keep():
                losses.append(_validate(model, task, state, f"step {counters.step}"))
        if task.processes.is_main:
            state.save(log)
    return min(losses), counters.seconds


def _run_steps(
    model: GenerativeModel, task: StageTask, state: TrainingState, log: TrainingLog, until: int
) -> None:
    """Take steps until ``until`` are completed or patience ends the training."""
    plan, counters, processes = state.plan, state.counters, task.processes
    saved_at = clock = time.monotonic()
    passes = plan.batch(counters.step, model, processes) if counters.step < until else []
    for step in range(counters.step, until):
        if _has_converged(counters.validation_losses, task.settings.patience):
            break
        began = time.monotonic()
        # the seed of dropout differs between processes, because each has other targets
        ranks = [processes.rank] if processes.rank else []
        torch.manual_seed(_combined_seed(task.seed, task.stage, step, *ranks))
        penalty, parts = forward_backward(model, task, state, step, passes)
        tokens: float = sum(packed.tokens for packed in passes)
        if step + 1 < until:  # prepare the next batch while a GPU is still computing this one
            passes = plan.batch(step + 1, model, processes)
        loss, tokens = processes.sum_numbers(sum(map(float, parts)), tokens)
        figures = optimizer_step(task, state, step, loss, penalty)

        now = time.monotonic()
        counters.step_seconds += now - began
        counters.count(now - clock, plan.targets(step), int(tokens), loss)
        clock = now
        epoch = plan.epoch(step) + 1
        record = {
            "epoch": epoch,
            "step": counters.step,
            "loss": loss,
            **figures,
            "targets": plan.targets(step),
            "tokens": int(tokens),
            "tokens_per_second": int(tokens) / (now - began),
            **state.movement.figures(),
        }
        log.write(**record)
        if task.on_progress is not None:
            speed = counters.tokens / counters.step_seconds
            left = counters.seconds / counters.step * (len(plan) - counters.step)
            task.on_progress(
                Progress(epoch, plan.epochs, counters.step, len(plan), loss, speed, left, record)
            )

        if plan.ends_epoch(step):
            losses = _end_epoch(model, task, state, epoch)
            now = time.monotonic()
            counters.seconds += now - clock
            clock = now
            log.write(epoch=epoch, step=counters.step, **losses)
        due = plan.ends_epoch(step) or time.monotonic() - saved_at >= task.checkpoint_seconds
        if due and processes.is_main:
            state.save(log)
            saved_at = time.monotonic()


@contextmanager
def _training_mode(model: GenerativeModel, settings: TrainingConfig, precision: Precision) -> Iterator[None]:
    """A context in which the model is in training mode, with its own random state, deterministic operations
    and faster layers."""
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


def _end_epoch(model: GenerativeModel, task: StageTask, state: TrainingState, epoch: int) -> dict[str, float]:
    """Validate, and keep the weights if they are the best so far. Returns both losses of the epoch."""
    counters = state.counters
    task.processes.require_same(fingerprint(state.trained), f"the trained weights after epoch {epoch}")
    with state.values_to_keep():
        validated = _validate(model, task, state, f"epoch {epoch}")
        if validated < min(counters.validation_losses, default=math.inf):
            state.best = {name: p.detach().cpu().clone() for name, p in state.trained.items()}
    counters.validation_losses.append(validated)
    counters.training_losses.append(counters.epoch_loss / counters.epoch_targets)
    counters.epoch_loss, counters.epoch_targets = 0.0, 0
    return {"training_loss": counters.training_losses[-1], "validation_loss": validated}


def _loss_of_current_weights(model: GenerativeModel, task: StageTask, state: TrainingState) -> float:
    """The validation loss after the training, for :attr:`StageContext.validate`."""
    was_training = model.training
    with _training_mode(model, task.settings, state.precision):
        loss = _validate(model, task, state, "the stage")
    model.train(was_training)
    return loss


def _validate(model: GenerativeModel, task: StageTask, state: TrainingState, after: str) -> float:
    """The validation loss of the current weights.

    Raises:
        Divergence: it is not finite.
    """
    model.eval()
    with state.precision.products(), not_compiled():
        validated = validation_loss(
            model, state.validation, task.settings.temperature, task.processes, task.item_weight
        )
    model.train()
    if not math.isfinite(validated):
        raise Divergence(f"the validation loss after {after} is {validated}; {DIVERGENCE_FIX}")
    return validated


def _has_converged(validation_losses: Sequence[float], patience: int | None) -> bool:
    """Whether none of the last ``patience`` epochs has a lower validation loss than an earlier epoch."""
    if patience is None or not validation_losses:
        return False
    return len(validation_losses) - 1 - int(np.argmin(validation_losses)) >= patience


def _combined_seed(*values: int) -> int:
    return int(np.random.SeedSequence(values).generate_state(1, np.uint64)[0])
