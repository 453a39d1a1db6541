"""``slice``: a new adapter per stage, initialized by gradient surgery (SLICE, arXiv 2605.12752).

"Low-Rank Adapters Initialization via Gradient Surgery for Continual Learning" (Pasquali et al., 2026).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from peso.training.strategies.strategy import StageContext, Strategy

if TYPE_CHECKING:
    from torch import Tensor, nn

ROW_NORM = 1 / math.sqrt(3)  # the norm of a row of A in PEFT's initialization
NEGLIGIBLE = 1e-6  # singular values below this share of the largest are rounding errors


class Slice(Strategy):
    """A new adapter along the strongest directions on which new and old gradients agree (SLICE).

    The weights of stage t are W + s Σ_{i<t} B_i A_i + s B_t A_t. For each module, G is the mean gradient of
    the loss with respect to the weight over ``examples`` single targets of the new stage, and G' is the same
    over an equal number of targets of all earlier stages. If they conflict, ⟨G, G'⟩ < 0, each loses its
    component along the other (PCGrad, Yu et al. 2020, arXiv 2001.06782). The rows of A_t are the first right
    singular vectors of the sum of both, with the norm of PEFT's initialization. B_t is initially zero, so a
    stage starts with the function of the previous one, and the first gradient of B_t is in the span of the
    left singular vectors.

    This is implemented from the abstract, which mentions gradients of the current task and of a replay
    buffer, "a projection operator" and a truncated SVD. The use of PCGrad for each module, and B = 0, are
    choices of this implementation. The buffer is drawn from the log of earlier stages.
    """

    name = "slice"
    reads = frozenset({"past"})
    uses_frozen_weights = True

    class Options(Strategy.Options):
        examples: int = Field(128, ge=1, description="number of targets for each of the two mean gradients")

    options: Options

    def begin(self, context: StageContext) -> None:
        from torch import no_grad

        from peso.adapters.groups import lora_layers
        from peso.adapters.lora import TRAINED, start_new_adapter

        start_new_adapter(context.backbone, context.memory, (context.seed, context.number))
        # B is zero, so the gradients are those of the previous stage's model
        new, old = self._gradients(context)
        with no_grad():
            for name, layer in lora_layers(context.backbone).items():
                down = layer.lora_A[TRAINED].weight
                gradient = reconciled(new[name], old[name])
                if layer.fan_in_fan_out:  # GPT-2's layers have transposed weights
                    gradient = gradient.T
                rows = strongest_inputs(gradient, len(down))
                down[: len(rows)] = ROW_NORM * rows.to(down)

    def _gradients(self, context: StageContext) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The mean gradients with respect to each module's weight, of the new stage and of earlier stages."""
        from peso.adapters.groups import lora_layers

        examples, count = context.examples, self.options.examples
        assert examples is not None
        weights = {
            name: layer.get_base_layer().weight for name, layer in lora_layers(context.backbone).items()
        }
        for weight in weights.values():
            weight.requires_grad_(True)
        try:
            new = mean_gradients(weights, examples.losses(context.number, count))
            share, more = divmod(count, context.number)
            earlier = ((stage, share + (stage < more)) for stage in range(context.number))
            old = mean_gradients(
                weights, (loss for stage, few in earlier if few for loss in examples.losses(stage, few))
            )
        finally:
            for weight in weights.values():
                weight.requires_grad_(False)
        return new, old


def mean_gradients(weights: Mapping[str, nn.Parameter], losses: Iterable[Tensor]) -> dict[str, Tensor]:
    """The mean of the gradients of the losses by name, in float32, with the shapes of the weights."""
    from torch import float32, zeros_like
    from torch.autograd import grad

    sums, count = [zeros_like(weight, dtype=float32) for weight in weights.values()], 0
    for loss in losses:
        for total, gradient in zip(sums, grad(loss, list(weights.values()), allow_unused=True), strict=True):
            if gradient is not None:
                total.add_(gradient)
        count += 1
    return {name: total.div_(count) for name, total in zip(weights, sums, strict=True)}


def reconciled(one: Tensor, other: Tensor) -> Tensor:
    """one + other. If their inner product is negative, each without its component along the other."""
    product = (one * other).sum()
    if product >= 0:
        return one + other
    return (one - product / other.square().sum() * other) + (other - product / one.square().sum() * one)


def strongest_inputs(gradient: Tensor, count: int) -> Tensor:
    """The first right singular vectors of a matrix (out, in) as rows (count, in), in float32. There are fewer
    if its rank is lower. Their signs are such that the largest entry is positive."""
    from torch.linalg import svd

    _, values, rows = svd(gradient.double(), full_matrices=False)
    rows = rows[:count][values[:count] > NEGLIGIBLE * values[0].clamp_min(1e-300)]
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    result: Tensor = rows * largest.sign()
    return result.float()
