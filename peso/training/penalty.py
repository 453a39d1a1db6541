"""What a strategy adds to the loss of a step: its value, its gradient, and what it may look at for it.

Knows gradients of single penalties and the forward pass that a penalty is asked about; knows nothing of
stages, optimisers or how a penalty is computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import get_total_norm

from peso.errors import TrainingError
from peso.model.generative import GenerativeModel
from peso.model.head import log_probabilities
from peso.processes import Processes
from peso.training.batches import Packed
from peso.training.likelihood import target_states

# A penalty on outputs has its gradient taken apart from the loss's, to measure it, in one step out of so
# many: it takes one more pass backward.
MEASURED_EVERY = 8


class Penalty:
    """The penalties of one step.

    ``value``: their sum. ``separate``: whether the parameters' gradients are so far those of the loss alone.

    Args:
        parameters: what is trained.
        adapter: those of them whose gradients are measured, the penalty's as the loss's: of two norms over
            different parameters a ratio would say nothing. None of them: all.
        measured: keep the gradient of penalties on outputs apart from the loss's.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], adapter: Sequence[nn.Parameter], *, measured: bool
    ) -> None:
        self.value = 0.0
        self.separate = True
        self._parameters = parameters
        self._adapter = {id(p) for p in adapter}
        self._measured = measured
        self._gradients: dict[int, Tensor] = {}  # number of a parameter → gradient

    def beside(self, loss: Tensor, penalty: Tensor) -> Tensor:
        """What remains to be differentiated of a pass whose outputs are penalised: the loss, or both."""
        if self._measured:
            self._take(penalty, retain_graph=True)
            return loss
        self.value += float(penalty.detach())
        self.separate = False
        return loss + penalty

    def gather(self, processes: Processes) -> None:
        """Penalties on outputs over the passes of all processes: before :meth:`add`, whose penalties every
        process finds for itself."""
        value, mixed, apart = processes.sum_numbers(self.value, not self.separate, bool(self._gradients))
        self.value, self.separate = value, not mixed
        if apart:
            mine = [self._gradients.get(number) for number in range(len(self._parameters))]
            found = processes.sum_tensors(mine, self._parameters)
            self._gradients = {number: g for number, g in enumerate(found) if g is not None}

    def add(self, penalty: Tensor | None) -> None:
        """A penalty with a graph of its own. Raises TrainingError where it moves nothing that is trained."""
        if penalty is not None:
            self._take(penalty, retain_graph=False)

    def apply(self) -> float | None:
        """Add the gradients to the parameters'; their norm over the adapter, or None where it is not known
        apart."""
        held = []
        for number in self._gradients:
            p = self._parameters[number]
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            held.append(p.grad)
        gradients = list(self._gradients.values())
        if gradients:
            torch._foreach_add_(held, gradients)  # one fused operation for hundreds of small tensors
        if not self.separate:
            return None
        if self._adapter:
            numbers = [n for n in self._gradients if id(self._parameters[n]) in self._adapter]
            gradients = [self._gradients[number] for number in numbers]
        return float(get_total_norm(gradients)) if gradients else 0.0

    def _take(self, penalty: Tensor, *, retain_graph: bool) -> None:
        if not penalty.requires_grad:
            raise TrainingError(
                "the strategy's penalty depends on nothing that is trained: what it holds is frozen. "
                "Let it require a gradient in `begin`, or return no penalty"
            )
        found = torch.autograd.grad(penalty, self._parameters, allow_unused=True, retain_graph=retain_graph)
        self.value += float(penalty.detach())
        for number, gradient in enumerate(found):
            if gradient is not None:
                known = self._gradients.get(number)
                self._gradients[number] = gradient if known is None else known + gradient


class TrainingPass:
    """One forward pass of a training step, see :class:`peso.continual.hooks.ForwardPass`."""

    def __init__(self, model: GenerativeModel, packed: Packed, states: Tensor, temperature: float) -> None:
        self.targets = packed.targets
        self._scored = _Scored(model, packed, temperature)
        self._states = states

    def log_probabilities(self, values: Mapping[str, Tensor] | None = None) -> Tensor:
        if values is None:
            return self._scored.of_states(self._states)
        training = self._scored.model.training
        self._scored.eval()
        try:
            with torch.no_grad():
                named = {f"model.{name}": tensor for name, tensor in values.items()}
                return functional_call(self._scored, named)
        finally:
            self._scored.train(training)


class _Scored(nn.Module):
    """The model and one pass's tokens as one function of the parameters."""

    def __init__(self, model: GenerativeModel, packed: Packed, temperature: float) -> None:
        super().__init__()
        self.model = model
        self.packed = packed
        self.temperature = temperature

    def of_states(self, states: Tensor) -> Tensor:
        return log_probabilities(self.model, states, self.packed.targets, self.temperature)

    def forward(self) -> Tensor:
        return self.of_states(target_states(self.model, self.packed))
