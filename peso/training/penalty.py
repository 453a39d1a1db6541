"""The penalty that a strategy adds to the loss, and measurements of how far a step moves the adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import get_total_norm

from peso.errors import TrainingError
from peso.model.generative import GenerativeModel
from peso.model.head import log_probabilities
from peso.runtime.processes import Processes
from peso.training.batches import Packed
from peso.training.likelihood import target_states

# In one of this number of steps, the gradient of a penalty on outputs is computed separately from that of the
# loss, which takes one more backward pass.
MEASURED_EVERY = 8


class Penalty:
    """The penalties of one step.

    Args:
        adapter: the parameters whose gradient norms are reported, for the penalty as for the loss; if it is
            empty, all of them.
        measured: whether to compute the gradient of penalties on outputs separately from that of the loss.

    Attributes:
        value: the sum of the penalties so far.
        separate: whether the parameters' gradients are so far those of the loss alone.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], adapter: Sequence[nn.Parameter], *, measured: bool
    ) -> None:
        self.value = 0.0
        self.separate = True
        self._parameters = parameters
        self._adapter = {id(p) for p in adapter}
        self._measured = measured
        self._gradients: dict[int, Tensor] = {}  # index of a parameter → gradient

    def with_loss(self, loss: Tensor, penalty: Tensor) -> Tensor:
        """Add a penalty on the outputs of one forward pass. Returns the value that the caller must
        differentiate: the loss if the penalty is measured separately, otherwise the sum of both."""
        if self._measured:
            self.add(penalty, retain_graph=True)
            return loss
        self.value += float(penalty.detach())
        self.separate = False
        return loss + penalty

    def gather(self, processes: Processes) -> None:
        """Sum the penalties on outputs over all processes. This must be called before penalties on parameters
        are added, which every process computes in full."""
        value, mixed, apart = processes.sum_numbers(self.value, not self.separate, bool(self._gradients))
        self.value, self.separate = value, not mixed
        if apart:
            mine = [self._gradients.get(number) for number in range(len(self._parameters))]
            found = processes.sum_tensors(mine, self._parameters)
            self._gradients = {number: g for number, g in enumerate(found) if g is not None}

    def add(self, penalty: Tensor | None, *, retain_graph: bool = False) -> None:
        """Add the value and the gradient of a penalty; None adds nothing.

        Raises:
            TrainingError: the penalty does not depend on any trained parameter.
        """
        if penalty is None:
            return
        if not penalty.requires_grad:
            raise TrainingError(
                "the strategy's penalty does not depend on any trained parameter, because the parameters it "
                "penalizes are frozen: set their requires_grad in `begin`, or return None as the penalty"
            )
        found = torch.autograd.grad(penalty, self._parameters, allow_unused=True, retain_graph=retain_graph)
        self.value += float(penalty.detach())
        for number, gradient in enumerate(found):
            if gradient is not None:
                gradient = gradient.to_dense() if gradient.is_sparse else gradient
                known = self._gradients.get(number)
                self._gradients[number] = gradient if known is None else known + gradient

    def apply(self) -> float | None:
        """Add the gradients to the ``grad`` of the parameters. Returns the norm of the penalty's gradient
        over the adapter; None if it was not measured separately."""
        gradients = list(self._gradients.values())
        if gradients:
            totals = []
            for p in (self._parameters[number] for number in self._gradients):
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                totals.append(p.grad)
            torch._foreach_add_(totals, gradients)  # one fused operation for hundreds of small tensors
        if not self.separate:
            return None
        if self._adapter:
            numbers = [n for n in self._gradients if id(self._parameters[n]) in self._adapter]
            gradients = [self._gradients[number] for number in numbers]
        return float(get_total_norm(gradients)) if gradients else 0.0


class TrainingPass:
    """One forward pass of a training step, which implements
    :class:`peso.training.strategies.strategy.ForwardPass`."""

    def __init__(self, model: GenerativeModel, packed: Packed, states: Tensor, temperature: float) -> None:
        self.targets = packed.targets
        self._pass = _OnePass(model, packed, temperature)
        self._states = states

    def log_probabilities(self, values: Mapping[str, Tensor] | None = None) -> Tensor:
        if values is None:
            return self._pass.of_states(self._states)
        training = self._pass.model.training
        self._pass.eval()
        try:
            with torch.no_grad():
                named = {f"model.{name}": tensor for name, tensor in values.items()}
                return functional_call(self._pass, named)
        finally:
            self._pass.train(training)


class _OnePass(nn.Module):
    """The log-probabilities of one pass as a function of the model's parameters, for ``functional_call``."""

    def __init__(self, model: GenerativeModel, packed: Packed, temperature: float) -> None:
        super().__init__()
        self.model = model
        self.packed = packed
        self.temperature = temperature

    def of_states(self, states: Tensor) -> Tensor:
        return log_probabilities(self.model, states, self.packed.targets, self.temperature)

    def forward(self) -> Tensor:
        return self.of_states(target_states(self.model, self.packed))


class Movement:
    """Measures how far the optimizer's update and the pull of ``after_step`` move the adapter.

    One of ``MEASURED_EVERY`` steps is measured. The memory is that of three copies of the adapter. ::

        movement = Movement(adapter)          # before training
        movement.begin(step)
        optimizer.step()
        movement.stepped()
        strategy.after_step(context, rate)
        movement.figures()                    # {} if the step is not measured

    Args:
        parameters: the parameters of the adapter, with their values before training.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = [p.detach() for p in parameters]
        self._measured = False
        self._start, self._one, self._other = (_Snapshot(self._parameters) for _ in range(3))
        self._start.take()

    def begin(self, step: int) -> None:
        """Call this before the optimizer's update."""
        self._measured = step % MEASURED_EVERY == 0 and bool(self._parameters)
        if self._measured:
            self._one.take()

    def stepped(self) -> None:
        """Call this after the optimizer's update, before ``after_step``."""
        if self._measured:
            self._other.take()

    def figures(self) -> dict[str, float]:
        """The norms of three displacements: ``step_norm`` of the optimizer's update, ``pull_norm`` of
        ``after_step`` (0 for most strategies), and ``distance`` from the start of training, after both."""
        if not self._measured:
            return {}
        stepped = self._other.distance(self._one)
        self._one.take()
        return {
            "step_norm": stepped,
            "pull_norm": self._one.distance(self._other),
            "distance": self._one.distance(self._start),
        }


class _Snapshot:
    """A copy of many tensors in one flat tensor, so that a distance takes two operations. It is on the device
    of the first tensor, in float32 or better."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = list(parameters)
        sizes = [p.numel() for p in parameters]
        first = parameters[0] if parameters else torch.zeros(0)
        dtype = torch.promote_types(first.dtype, torch.float32)
        self.values = torch.zeros(sum(sizes), dtype=dtype, device=first.device)
        parts = self.values.split(sizes)
        self._parts = [part.view(p.shape) for part, p in zip(parts, parameters, strict=True)]

    def take(self) -> None:
        """Copy the current values."""
        if self._parts:
            torch._foreach_copy_(self._parts, self._parameters)

    def distance(self, other: _Snapshot) -> float:
        return float(torch.linalg.vector_norm(self.values - other.values))
