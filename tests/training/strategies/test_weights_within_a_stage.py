"""``ema`` and ``interpolate``: what is kept of a stage is made of its own weights and those before it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from strategy_runs import Runs, factors, rows
from torch import Tensor

from peso.runs import pipeline
from peso.runs.workspace import Workspace
from peso.training.strategies.ema import Ema
from peso.training.strategies.strategy import StageContext

pytestmark = pytest.mark.slow


def everything(workspace: Workspace, stage: int) -> dict[str, Tensor]:
    matrices = {f"{m}.{k}": t for m, pair in factors(workspace, stage).items() for k, t in enumerate(pair)}
    return matrices | rows(workspace, stage)


def test_the_average_is_its_recurrence() -> None:
    module = torch.nn.Linear(3, 2)
    context = StageContext(1, module, total_steps=8)
    strategy = Ema(horizon=0.5)
    strategy.begin(context)
    expected = {name: p.detach().clone() for name, p in context.trainable().items()}
    for step in range(8):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(0.1 * step - 0.2)
        strategy.after_step(context, 1e-3)
        expected = {name: 0.75 * v + 0.25 * context.trainable()[name] for name, v in expected.items()}
    assert strategy.running().keys() == expected.keys()
    for name, value in strategy.running().items():
        torch.testing.assert_close(value, expected[name])


def test_a_stage_keeps_and_validates_the_average(
    runs: Runs, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Tensor]] = []
    step = Ema.after_step

    def after_step(self: Ema, context: StageContext, learning_rate: float) -> None:
        step(self, context, learning_rate)
        seen.append({name: p.detach().clone() for name, p in context.trainable().items()})

    monkeypatch.setattr(Ema, "after_step", after_step)
    workspace = runs.start(tmp_path / "w", {"name": "ema", "horizon": 1.0})
    pipeline.run(workspace, base=runs("none").root)
    before, kept = rows(workspace, 0)["input_rows"], rows(workspace, 1)["input_rows"]
    steps = [values["vocabulary.input_rows"] for values in seen[:3]]
    expected = before
    for now in steps:
        expected = expected + (now - expected) / 3
    torch.testing.assert_close(kept, expected, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(kept, steps[-1])
    # what the next stage starts from, whose first step has a learning rate of the same order
    assert (seen[3]["vocabulary.input_rows"] - kept).abs().max() < 0.05
    lines = (workspace.stage(1).directory / "log.jsonl").read_text().splitlines()
    losses = [record["validation_loss"] for record in map(json.loads, lines) if "validation_loss" in record]
    single = runs("single").stage(1).metrics["training"]["validation_losses"]
    assert losses != single


def test_interpolate_keeps_the_share_that_validates_best(runs: Runs) -> None:
    shares = [0.0, 0.3, 0.6, 1.0]
    workspace = runs({"name": "interpolate", "shares": shares})
    single = runs("single")
    told = workspace.stage(1).metrics["training"]["strategy"]
    losses = {float(share): loss for share, loss in told["validation_losses"].items()}
    assert list(losses) == shares
    assert told["share"] == min(losses, key=lambda share: losses[share])
    assert losses[1.0] == pytest.approx(
        min(workspace.stage(1).metrics["training"]["validation_losses"]), rel=1e-6
    )
    before, learnt, kept = everything(workspace, 0), everything(single, 1), everything(workspace, 1)
    for name, value in kept.items():
        expected = before[name].lerp(learnt[name], told["share"])
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)


def test_interpolate_stays_where_every_step_is_harmful(runs: Runs) -> None:
    """At a rate that ruins the model, the last stage is the best."""
    workspace = runs("interpolate", "training.later_learning_rate_scale=1000.0")
    for stage in (1, 2):
        assert workspace.stage(stage).metrics["training"]["strategy"]["share"] == 0
        before, after = everything(workspace, stage - 1), everything(workspace, stage)
        assert all(torch.equal(before[name], after[name]) for name in before)
