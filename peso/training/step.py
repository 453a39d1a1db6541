"""One optimizer step: the gradients of the loss and of the penalties, clipping, and the update."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from peso.errors import Divergence
from peso.model.generative import GenerativeModel
from peso.model.head import token_log_probabilities
from peso.runtime.device import Precision
from peso.runtime.processes import Processes
from peso.training.acceleration import gradient_checkpointing
from peso.training.batches import Packed
from peso.training.likelihood import item_log_probabilities, target_states, tokens_of_target
from peso.training.penalty import MEASURED_EVERY, Penalty, TrainingPass
from peso.training.state import TrainingState
from peso.training.strategies.strategy import StageContext, Strategy
from peso.training.task import StageTask

DIVERGENCE_FIX = "lower training.learning_rate, or set training.precision: float32"


def forward_backward(
    model: GenerativeModel, task: StageTask, state: TrainingState, step: int, passes: list[Packed]
) -> tuple[Penalty, list[Tensor]]:
    """Accumulate the gradients of the loss and of the penalties on outputs.

    Args:
        model: the model in training.
        state: its state before the step.
        step: the number of the step, counted from 0.
        passes: the forward passes of this process.

    Returns:
        The penalties so far, and the loss of each pass as in :func:`backward`.
    """
    count = state.plan.targets(step) * tokens_of_target(model)
    penalty = Penalty(state.parameters, state.adapter, measured=step % MEASURED_EVERY == 0)
    penalized = partial(_penalized, task.strategy, state.context, penalty)
    if model.vocabulary.item_head is not None:
        model.vocabulary.item_head.expect_gradients()
    with gradient_checkpointing(model, task.settings.gradient_checkpointing):
        return penalty, backward(
            model, passes, count, task.settings.temperature, state.precision, task.item_weight, penalized
        )


def backward(
    model: GenerativeModel,
    passes: list[Packed],
    count: int,
    temperature: float,
    precision: Precision,
    item_weight: float = 0.0,
    penalized: Callable[[Tensor, TrainingPass, float], Tensor] | None = None,
) -> list[Tensor]:
    """Accumulate the gradients of the part of a batch's loss that these passes contribute.

    Args:
        count: the number of target tokens of the whole batch.
        temperature: the logits are divided by it.
        item_weight: the weight of the items' log-probabilities under the item head; 0 for a model without
            one.
        penalized: a function of the loss of a pass, the pass, and its share of the batch's target tokens. It
            returns the value to differentiate instead of the loss.

    Returns:
        The loss of each pass, 0-d, on the device. Reading a value waits for the device.
    """
    losses = []
    for packed in passes:
        with precision.products():
            states = target_states(model, packed)
            scores = token_log_probabilities(model, states, packed.targets, temperature)
            loss = -scores.sum() / count
            if item_weight:
                loss = loss - item_weight * item_log_probabilities(model, packed, states).sum() / count
            if not packed.counts:
                loss = loss * 0
            losses.append(loss.detach())
            if penalized is not None:
                outputs = TrainingPass(model, packed, states, temperature)
                loss = penalized(loss, outputs, packed.counts * len(packed.targets) / count)
        loss.backward()
    return losses


def optimizer_step(
    task: StageTask, state: TrainingState, step: int, loss: float, penalty: Penalty
) -> dict[str, float | None]:
    """Sum the gradients of all processes, add those of the strategy's penalty, clip, and update the
    parameters.

    Args:
        state: its state; the parameters have the gradients of :func:`forward_backward`.
        step: the number of the step, counted from 0.
        loss: the loss of the whole batch.

    Returns:
        The values that are logged with the step.

    Raises:
        Divergence: the loss or a gradient is not finite. The parameters do not change.
    """
    parameters, optimizer, strategy = state.parameters, state.optimizer, task.strategy
    _sum_gradients(parameters, task.processes)
    penalty.gather(task.processes)
    gradient_norm = _norm(state.adapter) if penalty.separate else None
    penalty.add(strategy.penalty(state.context))
    penalty_norm = penalty.apply()
    whole_norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    _check_finite(step, loss + penalty.value, whole_norm, state.trained)
    clip_grads_with_norm_(parameters, task.settings.max_grad_norm, whole_norm)
    rate = state.schedule.rate
    state.movement.begin(step)
    optimizer.step()
    state.movement.stepped()
    strategy.after_step(state.context, rate)
    state.schedule.step()
    optimizer.zero_grad()
    return {
        "penalty": penalty.value,
        "gradient_norm": gradient_norm,
        "penalty_gradient_norm": penalty_norm,
        "learning_rate": rate,
    }


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


def _sum_gradients(parameters: Sequence[nn.Parameter], processes: Processes) -> None:
    summed = processes.sum_tensors([p.grad for p in parameters], parameters)
    for p, gradient in zip(parameters, summed, strict=True):
        p.grad = gradient


def _norm(parameters: list[nn.Parameter]) -> float | None:
    """The norm of the gradients; None if there are no parameters."""
    return float(get_total_norm([p.grad for p in parameters if p.grad is not None])) if parameters else None


def _check_finite(step: int, loss: float, norm: Tensor, trained: Mapping[str, Tensor]) -> None:
    if math.isfinite(loss) and bool(norm.isfinite()):
        return
    broken = [name for name, p in trained.items() if p.grad is not None and not bool(p.grad.isfinite().all())]
    more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
    where = f", and the gradient is not finite in {broken[0]}{more}" if broken else ""
    raise Divergence(f"step {step + 1}: the loss is {loss}{where}; {DIVERGENCE_FIX}")
