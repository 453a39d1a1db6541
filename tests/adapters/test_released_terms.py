"""The L2 and orthogonal terms as the authors of PESO released them, against plain autograd."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from test_proximal_family import adapted, move, parameters

import peso
from peso.adapters.groups import Group, find_groups
from peso.config import load_config
from peso.errors import ConfigError, TrainingError
from peso.training.strategies.strategy import make_strategy

TERMS = [peso.ReleasedL2, peso.ReleasedOrthogonal]


def plain(name: str, now: list[Group], before: list[torch.Tensor]) -> torch.Tensor:
    """The formula with the mean over modules, from single matrices."""
    modules = len({group.module for group in now})
    total = torch.zeros((), dtype=torch.float64)
    for group, anchor in zip(now, before, strict=True):
        x = group.tensor.double()
        if name == "released_l2":
            total = total + (x - anchor).square().sum().sqrt()
        else:
            product = x @ anchor.T if group.factor == "A" else x.T @ anchor
            total = total + product.square().sum()
    return total / modules


@pytest.mark.parametrize("term", TERMS, ids=lambda term: term.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradient_are_those_of_the_formula(term: type, dtype: torch.dtype) -> None:
    model = adapted(dtype=dtype)
    released = term(weight=3.0)
    released.anchor(model)
    before = [group.snapshot().tensor.double() for group in find_groups(model)]
    move(model, 0.01)
    wanted = 3 * plain(released.name, find_groups(model), before)
    assert released(model).item() == pytest.approx(wanted.item(), rel=1e-5)
    of_ours = torch.autograd.grad(released(model), parameters(model))
    of_plain = torch.autograd.grad(wanted, parameters(model))
    for found, true in zip(of_ours, of_plain, strict=True):
        torch.testing.assert_close(found, true, rtol=1e-5, atol=1e-8)
    assert pickle.loads(pickle.dumps(released))(model).item() == released(model).item()


@pytest.mark.parametrize("term", TERMS, ids=lambda term: term.name)
def test_a_sum_is_the_mean_times_the_modules(term: type) -> None:
    model = adapted()
    how = {reduction: term(reduction=reduction) for reduction in ("sum", "mean")}
    for each in how.values():
        each.anchor(model)
    moved = copy.deepcopy(model)
    move(moved, 0.01)
    assert how["sum"](moved).item() == pytest.approx(6 * how["mean"](moved).item(), rel=1e-5)


def test_at_the_anchor_the_distance_has_no_gradient_and_the_overlap_has() -> None:
    model = adapted()
    largest = []
    for kind in TERMS:
        term = kind()
        term.anchor(model)
        gradients = torch.autograd.grad(term(model), parameters(model))
        largest.append(max(float(gradient.abs().max()) for gradient in gradients))
    assert largest[0] == 0
    assert largest[1] > 0


def layer_of_1b() -> list[Group]:
    """The adapter of one of the 16 layers of Llama-3.2-1B, fresh as PEFT draws it."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (2048, 2048), "k": (2048, 512), "v": (2048, 512), "o": (2048, 2048)}
    shapes |= {"gate": (2048, 8192), "up": (2048, 8192), "down": (8192, 2048)}
    groups = []
    for module, (inputs, outputs) in shapes.items():
        a, b = torch.empty(8, inputs), torch.zeros(outputs, 8)
        torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        groups += [Group(module, "A", a.requires_grad_()), Group(module, "B", b.requires_grad_())]
    return groups


def test_at_the_published_weight_the_released_l2_restrains_and_the_released_kl_does_not() -> None:
    """Gradients at weight 2 after steps of N(0, 1e-3²), on the adapter of a 1 B model. The mean over 112
    modules makes the norm over all a quarter of that over the 7 modules of one layer."""
    groups, norms = layer_of_1b(), {}
    terms = [peso.ReleasedL2(2.0), peso.ReleasedOrthogonal(2.0), peso.SoftmaxKL(2.0, "mean")]
    for term in terms:
        term.anchor(groups)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for group in groups:
            group.tensor.add_(1e-3 * torch.randn(group.tensor.shape, generator=generator))
    for term in terms:
        gradients = torch.autograd.grad(term(groups), [group.tensor for group in groups])
        norms[term.name] = torch.cat([g.flatten() for g in gradients]).norm().item() / 4
    assert norms["released_l2"] == pytest.approx(2 * math.sqrt(224) / 112, rel=1e-4)  # 0.267
    assert norms["released_orthogonal"] == pytest.approx(0.207, rel=0.02)  # 0.214 with another B
    assert norms["softmax_kl"] == pytest.approx(2.35e-6, rel=0.01)


@pytest.mark.parametrize("term", TERMS, ids=lambda term: term.name)
def test_there_is_no_strength_and_no_decoupled_form(term: type) -> None:
    with pytest.raises(ConfigError, match="has no curvature at the anchor"):
        term(strength=1.0)
    with pytest.raises(ConfigError, match="has no decoupled form"):
        term(coupling="decoupled")
    anchored = term()
    anchored.anchor(adapted())
    with pytest.raises(TrainingError, match=r"no curvature|no strength"):
        anchored.metric_trace()
    strategy = {"name": "peso", "proximal": term.name}
    made = make_strategy(load_config({"data": "simulate", "strategy": strategy}).strategy)
    assert made.term is not None
    assert (made.term.weight, made.term.coupling, made.term.reduction) == (2.0, "loss", "mean")
    with pytest.raises(ConfigError, match=f"strength: {term.name} has no curvature"):
        load_config({"data": "simulate", "strategy": {**strategy, "strength": 1.0}})


def test_plain_tensors_have_a_distance_and_no_overlap() -> None:
    values = [torch.zeros(3, requires_grad=True)]
    term = peso.ReleasedL2(1.0)
    term.anchor(values)
    with torch.no_grad():
        values[0].copy_(torch.tensor([3.0, 0.0, 4.0]))
    assert term(values).item() == pytest.approx(5.0)
    with pytest.raises(TrainingError, match="plain tensors have no A"):
        peso.ReleasedOrthogonal().anchor([torch.zeros(3)])
