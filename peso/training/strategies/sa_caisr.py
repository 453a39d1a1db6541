"""``sa_caisr``: agreement with a last model whose conflicting weights are screened (arXiv 2602.08678).

"SA-CAISR: Stage-Adaptive and Conflict-Aware Incremental Sequential Recommendation" (Song et al., 2026).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from peso.training.strategies.strategy import ForwardPass, StageContext, Strategy

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST = -1e3  # of a log-probability: below it a token does not compete


class SaCaisr(Strategy):
    """``single`` that agrees with the last model, except where the new data contradict it (SA-CAISR).

    F_i is the mean squared gradient of the *last* model's loss on ``examples`` targets of the *new* stage:
    how strongly the new data want the value i changed. In every pass, each trained value of a copy of the
    last model is set to zero with probability p_i = ``forget`` · (F_i - min F) / (max F - min F), min and max
    over its tensor, and divided by 1 - p_i otherwise (dropout). ``weight`` times a contrastive loss (InfoNCE)
    asks the model to answer each target as this screened copy does, compared with the copy's answers to the
    other targets of the pass:

        mean over targets j of -log( exp(z_j·ẑ_j / T) / Σ_k exp(z_j·ẑ_k / T) )

    with z the logits of all tokens that compete, centered and of length 1, and T = ``temperature``.

    Follows the paper and the authors' code, with these differences: F is estimated once, at the start of the
    stage, and not as a moving average over the batches; what is screened is the adapter and the semantic
    vocabulary, as the backbone is frozen; a target is a code and not an item; all other targets of a pass are
    negatives; logits are centered, as they are only known up to a constant; and the defaults are rounded from
    those of the code.
    """

    name = "sa_caisr"
    moves_one_adapter = True
    relative_step_time = 1.4  # one more forward pass, as `distill`

    class Options(Strategy.Options):
        weight: float = Field(1.0, ge=0, description="factor of the contrastive loss")
        forget: float = Field(
            0.4,
            ge=0,
            lt=1,
            description="highest probability with which a value of the last model is left out",
        )
        temperature: float = Field(0.07, gt=0, description="of the contrastive loss")
        examples: int = Field(
            128, ge=1, description="targets of the new stage that the Fisher is estimated from"
        )

    options: Options
    _last: dict[str, Tensor]
    _odds: dict[str, Tensor]

    def begin(self, context: StageContext) -> None:
        if not self.options.weight:
            return
        from peso.adapters.proximal.fisher import diagonal_fisher

        assert context.examples is not None
        trained = context.trainable()
        self._last = {name: p.detach().clone() for name, p in trained.items()}
        losses = context.examples.losses(context.number, self.options.examples)
        fisher = diagonal_fisher(list(trained.values()), losses)
        self._odds = {
            name: self.options.forget * scaled(values) for name, values in zip(trained, fisher, strict=True)
        }

    def output_penalty(self, context: StageContext, outputs: ForwardPass) -> Tensor | None:
        if not self.options.weight:
            return None
        # the draws come from the step's seed, as those of dropout
        screened = {name: screen(values, self._odds[name]) for name, values in self._last.items()}
        student, reference = outputs.log_probabilities(), outputs.log_probabilities(screened)
        return self.options.weight * contrast(student, reference, self.options.temperature)


def scaled(values: Tensor) -> Tensor:
    """To [0, 1] by minimum and maximum; 0 where all are equal."""
    low, high = values.aminmax()
    return (values - low) / (high - low) if high > low else values.new_zeros(values.shape)


def screen(values: Tensor, odds: Tensor) -> Tensor:
    """Each value zero with its probability, otherwise divided by that of being kept."""
    from torch import rand_like

    return values * (rand_like(odds) >= odds) / (1 - odds)


def contrast(one: Tensor, other: Tensor, temperature: float) -> Tensor:
    """InfoNCE of two (targets, tokens) log-probabilities, 0-d: row j of one belongs to row j of the other."""
    from torch import arange
    from torch.nn.functional import cross_entropy, normalize

    similar = normalize(centered(one), dim=-1) @ normalize(centered(other), dim=-1).T / temperature
    return cross_entropy(similar, arange(len(similar), device=similar.device))


def centered(scores: Tensor) -> Tensor:
    """Without the mean over the tokens that compete; 0 for the others."""
    competes = scores > SMALLEST
    kept = scores.masked_fill(~competes, 0)
    mean = kept.sum(-1, keepdim=True) / competes.sum(-1, keepdim=True)
    return (kept - mean).masked_fill(~competes, 0)
