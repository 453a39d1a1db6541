"""InfLoRA: what earlier inputs take up is protected, what new inputs use of the rest is what A spans."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategy_runs import RANK, SCALE, Runs, changes_at, factors, state
from torch import Tensor

from peso.adapters.groups import lora_layers
from peso.runs.workspace import Workspace
from peso.training.plan import StageExamples
from peso.training.strategies.inf_lora import ROUNDING, Protected, protected

THRESHOLD = 0.9
INF_LORA = {"name": "inf_lora", "threshold": THRESHOLD, "examples": 20}


def inputs_of(seed: int, width: int, rank: int, count: int = 60) -> Tensor:
    """(count, width) float64 rows of full or lower rank, of very different strength by direction."""
    rng = np.random.default_rng(seed)
    strength = 10.0 ** rng.uniform(-2, 2, rank)
    return torch.from_numpy((rng.normal(size=(count, rank)) * strength) @ rng.normal(size=(rank, width)))


def projection(space: Protected) -> Tensor:
    """Onto what is protected."""
    onto = space.basis.double() @ space.basis.double().T
    return torch.eye(len(onto), dtype=torch.float64) - onto if space.dual else onto


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    width=st.integers(2, 12),
    stages=st.integers(1, 4),
    threshold=st.floats(0.3, 0.999),
)
def test_the_memory_holds_the_share_asked_for_and_no_direction_more(
    seed: int, width: int, stages: int, threshold: float
) -> None:
    """Against DualGPM from singular values of the inputs themselves, with one basis throughout."""
    space = Protected.nothing(width)
    basis = np.zeros((width, 0))
    for stage in range(stages):
        x = inputs_of(seed + stage, width, rank=1 + (seed + stage) % width)
        space = space.grown(x.T @ x, threshold)
        left = x.numpy() @ (np.eye(width) - basis @ basis.T)
        _, strength, directions = np.linalg.svd(left)
        total = float((x**2).sum())
        kept = total - float((strength**2).sum())
        for s, direction in zip(strength, directions, strict=False):
            if kept >= threshold * total * (1 - 1e-9):
                break
            basis = np.concatenate([basis, direction[:, None]], axis=1)
            kept += s**2
        assert space.basis.shape[1] <= width - width // 2
        assert space.free == width - basis.shape[1]
        torch.testing.assert_close(projection(space), torch.from_numpy(basis @ basis.T), atol=2e-5, rtol=0)
        columns = space.basis.double()
        torch.testing.assert_close(
            columns.T @ columns, torch.eye(columns.shape[1], dtype=torch.float64), atol=1e-5, rtol=0
        )


@settings(max_examples=40, deadline=None)
@example(seed=12, width=4, count=3)  # what is free is a thousandth as strong as what is not
@example(seed=10, width=11, count=10)  # the weakest free direction is rounding error
@given(seed=st.integers(0, 10**6), width=st.integers(3, 12), count=st.integers(1, 12))
def test_new_directions_are_the_strongest_that_are_free(seed: int, width: int, count: int) -> None:
    """Orthogonal to the memory, orthonormal, and of the projected inputs the first right singular vectors."""
    before, now = inputs_of(seed, width, max(1, width // 2)), inputs_of(seed + 1, width, width)
    space = Protected.nothing(width).grown(before.T @ before, 0.95)
    found = space.free_directions(now.T @ now, min(count, width)).double()
    assert (found @ projection(space)).abs().max() < 1e-6
    free = now @ (torch.eye(width, dtype=torch.float64) - projection(space))
    strength = torch.linalg.svdvals(free)[: min(count, space.free)]
    strength = strength[strength.square() > ROUNDING * now.square().sum()]
    used = len(strength)
    gram = torch.diag(torch.tensor([1.0] * used + [0.0] * (min(count, width) - used), dtype=torch.float64))
    torch.testing.assert_close(found @ found.T, gram, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        (now @ found[:used].T).square().sum(), strength.square().sum(), rtol=1e-4, atol=0
    )


def test_where_new_inputs_have_no_free_component_there_is_no_direction() -> None:
    x = inputs_of(0, width=6, rank=2)
    space = Protected.nothing(6).grown(x.T @ x, 1.0)
    assert space.free == 4
    assert not space.free_directions(x.T @ x, 2).any()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_is_orthogonal_to_what_is_protected(runs: Runs, stage: int) -> None:
    workspace = runs(INF_LORA)
    spaces = protected(state(workspace, stage))
    of = owners(workspace)
    for module, (a, b) in factors(workspace, stage).items():
        assert (a.double() @ projection(spaces[of[module]])).abs().max() < 1e-6
        norms = a.norm(dim=1)
        assert (((norms - 1 / math.sqrt(3)).abs() < 1e-5) | (norms == 0)).all()
        assert norms[0] > 0
        assert b.any()  # learnt


def owners(workspace: Workspace) -> dict[str, str]:
    """q and v of a layer read the same."""
    modules = factors(workspace, 1)
    return {m: m.replace("v_proj", "q_proj") for m in modules}


def energies(workspace: Workspace, model_of: int, stage: int, rows_of: int) -> dict[str, tuple[float, float]]:
    """Module → Σ ‖√3 A x‖² and Σ ‖x‖², A of stage ``rows_of``, over inputs x that stage ``stage`` gives the
    model of stage ``model_of``, caught at the plain layer beneath."""
    model = workspace.stage(model_of).model()
    found: dict[str, tuple[float, float]] = {}
    seed = workspace.config.seed_of_stage(rows_of)
    stream = workspace.stream
    examples = StageExamples(model, stream.stage, rows_of, workspace.config.training, seed)

    def look(name: str, a: Tensor):
        def hook(_, inputs: tuple[Tensor, ...]) -> None:
            along, total = found.get(name, (0.0, 0.0))
            x = inputs[0]
            found[name] = (along + 3 * float((x @ a.T).square().sum()), total + float(x.square().sum()))

        return hook

    rows = factors(workspace, rows_of)
    for name, layer in lora_layers(model.backbone).items():
        layer.base_layer.register_forward_pre_hook(look(name, rows[name][0]))
    examples.show(stage, INF_LORA["examples"])
    return found


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_earlier_inputs_pass_the_new_adapter_by(runs: Runs, stage: int) -> None:
    """On the inputs that were looked at: of their energy at most 1 - threshold lies along A."""
    workspace = runs(INF_LORA)
    for along, total in energies(workspace, stage - 1, stage - 1, stage).values():
        assert along <= (1 - THRESHOLD) * total * (1 + 1e-4)
    for along, _ in energies(workspace, stage - 1, stage, stage).values():
        assert along > 0


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_earlier_adapters_stay_in_the_sum(runs: Runs, stage: int) -> None:
    workspace = runs(INF_LORA)
    for module, change in changes_at(workspace, stage).items():
        parts = [factors(workspace, i)[module] for i in range(stage + 1)]
        torch.testing.assert_close(change, SCALE * sum(b @ a for a, b in parts), atol=2e-6, rtol=1e-5)


def test_b_alone_is_trained(runs: Runs) -> None:
    workspace = runs(INF_LORA)
    trained = sum(b.numel() for _, b in factors(workspace, 1).values())
    vocabulary = workspace.stage(1).model().vocabulary
    counted = workspace.stage(1).manifest["trained_parameters"]
    assert counted == trained + sum(p.numel() for p in vocabulary.parameters())
    assert all(len(a) == RANK for a, _ in factors(workspace, 1).values())


def test_inputs_that_layers_share_are_kept_once(runs: Runs) -> None:
    workspace = runs(INF_LORA)
    assert set(protected(state(workspace, 2))) == set(owners(workspace).values())


@pytest.mark.slow
def test_with_a_backbone_trained_whole_stage_0_is_protected_too(runs: Runs) -> None:
    workspace = runs(INF_LORA, backbone="tiny")
    spaces = protected(state(workspace, 1))
    for module, (a, _) in factors(workspace, 1).items():
        assert (a.double() @ projection(spaces[owners(workspace)[module]])).abs().max() < 1e-6
