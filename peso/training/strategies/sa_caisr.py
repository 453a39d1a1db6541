"""``sa_caisr``: agreement with the previous model, without its conflicting weights (arXiv 2602.08678).

"SA-CAISR: Stage-Adaptive and Conflict-Aware Incremental Sequential Recommendation" (Song et al., 2026).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from peso.training.strategies.strategy import ForwardPass, StageContext, Strategy

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST = -1e3  # a token with a lower log-probability is not a candidate


class SaCaisr(Strategy):
    """``single``, with agreement with the previous model except where the new data contradict it (SA-CAISR).

    F_i is the mean squared gradient of the *previous* model's loss on ``examples`` targets of the *new*
    stage. It measures how strongly the new data change the value i. In every pass, each trained value of a
    copy of the previous model is set to zero with the probability
    p_i = ``forget`` · (F_i - min F) / (max F - min F), with the minimum and maximum over its tensor, and is
    divided by 1 - p_i otherwise (dropout). The penalty is ``weight`` times a contrastive loss (InfoNCE). It
    pairs the model's prediction of each target with that of the screened copy, against the copy's predictions
    of the other targets of the pass:

        mean over targets j of -log( exp(z_j·ẑ_j / T) / Σ_k exp(z_j·ẑ_k / T) )

    where z are the logits of all candidate tokens, centered and normalized, and T is ``temperature``.

    This follows the paper and the authors' code, with these differences. F is estimated once at the start of
    the stage and from single targets, and not as a moving average over the squared gradients of batches. Only
    the adapter and the semantic vocabulary are screened, because the backbone is frozen. A target is a code
    and not an item. All other targets of a pass are negatives; the code takes the ``topk`` most similar ones,
    and with its default of 0 there are none and the loss is 0. Logits are centered, because they are defined
    up to a constant. The other defaults are those of the code, rounded.
    """

    name = "sa_caisr"
    moves_one_adapter = True
    relative_step_time = 1.4  # one more forward pass, as `distill`

    class Options(Strategy.Options):
        weight: float = Field(1.0, ge=0, description="factor of the contrastive loss")
        forget: float = Field(
            0.4, ge=0, lt=1, description="highest probability of dropping a value of the previous model"
        )
        temperature: float = Field(0.07, gt=0, description="temperature of the contrastive loss")
        examples: int = Field(
            128,
            ge=1,
            description="number of targets of the new stage used to estimate the Fisher information",
        )

    options: Options
    _last: dict[str, Tensor]
    _drop: dict[str, Tensor]  # the probability of dropping each value

    def begin(self, context: StageContext) -> None:
        if not self.options.weight:
            return
        from peso.adapters.proximal.fisher import diagonal_fisher

        assert context.examples is not None
        trained = context.trainable()
        self._last = {name: p.detach().clone() for name, p in trained.items()}
        losses = context.examples.losses(context.number, self.options.examples)
        fisher = diagonal_fisher(list(trained.values()), losses)
        self._drop = {
            name: self.options.forget * scaled(values) for name, values in zip(trained, fisher, strict=True)
        }

    def output_penalty(self, context: StageContext, outputs: ForwardPass) -> Tensor | None:
        if not self.options.weight:
            return None
        # random numbers depend on the step's seed, like those of dropout
        screened = {name: screen(values, self._drop[name]) for name, values in self._last.items()}
        student, reference = outputs.log_probabilities(), outputs.log_probabilities(screened)
        return self.options.weight * contrast(student, reference, self.options.temperature)


def scaled(values: Tensor) -> Tensor:
    """The values scaled to [0, 1] by their minimum and maximum; 0 if all are equal."""
    low, high = values.aminmax()
    return (values - low) / (high - low) if high > low else values.new_zeros(values.shape)


def screen(values: Tensor, drop: Tensor) -> Tensor:
    """Dropout with a separate probability for each value."""
    from torch import rand_like

    return values * (rand_like(drop) >= drop) / (1 - drop)


def contrast(one: Tensor, other: Tensor, temperature: float) -> Tensor:
    """The InfoNCE loss of log-probabilities (targets, tokens) of two models, whose rows are pairs: 0-d."""
    from torch import arange
    from torch.nn.functional import cross_entropy, normalize

    similar = normalize(centered(one), dim=-1) @ normalize(centered(other), dim=-1).T / temperature
    return cross_entropy(similar, arange(len(similar), device=similar.device))


def centered(scores: Tensor) -> Tensor:
    """The scores minus their mean over the candidate tokens; 0 for other tokens."""
    candidates = scores > SMALLEST
    kept = scores.masked_fill(~candidates, 0)
    mean = kept.sum(-1, keepdim=True) / candidates.sum(-1, keepdim=True)
    return (kept - mean).masked_fill(~candidates, 0)
