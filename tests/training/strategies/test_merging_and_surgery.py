"""``slao`` and ``slice``: adapters that start from a basis, by their definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from strategy_runs import RANK, SCALE, STILL, Runs, changes_at, factors, state

from peso.adapters.groups import lora_layers
from peso.adapters.lora import Past
from peso.runs.models import context_of, starting_model
from peso.training.strategies.slao import orthonormal_rows
from peso.training.strategies.slice import ROW_NORM, reconciled, strongest_inputs

pytestmark = pytest.mark.slow

# --- slao -----------------------------------------------------------------------------------------------


def test_orthonormal_rows_span_the_same_and_point_the_same_way() -> None:
    matrix = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    basis = orthonormal_rows(matrix)
    torch.testing.assert_close(basis @ basis.T, torch.eye(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(matrix @ basis.T @ basis, matrix, atol=1e-5, rtol=0)
    assert ((matrix @ basis.T).diagonal() > 0).all()
    assert (matrix @ basis.T).triu(1).abs().max() < 1e-5  # row i needs the first i directions only


@pytest.mark.parametrize(("backbone", "first"), [("pretrained", 1), ("tiny", 2)])
def test_b_is_merged_by_the_root_of_the_count_and_a_replaced(runs: Runs, backbone: str, first: int) -> None:
    """From the B of every training, which the stages store."""
    workspace = runs("slao", backbone=backbone)
    for stage in range(first, 4):
        count = stage + 2 - first
        assert int(state(workspace, stage)["slao.count"]) == count
        for module, (_, b) in factors(workspace, stage).items():
            learnt, before = (
                state(workspace, stage)[f"slao.up.{module}"],
                factors(workspace, stage - 1)[module],
            )
            expected = before[1] + (learnt - before[1]) / math.sqrt(count)
            torch.testing.assert_close(b, expected, atol=1e-6, rtol=1e-5)
            assert not torch.allclose(b, learnt)


def test_a_stage_starts_from_the_orthogonal_basis_of_the_last_and_from_its_b(runs: Runs) -> None:
    """A stage that learns nothing ends as it begins."""
    still = runs("slao", STILL)
    for stage in (1, 2):
        for module, (a, b) in factors(still, stage).items():
            before = factors(still, stage - 1)[module]
            torch.testing.assert_close(a, orthonormal_rows(before[0]), atol=1e-6, rtol=0)
            torch.testing.assert_close(b, before[1], atol=1e-6, rtol=0)


# --- slice ----------------------------------------------------------------------------------------------


def test_gradients_that_agree_are_added_and_others_lose_what_conflicts() -> None:
    one, other = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 1.0]])
    torch.testing.assert_close(reconciled(one, other), one + other)
    against = torch.tensor([[-1.0, 0.0]])
    result = reconciled(one, against)
    # (1, 2) without its part along (-1, 0) is (0, 2); (-1, 0) without that along (1, 2) is (-0.8, 0.4)
    torch.testing.assert_close(result, torch.tensor([[-0.8, 2.4]]))
    assert (result * one).sum() >= 0
    assert (result * against).sum() >= 0


def test_strongest_inputs_are_right_singular_vectors() -> None:
    matrix = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    rows = strongest_inputs(matrix, 3)
    _, _, true = torch.linalg.svd(matrix)
    torch.testing.assert_close((rows @ true[:3].T).abs(), torch.eye(3), atol=1e-5, rtol=0)
    assert len(strongest_inputs(torch.outer(matrix[:, 0], matrix[0]), 3)) == 1
    assert len(strongest_inputs(torch.zeros(4, 4), 3)) == 0


def plain_gradients(workspace: Any, stage: int, counts: dict[int, int]) -> dict[str, torch.Tensor]:
    """Mean gradients of every module's weight at the start of a stage, by ``backward``."""
    model = starting_model(workspace.stage(stage))
    context = context_of(workspace.stage(stage), model, {})
    layers = lora_layers(model.backbone)
    for layer in layers.values():
        layer.get_base_layer().weight.requires_grad_(True)
    assert context.examples is not None
    for number, count in counts.items():
        for loss in context.examples.losses(number, count):
            (loss / sum(counts.values())).backward()
    return {name: torch.as_tensor(layer.get_base_layer().weight.grad) for name, layer in layers.items()}


def test_a_is_the_basis_of_the_reconciled_gradients_and_b_zero(runs: Runs) -> None:
    """At stage 1, where the model of the last stage is one adapter."""
    still = runs({"name": "slice", "examples": 12}, STILL)
    new, old = plain_gradients(still, 1, {1: 12}), plain_gradients(still, 1, {0: 12})
    for module, (a, b) in factors(still, 1).items():
        assert b.abs().max() < 1e-29
        expected = strongest_inputs(reconciled(new[module], old[module]), RANK) * ROW_NORM
        torch.testing.assert_close(a, expected, atol=1e-4, rtol=0)


def test_slice_answers_with_the_sum_of_all_adapters(runs: Runs) -> None:
    workspace = runs({"name": "slice", "examples": 12})
    for stage in (1, 2, 3):
        past = Past.of_state(state(workspace, stage))
        assert past is not None
        assert past.ranks == (RANK,) * stage
        for module, change in changes_at(workspace, stage).items():
            parts = [factors(workspace, i)[module] for i in range(stage + 1)]
            expected = SCALE * sum(b @ a for a, b in parts)
            torch.testing.assert_close(change, expected, atol=2e-6, rtol=1e-5)
