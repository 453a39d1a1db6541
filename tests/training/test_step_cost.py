"""What a step needs is found once a stage, and what is found once gives what finding it anew gives."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import peft
import pytest
import torch
from torch import nn

import peso
from peso.adapters import groups as groups_module
from peso.adapters.groups import find_groups
from peso.adapters.proximal import Term
from peso.errors import TrainingError
from peso.model.backbone import small_llama
from peso.training.penalty import MEASURED_EVERY, Movement
from peso.training.strategies.peso import Peso
from peso.training.strategies.strategy import StageContext


def adapted(dtype: torch.dtype = torch.float32, rank: int = 4) -> peft.PeftModel:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=rank, target_modules=["q_proj", "v_proj", "up_proj"])
    model = peft.get_peft_model(small_llama(32, 2, 0), config).to(dtype)
    scatter(model, 0.02)
    return model


@torch.no_grad()
def scatter(model: nn.Module, step: float, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for group in find_groups(model):
        noise = torch.randn(group.tensor.shape, generator=generator, dtype=torch.float64)
        group.tensor.add_((noise * step).to(group.tensor.dtype))


def anchored(term: Term, model: nn.Module) -> Term:
    fisher = {g.name: g.tensor.detach().float().square() for g in find_groups(model)}
    term.anchor(model, **{"fisher": fisher} if term.needs_losses else {})
    return term


def terms(coupling: str) -> list[Term]:
    how: dict[str, Any] = {"weight": 30.0, "coupling": coupling}
    some: list[Term] = [peso.SoftmaxKL(**how, groups=g) for g in ("factor", "module", "rank", "all")]
    some += [peso.SoftmaxKL(**how, temperature="auto"), peso.L2(**how), peso.Fisher(**how)]
    return some if coupling == "decoupled" else [*some, peso.Orthogonal(weight=30.0)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("coupling", ["loss", "decoupled"])
def test_groups_found_before_give_the_same_bits(coupling: str, dtype: torch.dtype) -> None:
    for term in terms(coupling):
        model = adapted(dtype)
        anchored(term, model)
        other, again = copy.deepcopy(model), pickle.loads(pickle.dumps(term))
        found = find_groups(other)
        for step in range(3):
            for source, used in ((model, term), (found, again)):
                for group in find_groups(source):
                    group.tensor.grad = None
                if coupling == "loss":
                    used(source).backward()
                else:
                    used.after_step(source, 1e-2)
            scatter(model, 0.01, step)
            scatter(other, 0.01, step)
            for one, two in zip(find_groups(model), find_groups(found), strict=True):
                assert torch.equal(one.tensor, two.tensor)
                if coupling == "loss" and (one.tensor.grad is not None or two.tensor.grad is not None):
                    assert torch.equal(one.tensor.grad, two.tensor.grad)  # type: ignore[arg-type]


def test_groups_found_in_another_model_are_refused() -> None:
    term = anchored(peso.L2(weight=1.0), adapted())
    with pytest.raises(TrainingError, match="rank or the backbone is different"):
        term(find_groups(adapted(rank=2)))


def test_values_of_one_anchor_do_not_share_memory() -> None:
    """Two values before one backward, the parameters moved in between: each keeps its own gradient."""
    for term in terms("loss"):
        model = adapted()
        anchored(term, model)
        parameters = [group.tensor for group in find_groups(model)]
        alone = []
        for seed in (1, 2):
            scatter(model, 0.01, seed)
            alone.append(torch.autograd.grad(term(model), parameters, allow_unused=True))
            scatter(model, -0.01, seed)
        scatter(model, 0.01, 1)
        first = term(model)
        with torch.no_grad():
            term(model)  # a value without a graph lays out the same memory
        scatter(model, -0.01, 1)
        scatter(model, 0.01, 2)
        if not term.is_distance:
            continue  # plain autograd, which refuses parameters that moved
        together = torch.autograd.grad(first + term(model), parameters, allow_unused=True)
        for one, two, both in zip(*alone, together, strict=True):
            torch.testing.assert_close(both, one + two, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "options",
    [
        {"strength": 1.0, "coupling": "decoupled"},
        {"proximal": "l2", "strength": 1.0, "coupling": "decoupled"},
        {"weight": 2.0},
        {"proximal": "orthogonal", "weight": 2.0},
    ],
    ids=str,
)
def test_a_step_of_peso_does_not_walk_over_the_modules(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted()
    context = StageContext(1, model, total_steps=2, total_rate=1.0)
    strategy = Peso(**options)
    strategy.begin(context)
    monkeypatch.setattr(groups_module, "find_layers", None)
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))
    moved = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    penalty = strategy.penalty(context)
    strategy.after_step(context, 0.5)
    if "coupling" in options:
        after = [p for p in model.parameters() if p.requires_grad]
        for a, v, now in zip(before, moved, after, strict=True):
            assert (now - a).norm() < 0.7 * (v - a).norm()
    else:
        assert penalty is not None
        assert penalty.item() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_movements_are_the_distances_between_the_values(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    parameters = [torch.randn(shape).to(dtype) for shape in ((3, 4), (5,), (2, 2, 2))]

    def values() -> torch.Tensor:
        return torch.cat([p.detach().double().flatten() for p in parameters])

    start = values()
    movement = Movement(parameters)
    for step in range(2 * MEASURED_EVERY):
        before = values()
        movement.begin(step)
        for p in parameters:
            p.add_(torch.randn(p.shape).to(dtype))
        movement.stepped()
        between = values()
        for p in parameters:
            p.mul_(0.75)
        found = movement.figures()
        if step % MEASURED_EVERY:
            assert found == {}
            continue
        now = values()
        expected = {"step_norm": between - before, "pull_norm": now - between, "distance": now - start}
        assert found == {name: pytest.approx(float(way.norm()), rel=1e-5) for name, way in expected.items()}


def test_a_movement_of_no_parameters_is_none() -> None:
    movement = Movement([])
    movement.begin(0)
    movement.stepped()
    assert movement.figures() == {}
