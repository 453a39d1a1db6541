"""``slao`` and ``slice``: adapters that start from a basis, by their definitions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from strategy_runs import RANK, SCALE, STILL, Runs, changes_at, factors, state

from peso.adapters.groups import lora_layers
from peso.adapters.lora import Past
from peso.errors import TrainingError
from peso.runs import pipeline
from peso.runs.models import context_of, starting_model
from peso.training.strategies.slao import orthonormal_rows
from peso.training.strategies.slice import initial_factors, without_conflict

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


def test_a_conflict_is_removed_from_the_new_gradient_alone() -> None:
    new = {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([[0.0, -4.0]])}
    old = {"a": torch.tensor([[3.0, 1.0]]), "b": torch.tensor([[0.0, 2.0]])}
    # over all modules ⟨new, old⟩ = 5 - 8 = -3 and ‖old‖² = 14; of module a alone nothing conflicts
    everything = without_conflict(new, old, 1.0, "all")
    for name in new:
        torch.testing.assert_close(everything[name], new[name] + 3 / 14 * old[name])
    half = without_conflict(new, old, 0.5, "all")
    torch.testing.assert_close(half["a"], new["a"] + 3 / 28 * old["a"])
    each = without_conflict(new, old, 1.0, "module")
    torch.testing.assert_close(each["a"], new["a"])
    torch.testing.assert_close(each["b"], torch.zeros(1, 2))
    agreeing = without_conflict({"a": new["a"]}, {"a": old["a"]}, 1.0, "all")
    torch.testing.assert_close(agreeing["a"], new["a"])
    nothing = {name: torch.zeros(1, 2) for name in new}
    torch.testing.assert_close(without_conflict(new, nothing, 1.0, "all")["b"], new["b"])


def reference_factors(gradient: np.ndarray, rank: int, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A⁰ and B⁰ from the eigenvectors of P Pᵀ and Pᵀ P, whose largest entries are positive."""
    p = gradient.astype(np.float64)
    left, right = (
        np.stack([v * np.sign(v[np.abs(v).argmax()]) for v in np.linalg.eigh(square)[1].T[::-1]])
        for square in (p @ p.T, p.T @ p)
    )
    left, right = left[:rank].T, right[rank : 2 * rank]
    wanted = math.log(rank, min(p.shape)) * weight.astype(np.float64).var(ddof=1)
    beta = (wanted / (left @ right).var(ddof=1)) ** 0.25
    return beta * right, beta * left


def alike(found: torch.Tensor, expected: np.ndarray) -> bool:
    return bool(np.allclose(found.numpy(), expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max()))


def test_the_factors_are_disjoint_singular_directions_with_the_variance_of_the_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    gradient, weight = torch.randn(12, 9, generator=generator), torch.randn(12, 9, generator=generator) / 3
    down, up = initial_factors(gradient, 3, float(weight.var()))
    a, b = reference_factors(gradient.numpy(), 3, weight.numpy())
    assert alike(down, a)
    assert alike(up, b)
    wanted = math.log(3) / math.log(9) * float(weight.var())
    assert float((up @ down).var()) == pytest.approx(wanted, rel=1e-5)
    again = initial_factors(-gradient, 3, float(weight.var()))  # signs do not depend on the decomposition
    torch.testing.assert_close(again[0], down)
    torch.testing.assert_close(again[1], up)


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


def test_a_stage_starts_from_the_factors_of_the_projected_gradient(runs: Runs) -> None:
    """At stage 1, where the model of the last stage is one adapter; in NumPy."""
    still = runs({"name": "slice", "examples": 12}, STILL)
    new, old = (
        {module: gradient.double().numpy() for module, gradient in found.items()}
        for found in (plain_gradients(still, 1, {number: 12}) for number in (1, 0))
    )
    product = sum((new[module] * old[module]).sum() for module in new)
    size = sum((old[module] ** 2).sum() for module in new)
    layers = lora_layers(starting_model(still.stage(1)).backbone)
    for module, (a, b) in factors(still, 1).items():
        projected = new[module] + max(0.0, -product) / size * old[module]
        weight = layers[module].get_base_layer().weight.detach().numpy()
        down, up = reference_factors(projected, RANK, weight)
        assert alike(a, down), module
        assert alike(b, up), module
    cosine = still.stage(1).metrics["training"]["strategy"]["cosine_of_gradients"]
    norm = math.sqrt(size * sum((new[module] ** 2).sum() for module in new))
    assert cosine == pytest.approx(product / norm, rel=1e-3)


@pytest.mark.parametrize("backbone", ["pretrained", "tiny"])
def test_a_stage_starts_with_the_function_of_the_last(runs: Runs, backbone: str) -> None:
    """A stage that learns nothing ends as it begins."""
    still = runs({"name": "slice", "examples": 12}, STILL, backbone=backbone)
    first = 0 if backbone == "pretrained" else 1
    for stage in (first + 1, 3):
        before = changes_at(still, first) if backbone == "pretrained" else None
        for module, change in changes_at(still, stage).items():
            expected = before[module] if before else torch.zeros_like(change)
            torch.testing.assert_close(change, expected, atol=1e-5, rtol=0)
            assert factors(still, stage)[module][1].abs().max() > 1e-3


def test_slice_answers_with_the_sum_of_what_each_adapter_learned(runs: Runs) -> None:
    learning = runs({"name": "slice", "examples": 12})
    for stage in (1, 2, 3):
        past = Past.of_state(state(learning, stage))
        assert past is not None
        assert past.ranks == (RANK,) * (2 * stage)  # of stage 0; then pairs of a start and what was learned
        torch.testing.assert_close(past.magnitudes[1::2], torch.full((stage,), -SCALE))
        for module, change in changes_at(learning, stage).items():
            parts = [SCALE * b @ a for b, a in (factors(learning, i)[module][::-1] for i in range(stage + 1))]
            starts = [
                SCALE * up @ down
                for up, down in zip(
                    past.up[module].split(RANK, 1)[1::2], past.down[module].split(RANK)[1::2], strict=True
                )
            ]
            torch.testing.assert_close(change, sum(parts) - sum(starts), atol=2e-5, rtol=1e-4)


def test_a_rank_without_enough_directions_is_refused(runs: Runs, tmp_path: Any) -> None:
    workspace = runs.start(tmp_path / "w", {"name": "slice", "examples": 2}, "adapter.rank=17")
    with pytest.raises(TrainingError, match=r"needs 34 singular directions .* has 32"):
        pipeline.run(workspace)
