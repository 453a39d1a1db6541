"""``sa_caisr``: agreement with a last model from which conflicting values are screened."""

from __future__ import annotations

import math

import torch
from plain_path import random_sequences, with_adapter
from strategy_runs import Runs, factors

from peso.config import TrainingConfig
from peso.training.likelihood import target_states
from peso.training.penalty import TrainingPass
from peso.training.plan import StageExamples, StagePlan
from peso.training.strategies.sa_caisr import SaCaisr, centered, contrast, scaled, screen
from peso.training.strategies.strategy import StageContext


def test_the_contrastive_loss_is_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(5, 8, generator=generator).log_softmax(-1) for _ in range(2))
    a = [(row - row.mean()) / (row - row.mean()).norm() for row in one]
    b = [(row - row.mean()) / (row - row.mean()).norm() for row in other]
    total = 0.0
    for j in range(5):
        scores = [math.exp(float(a[j] @ b[k]) / 0.3) for k in range(5)]
        total -= math.log(scores[j] / sum(scores)) / 5
    assert math.isclose(float(contrast(one, other, 0.3)), total, rel_tol=1e-5)
    # a common shift of the logits makes no difference
    torch.testing.assert_close(contrast(one + 3, other - 2, 0.3), contrast(one, other, 0.3))


def test_tokens_of_other_levels_do_not_count() -> None:
    scores = torch.tensor([[-1.0, -3.0, -1e4, -1e4], [-1e4, -1e4, -2.0, -2.5]])
    torch.testing.assert_close(centered(scores), torch.tensor([[1.0, -1.0, 0, 0], [0, 0, 0.25, -0.25]]))


def test_screening_leaves_out_by_its_odds_and_keeps_the_mean() -> None:
    values, odds = torch.full((3, 20_000), 2.0), torch.tensor([[0.0], [0.25], [0.6]]).expand(3, 20_000)
    torch.manual_seed(0)
    screened = screen(values, odds)
    left_out = (screened == 0).float().mean(1)
    torch.testing.assert_close(left_out, odds[:, 0], atol=0.02, rtol=0)
    torch.testing.assert_close(screened.mean(1), torch.full((3,), 2.0), atol=0.06, rtol=0)
    assert torch.equal(scaled(torch.tensor([1.0, 3.0, 2.0])), torch.tensor([0.0, 1.0, 0.5]))
    assert not scaled(torch.ones(4)).any()


def test_what_the_new_targets_want_changed_most_is_screened_most(make_model) -> None:
    model = with_adapter(make_model("stream", "semantic"))
    sequences = random_sequences(0, count=6, longest=6)

    class OfOneStage:
        def training_sequences(self):
            return sequences

    examples = StageExamples(model, lambda _: OfOneStage(), 1, TrainingConfig(batch_size=99), 0)
    context = StageContext(1, model.backbone, 1, vocabulary=model.vocabulary, examples=examples)
    strategy = SaCaisr(weight=2.0, forget=0.5, examples=7)
    strategy.begin(context)
    squares = {name: torch.zeros_like(p) for name, p in context.trainable().items()}
    for loss in examples.losses(1, 7):
        model.zero_grad()
        loss.backward()
        for name, p in context.trainable().items():
            squares[name] += 0 if p.grad is None else p.grad**2 / 7
    model.zero_grad()
    for name, values in squares.items():
        low, high = values.min(), values.max()
        torch.testing.assert_close(strategy._drop[name], 0.5 * (values - low) / (high - low))

    packed = StagePlan(sequences, 20, TrainingConfig(batch_size=99), 0, 1).batch(0, model)[0]
    outputs = TrainingPass(model, packed, target_states(model, packed), 0.8)
    penalty = strategy.output_penalty(context, outputs)
    assert penalty is not None
    penalty.backward()
    moved = [name for name, p in context.trainable().items() if p.grad is not None and p.grad.any()]
    assert "vocabulary.output_rows" in moved
    assert any("lora_A" in name for name in moved)
    assert all(not values.requires_grad for values in strategy._last.values())
    # with nothing screened, the model agrees with itself as far as the targets differ at all
    same = SaCaisr(forget=0.0, examples=7)
    same.begin(context)
    agreed = same.output_penalty(context, outputs)
    found = outputs.log_probabilities().detach()
    assert agreed is not None
    torch.testing.assert_close(agreed.detach(), contrast(found, found, 0.07), atol=1e-4, rtol=1e-4)


def test_it_changes_what_a_stage_learns(runs: Runs) -> None:
    one, single = factors(runs({"name": "sa_caisr", "examples": 9}), 1), factors(runs("single"), 1)
    assert any(not torch.equal(a, single[module][0]) for module, (a, _) in one.items())
