"""Strategies that change what is kept or what is penalised, against their definitions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_path import random_sequences, with_adapter
from strategy_runs import STILL, Runs, check_same_results, factors, rows, state
from torch import Tensor

from peso.config import TrainingConfig
from peso.model.generative import GenerativeModel
from peso.runs import pipeline
from peso.runs.stage import RunStage
from peso.runs.workspace import Workspace
from peso.training.likelihood import target_states
from peso.training.penalty import TrainingPass
from peso.training.plan import StagePlan
from peso.training.strategies.distill import Distill
from peso.training.strategies.strategy import StageContext

pytestmark = pytest.mark.slow  # whole runs


@pytest.mark.parametrize(
    "strategy",
    [
        {"name": "average", "share": 1.0},
        {"name": "distill", "weight": 0.0},
        {"name": "ema", "horizon": 1e-9},
        {"name": "peso", "weight": 0.0},
        {"name": "peso", "strength": 0.0},
        {"name": "peso", "strength": 0.0, "coupling": "loss"},
        {"name": "peso", "proximal": "l2", "strength": 0.0},
        {"name": "peso", "proximal": "fisher", "strength": 0.0},
        {"name": "peso", "proximal": "output_kl", "weight": 0.0},
        {"name": "peso", "proximal": "orthogonal", "weight": 0.0},
    ],
    ids=str,
)
def test_with_nothing_to_do_it_is_single_bit_for_bit(runs: Runs, strategy: dict[str, Any]) -> None:
    check_same_results(runs(strategy), runs("single"), 0, 1, 2, 3)


@pytest.mark.parametrize("coupling", ["loss", "decoupled"])
def test_rows_of_the_vocabulary_are_anchored_where_asked_for(runs: Runs, coupling: str) -> None:
    """An anchor that holds all it is given keeps the rows too, and leaves them alone otherwise."""
    how = {"name": "peso", "proximal": "l2", "coupling": coupling, "strength": 1e6}
    moved = {}
    for vocabulary in (False, True):
        workspace = runs({**how, "vocabulary": vocabulary}, "training.weight_decay=0")
        before, after = rows(workspace, 0), rows(workspace, 1)
        moved[vocabulary] = {name: float((after[name] - before[name]).norm()) for name in before}
    assert set(moved[True]) == {"input_rows", "output_rows"}
    for name, distance in moved[True].items():
        # in the loss the first step is free, as the gradient of the penalty is 0 there
        assert distance < (1e-5 if coupling == "decoupled" else 0.9) * moved[False][name]


OVERLAPS = ("orthogonal", "released_orthogonal")


@pytest.mark.parametrize(
    "proximal", ["softmax_kl", "per_rank_kl", "l2", "fisher", "output_kl", "released_l2", *OVERLAPS]
)
def test_every_term_acts_in_a_run(runs: Runs, proximal: str) -> None:
    """A distance is 0 in the first step and not afterwards; what it adds changes what is learnt."""
    workspace = runs({"name": "peso", "proximal": proximal, "weight": 100.0, "reduction": "sum"})
    for stage in (1, 2, 3):
        lines = (workspace.stage(stage).directory / "log.jsonl").read_text().splitlines()
        steps = [record for record in map(json.loads, lines) if "loss" in record]
        first, *others = [record["penalty"] for record in steps]
        assert (first > 1e-3) if proximal in OVERLAPS else (abs(first) < 1e-9)
        assert others
        assert min(others) > 1e-6
    told = workspace.stage(1).metrics["training"]
    assert ("rho" in told.get("strategy", {})) == (proximal not in (*OVERLAPS, "released_l2"))
    single = factors(runs("single"), 1)
    assert any(not torch.equal(a, single[module][0]) for module, (a, _) in factors(workspace, 1).items())


def everything_learnt(workspace: Workspace, stage: int) -> dict[str, Tensor]:
    matrices = {f"{m}.{k}": t for m, pair in factors(workspace, stage).items() for k, t in enumerate(pair)}
    return matrices | rows(workspace, stage)


def test_average_stands_between_what_was_and_what_was_learnt(runs: Runs) -> None:
    """In its first stage, where both learn from the same state."""
    averaged = everything_learnt(runs({"name": "average", "share": 0.25}), 1)
    before, learnt = (everything_learnt(runs("single"), stage) for stage in (0, 1))
    for name, value in averaged.items():
        torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * learnt[name], atol=1e-6, rtol=1e-5)
    assert state(runs({"name": "average", "share": 0.25}), 3) == {}


class First(RuntimeError):
    """The first stage after the base stage is reached."""


@pytest.mark.parametrize("strategy", ["o_lora", "lsat", "full", "inf_lora", "retrain"])
def test_every_strategy_shares_stage_0(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    """Learnt under the strategy's own name, not taken over."""
    base, learn = runs("none"), pipeline.learn

    def base_only(stage: RunStage, *rest: Any) -> None:
        if stage.number:
            raise First
        learn(stage, *rest)

    monkeypatch.setattr(pipeline, "learn", base_only)
    alone = runs.start(tmp_path / "alone", strategy)
    with pytest.raises(First):
        pipeline.run(alone)
    check_same_results(alone, base, 0)


