"""Sums of adapters are the sums of their definitions, put together by hand from the files of the stages."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from strategy_runs import RANK, SCALE, STILL, Runs, changes_at, factors, state
from torch import Tensor

from peso.adapters.lora import Past
from peso.runs.workspace import Workspace
from peso.training.strategies.o_lora import OLora

pytestmark = pytest.mark.slow

VARIANTS = list(itertools.product(("all", "latest"), (False, True)))


def sum_lora(history: str, inherit: bool, name: str = "sum_lora") -> dict[str, Any]:
    return {"name": name, "history": history, "inherit": inherit}


def by_hand(workspace: Workspace, stage: int, magnitudes: list[float], latest: bool) -> dict[str, Tensor]:
    """s B_t A_t + Σ_i m_i (B_i / ‖B_i‖) (A_i / ‖A_i‖)."""
    now = factors(workspace, stage)
    earlier = range(stage - 1, stage) if latest else range(stage)
    changes = {}
    for module, (a, b) in now.items():
        total = SCALE * b @ a
        for m, i in zip(magnitudes, earlier, strict=True):
            a, b = factors(workspace, i)[module]
            total += m * (b / b.norm()) @ (a / a.norm())
        changes[module] = total
    return changes


def check_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for module, change in found.items():
        torch.testing.assert_close(change, expected[module], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("history", "inherit"), VARIANTS)
def test_sum_lora_is_its_formula(runs: Runs, history: str, inherit: bool) -> None:
    workspace = runs(sum_lora(history, inherit))
    for stage in (1, 2, 3):
        count = 1 if history == "latest" else stage
        check_close(
            changes_at(workspace, stage), by_hand(workspace, stage, [SCALE] * count, history == "latest")
        )


@pytest.mark.parametrize(("history", "inherit"), VARIANTS)
def test_what_is_kept_grows_with_all_and_stays_with_latest(runs: Runs, history: str, inherit: bool) -> None:
    workspace = runs(sum_lora(history, inherit))
    assert state(workspace, 0) == {}
    for stage in (1, 2, 3):
        past = Past.of_state(state(workspace, stage))
        assert past is not None
        assert past.ranks == (RANK,) * (1 if history == "latest" else stage)
        assert all(len(down) == past.rank for down in past.down.values())


def test_inherit_begins_at_the_last_adapter_and_otherwise_a_fresh_one(runs: Runs) -> None:
    """A stage that learns nothing ends as it begins."""
    inherited, fresh = (runs(sum_lora("all", inherit), STILL) for inherit in (True, False))
    base = factors(inherited, 0)
    for module, (a, b) in factors(inherited, 2).items():
        assert torch.equal(a, base[module][0])
        assert torch.equal(b, base[module][1])
    one, two = factors(fresh, 1), factors(fresh, 2)
    for module, (a, b) in two.items():
        assert b.abs().max() < 1e-29
        assert not torch.equal(a, base[module][0])
        assert not torch.equal(a, one[module][0])  # each stage draws its own


def test_a_backbone_trained_whole_leaves_no_adapter_to_sum(runs: Runs) -> None:
    workspace = runs(sum_lora("all", False), backbone="tiny")
    assert state(workspace, 1) == {}
    past = Past.of_state(state(workspace, 2))
    assert past is not None
    assert past.ranks == (RANK,)


@pytest.mark.parametrize(("history", "inherit"), VARIANTS)
def test_sd_lora_is_its_formula_with_the_magnitudes_it_learnt(
    runs: Runs, history: str, inherit: bool
) -> None:
    workspace = runs(sum_lora(history, inherit, "sd_lora"))
    for stage in (1, 2, 3):
        magnitudes = state(workspace, stage)["past.magnitudes"].tolist()
        assert all(abs(m - SCALE) > 1e-3 for m in magnitudes)
        check_close(changes_at(workspace, stage), by_hand(workspace, stage, magnitudes, history == "latest"))


def test_magnitudes_go_on_where_the_last_stage_left_them(runs: Runs) -> None:
    """What a stage inherits is seen where it moves on from: Adam takes about the learning rate a step."""
    workspace = runs(sum_lora("all", False, "sd_lora"))
    one, two, three = (state(workspace, stage)["past.magnitudes"] for stage in (1, 2, 3))
    assert ((three[:2] - two).abs() < 3 * 3e-2 * 1.1).all()
    assert abs(three[0] - SCALE) > abs(three[0] - two[0])
    assert abs(two[0] - SCALE) > abs(two[0] - one[0])


def test_o_lora_is_the_plain_sum(runs: Runs) -> None:
    workspace = runs("o_lora")
    for stage in (1, 2, 3):
        expected = {
            module: SCALE * sum(b @ a for a, b in (factors(workspace, i)[module] for i in range(stage + 1)))
            for module in factors(workspace, stage)
        }
        check_close(changes_at(workspace, stage), expected)  # type: ignore[arg-type]
        past = Past.of_state(state(workspace, stage))
        assert past is not None
        assert past.ranks == (RANK,) * stage


def overlap(workspace: Workspace, stage: int) -> float:
    now = factors(workspace, stage)
    return sum(
        float((factors(workspace, i)[module][0] @ a.T).abs().sum())
        for module, (a, _) in now.items()
        for i in range(stage)
    )


def test_the_penalty_of_o_lora_drives_overlaps_down(runs: Runs) -> None:
    longer = ("training.max_steps=12", "training.epochs=12")
    free, held = (runs({"name": "o_lora", "weight": weight}, *longer) for weight in (0.0, 10.0))
    for stage in (1, 2):
        assert overlap(held, stage) < 0.8 * overlap(free, stage)


def test_the_penalty_of_o_lora_is_its_formula(runs: Runs) -> None:
    from peso.runs.models import starting_model, stored_memory
    from peso.training.strategies.strategy import StageContext

    workspace = runs({"name": "o_lora", "weight": 0.0})
    model = starting_model(workspace.stage(2))
    memory = stored_memory(workspace.stage(1))
    context = StageContext(2, model.backbone, 1, vocabulary=model.vocabulary, memory=memory)
    strategy = OLora(weight=0.25)
    strategy.begin(context)
    penalty = strategy.penalty(context)
    assert penalty is not None
    layers = dict(model.causal_lm.named_modules())
    expected = sum(
        float(
            (factors(workspace, i)[module][0] @ layers[module].lora_A["default"].weight.detach().T)
            .abs()
            .sum()
        )
        for module in factors(workspace, 1)
        for i in (0, 1)
    )
    assert penalty.item() == pytest.approx(0.25 * expected, rel=1e-5)
    penalty.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert moved == {name for name, p in model.named_parameters() if "lora_A.default" in name}
