"""``slice``: each stage's new adapter is initialized by gradient surgery (SLICE, arXiv 2605.12752).

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

ROW_NORM = 1 / math.sqrt(3)  # of a row of A as PEFT draws it
NEGLIGIBLE = 1e-6  # of the largest singular value: a direction with less of it is rounding


class Slice(Strategy):
    """A new adapter along the strongest directions on which new and old gradients agree (SLICE).

    W + s Σ_{i<t} B_i A_i + s B_t A_t. For each module, G is the mean gradient of the loss with respect to the
    weight over ``examples`` single targets of the new stage, and G' that over as many of all earlier stages.
    Where they conflict, ⟨G, G'⟩ < 0, each loses its component along the other (PCGrad, Yu et al. 2020, arXiv
    2001.06782). The rows of A_t are the first right singular vectors of the sum of the two, at the length
    that PEFT draws; B_t begins at zero, so a stage starts with the answers of the last one, and the first
    gradient of B_t lies along the left singular vectors.

    Only the abstract was known when this was written: gradients of the current task and of a replay buffer,
    "a projection operator", a truncated SVD. That the operator is PCGrad's, by module, and that B is left at
    zero, are choices made here. The buffer is drawn from the log of earlier stages.
    """

    name = "slice"
    reads = frozenset({"past"})

    class Options(Strategy.Options):
        examples: int = Field(
            128, ge=1, description="single targets whose gradients are averaged, of each side"
        )

    options: Options

    def begin(self, context: StageContext) -> None:
        from torch import no_grad

        from peso.adapters.groups import lora_layers
        from peso.adapters.lora import TRAINED, Past, put_past, read_adapter, redraw_adapter

        past, last = Past.of_state(context.memory), read_adapter(context.backbone)
        if last.acts:  # else the last stage trained the backbone itself
            past = last if past is None else past + last
        redraw_adapter(context.backbone, (context.seed, context.number))
        if past is not None:
            put_past(context.backbone, past)
            context.memory.update(past.state())
        # with B zero, the model answers as the last stage left it
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
        """Mean gradients with respect to each module's weight: of the new stage, and of earlier ones."""
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
    """The mean over losses of their gradients, float32 and of the weights' shapes."""
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
    """one + other; if they point apart, each without its component along the other."""
    product = (one * other).sum()
    if product >= 0:
        return one + other
    return (one - product / other.square().sum() * other) + (other - product / one.square().sum() * one)


def strongest_inputs(gradient: Tensor, count: int) -> Tensor:
    """The first right singular vectors of a matrix (out, in) as rows (count, in), float32; fewer if it has a
    lower rank. The largest entry of each is positive, as their sign is arbitrary."""
    from torch.linalg import svd

    _, values, rows = svd(gradient.double(), full_matrices=False)
    rows = rows[:count][values[:count] > NEGLIGIBLE * values[0].clamp_min(1e-300)]
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    result: Tensor = rows * largest.sign()
    return result.float()