def distilled(model: GenerativeModel, strategy: Distill) -> tuple[StageContext, TrainingPass]:
    context = StageContext(1, model.backbone, 1, vocabulary=model.vocabulary)
    strategy.begin(context)
    plan = StagePlan(random_sequences(0, count=6, longest=6), 20, TrainingConfig(batch_size=99), 0, 1)
    packed = plan.batch(0, model)[0]
    return context, TrainingPass(model, packed, target_states(model, packed), 0.8)


@pytest.mark.parametrize("loss_vocabulary", ["full", "semantic", "level"])
def test_distillation_is_the_divergence_from_the_last_model(make_model: Any, loss_vocabulary: str) -> None:
    model = with_adapter(make_model("instruct", loss_vocabulary))
    strategy = Distill(weight=3.0, temperature=2.0)
    context, outputs = distilled(model, strategy)
    start = strategy.output_penalty(context, outputs)
    assert start is not None
    assert abs(start.item()) < 1e-6
    start.backward()
    assert all(p.grad is None or p.grad.abs().max() < 1e-5 for p in model.parameters())
    model.zero_grad()

    teacher = outputs.log_probabilities().detach().double()
    with torch.no_grad():
        for p in context.trainable().values():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    packed = outputs._pass.packed
    outputs = TrainingPass(model, packed, target_states(model, packed), 0.8)
    found = strategy.output_penalty(context, outputs)
    assert found is not None
    student = outputs.log_probabilities().detach().double()
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    terms = torch.where(p > 0, p * (p.log() - q.log()), torch.zeros_like(p))
    assert found.item() == pytest.approx(3.0 * 4 * float(terms.nansum(-1).mean()), rel=1e-4)
    found.backward()
    assert all(not t.requires_grad and t.grad is None for t in strategy._teacher.values())
    moved = [name for name, q in context.trainable().items() if q.grad is not None and q.grad.any()]
    assert any("lora_A" in name for name in moved)
    assert "vocabulary.output_rows" in moved


def test_a_strong_teacher_is_still_believed_at_the_end(runs: Runs) -> None:
    longer = ("training.max_steps=10", "training.epochs=10", "training.later_learning_rate_scale=0.3")
    free, held = (runs(s, *longer) for s in ("single", {"name": "distill", "weight": 100.0}))
    teacher = predictions(free, 0)
    away = [float((teacher.exp() * (teacher - predictions(w, 1))).sum(-1).mean()) for w in (free, held)]
    assert away[1] < 0.5 * away[0]


@torch.no_grad()
def predictions(workspace: Workspace, stage: int) -> Tensor:
    """(cases, codes) log-probabilities of the first token of what comes next."""
    model = workspace.stage(stage).model()
    prompts = [model.layout.prompt(model.item_token_ids(np.array([i, 3 * i + 1]))) for i in range(12)]
    ids = torch.from_numpy(np.stack(prompts))
    hidden = model.hidden(ids, None, torch.arange(ids.shape[1]).expand_as(ids))[:, -1]
    return model.semantic_logits(hidden, 0).log_softmax(-1)


@pytest.mark.parametrize("backbone", ["pretrained", "tiny"])
def test_full_begins_where_the_last_stage_stood(runs: Runs, backbone: str) -> None:
    """A stage that learns nothing answers as the one before, its adapter merged into the weights."""
    still = runs("full", STILL, backbone=backbone)
    ids = torch.tensor([[0, 260, 268, 261]])
    answers = []
    for stage in range(4):
        model = still.stage(stage).model()
        with torch.no_grad():
            hidden = model.hidden(ids, None, torch.arange(4)[None])
            answers.append(model.semantic_logits(hidden))
    for answer in answers[1:]:
        torch.testing.assert_close(answer, answers[0], atol=1e-5, rtol=0)


def test_full_moves_every_weight_and_stores_it(runs: Runs) -> None:
    workspace = runs("full")
    stages = [dict(workspace.stage(stage).model().named_parameters()) for stage in (1, 2)]
    assert stages[0].keys() == stages[1].keys()
    still = [name for name, p in stages[0].items() if torch.equal(p, stages[1][name])]
    assert still == []
    for stage in (1, 2, 3):
        assert (workspace.stage(stage).directory / "backbone" / "model.safetensors").is_file()
        assert not (workspace.stage(stage).directory / "adapter").exists()
