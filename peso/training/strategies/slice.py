"""``slice``: a new adapter per stage, initialized by gradient surgery (SLICE, arXiv 2605.12752).

"Low-Rank Adapters Initialization via Gradient Surgery for Continual Learning" (Pasquali et al., 2026).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from peso.errors import TrainingError
from peso.training.strategies.strategy import StageContext, Strategy

if TYPE_CHECKING:
    from torch import Tensor, nn

Gradients = dict[str, "Tensor"]  # of the loss with respect to the weight of each module, by its name
LEAST = 1e-30  # keeps divisions by the norm of a zero gradient finite


class Slice(Strategy):
    """A new adapter along directions of the new gradient that do not conflict with the old one (SLICE).

    For each module, G is the mean gradient of the loss with respect to the weight over ``examples`` single
    targets of the new stage, and G' is that over as many targets of the earlier stages, in equal parts. If
    they conflict, ⟨G, G'⟩ < 0, the new gradient loses its component along the old one (PCGrad, Yu et al.
    2020, arXiv 2001.06782), or the part ``correction`` of it:

        P = G + correction · max(0, -⟨G, G'⟩) / ‖G'‖² · G'

    The inner product is over all modules, or separate for each, as ``scope`` says. With P = U S Vᵀ and rank
    r, the adapter starts from

        B⁰ = β (u_1 … u_r),  A⁰ = β (v_{r+1} … v_{2r})ᵀ,  β⁴ = log_m(r) · Var(W) / Var(B⁰A⁰ / β²)

    where m is the smaller size of the weight W. The product B⁰A⁰ is subtracted from the frozen weights, so a
    stage starts with the function of the previous one:

        W + s Σ_{i<t} (B_i A_i - B_i⁰ A_i⁰) + s (B_t A_t - B_t⁰ A_t⁰)

    This follows the authors' code with its settings for the main results of the paper. There, gradients are
    those of batches, the scale s is alpha / √rank, adapters are merged into the weights after each stage, and
    Var(W) is that of the merged weights.
    """

    name = "slice"
    reads = frozenset({"past"})
    uses_frozen_weights = True

    class Options(Strategy.Options):
        examples: int = Field(128, ge=1, description="number of targets for each of the two mean gradients")
        correction: float = Field(
            1.0, ge=0, le=1, description="part of the conflicting component that is removed: 1 is PCGrad"
        )
        scope: Literal["all", "module"] = Field(
            "all", description="whether gradients conflict over all modules, or for each module separately"
        )

    options: Options
    _cosine = math.nan

    def begin(self, context: StageContext) -> None:
        from peso.adapters.groups import lora_layers
        from peso.adapters.lora import Past, put_adapter, put_past, read_adapter, start_new_adapter

        past = start_new_adapter(context.backbone, context.memory, (context.seed, context.number))
        # B is zero here, so the gradients are those of the previous stage's model
        new, old = self._gradients(context)
        self._cosine = float(inner(new, old) / (inner(new, new) * inner(old, old)).sqrt().clamp_min(LEAST))
        projected = without_conflict(new, old, self.options.correction, self.options.scope)
        drawn = read_adapter(context.backbone)
        (rank,), down, up = drawn.ranks, {}, {}
        for name, layer in lora_layers(context.backbone).items():
            # GPT-2's layers have transposed weights
            gradient = projected[name].T if layer.fan_in_fan_out else projected[name]
            if min(gradient.shape) < 2 * rank:
                raise TrainingError(
                    f"strategy slice needs {2 * rank} singular directions of a weight (twice adapter.rank), "
                    f"but {name} has {min(gradient.shape)}: use a smaller rank, or leave the layer out of "
                    "adapter.targets"
                )
            variance = float(layer.get_base_layer().weight.detach().float().var())
            down[name], up[name] = (part.cpu() for part in initial_factors(gradient, rank, variance))
        put_adapter(context.backbone, Past(down, up, drawn.ranks, drawn.magnitudes))
        offset = Past(down, up, drawn.ranks, -drawn.magnitudes)
        past = offset if past is None else past + offset
        put_past(context.backbone, past)
        context.memory.update(past.state())

    def figures(self) -> dict[str, float]:
        return {} if math.isnan(self._cosine) else {"cosine_of_gradients": self._cosine}

    def _gradients(self, context: StageContext) -> tuple[Gradients, Gradients]:
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


def mean_gradients(weights: Mapping[str, nn.Parameter], losses: Iterable[Tensor]) -> Gradients:
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


def inner(one: Gradients, other: Gradients) -> Tensor:
    """⟨one, other⟩ over all modules, float64, 0-d."""
    from torch import stack

    return stack([(gradient.double() * other[name]).sum().cpu() for name, gradient in one.items()]).sum()


def without_conflict(new: Gradients, old: Gradients, correction: float, scope: str) -> Gradients:
    """The new gradients without the part ``correction`` of their component along the old ones, if that is
    negative; see :class:`Slice`."""
    if scope == "module":
        return {name: _without(new, old, correction, [name])[name] for name in new}
    return _without(new, old, correction, list(new))


def _without(new: Gradients, old: Gradients, correction: float, names: list[str]) -> Gradients:
    of_new, of_old = ({name: gradients[name] for name in names} for gradients in (new, old))
    factor = correction * (-inner(of_new, of_old)).clamp_min(0) / inner(of_old, of_old).clamp_min(LEAST)
    return {name: gradient + float(factor) * old[name] for name, gradient in of_new.items()}


def initial_factors(gradient: Tensor, rank: int, variance: float) -> tuple[Tensor, Tensor]:
    """A⁰ (rank, in) and B⁰ (out, rank) in float32; see :class:`Slice`.

    Args:
        gradient: P, (out, in), with at least 2 · rank rows and columns.
        rank: r.
        variance: Var(W), of the entries of the weight.
    """
    from torch.linalg import svd

    left, _, right = svd(gradient.double(), full_matrices=False)
    up, down = left[:, :rank], right[rank : 2 * rank]
    # the signs of singular vectors are arbitrary: the largest entry is positive
    up = up * up.gather(0, up.abs().argmax(0, keepdim=True)).sign()
    down = down * down.gather(1, down.abs().argmax(1, keepdim=True)).sign()
    share = math.log(max(rank, 2)) / math.log(min(gradient.shape))
    beta = (share * variance / (up @ down).var()) ** 0.25
    return (beta * down).float(), (beta * up).float()
