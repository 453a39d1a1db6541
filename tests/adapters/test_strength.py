"""What weight and strength mean: the interpolation formula, calibration, and the decoupled form."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from known_metrics import SIZES, TERMS, flat, known_metric, tensors

import peso
from peso.errors import ConfigError, TrainingError


def numeric_hessian(term, anchor: list[torch.Tensor], weight: float = 1.0, step: float = 1e-4) -> np.ndarray:
    """Central differences of the exact gradient around the anchor, float64: good to step²."""
    start = flat(anchor).detach()
    columns = []
    for index in range(len(start)):
        sides = []
        for sign in (1, -1):
            moved = start.clone()
            moved[index] += sign * step
            parts = [part.requires_grad_() for part in moved.split(SIZES)]
            sides.append(flat(torch.autograd.grad(term.value_at(parts, weight), parts)))
        columns.append((sides[0] - sides[1]) / (2 * step))
    return torch.stack(columns).numpy()


# --- stationarity ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("name", TERMS)
def test_the_stationary_solution_interpolates_in_every_eigendirection(name: str, strength: float) -> None:
    """⟨v̂, q⟩ = ρ/(ρ+λ)·⟨v*, q⟩ + λ/(ρ+λ)·⟨a, q⟩ for Σq = ρHq, on ½(v − v*)ᵀΣ(v − v*) with Σ known.

    H comes from the design's formula, not from the term. v* is so near that third order is 1e-5 of second.
    """
    anchor = tensors(0, 0.5)
    a = flat(anchor).detach()
    generator = torch.Generator().manual_seed(1)
    n = len(a)
    spread, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    sigma = spread @ torch.diag(torch.logspace(-1.5, 1.5, n, dtype=torch.float64)) @ spread.T
    target = a + 1e-6 * torch.randn(n, generator=generator, dtype=torch.float64)

    term = TERMS[name](strength=strength)
    term.anchor(anchor)
    metric = known_metric(name, anchor)
    # tr Σ is known, so the losses' squared gradients are made to be it exactly
    root = torch.linalg.cholesky(sigma)
    losses = [math.sqrt(n) * root[:, k] @ flat(anchor) for k in range(n)]
    calibration = term.calibrate(anchor, losses)
    assert calibration.rho == pytest.approx(float(sigma.trace()) / metric.trace(), rel=1e-9)
    weight = term.weight

    solution = [value.detach().clone().requires_grad_() for value in anchor]
    hessian = sigma + weight * torch.from_numpy(metric)
    for _ in range(30):  # Newton with the Hessian at the anchor: a contraction this near to it
        v = flat(solution)
        loss = 0.5 * (v - target) @ sigma @ (v - target) + term(solution)
        gradient = flat(torch.autograd.grad(loss, solution))
        with torch.no_grad():
            for part, step in zip(solution, torch.linalg.solve(hessian, gradient).split(SIZES), strict=True):
                part -= step
    assert float(gradient.norm()) < 1e-12

    # H has a null space (common shifts), Σ has not: H q = (1/ρ) Σ q, Σ-orthonormal; ⟨·, q⟩_Σ = ρ·⟨·, q⟩_H
    inverse_rho, q = scipy.linalg.eigh(metric, sigma.numpy())
    share = 1 / (1 + weight * np.maximum(inverse_rho, 0))  # ρ/(ρ+λ)
    project = q.T @ sigma.numpy()
    found = project @ (flat(solution).detach() - a).numpy()
    wanted = share * (project @ (target - a).numpy())
    size = float(np.linalg.norm(project @ (target - a).numpy())) / math.sqrt(n)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6 * size)
    assert share.min() < 0.95  # the penalty mattered


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("name", TERMS)
def test_the_trace_is_that_of_the_hessian_at_the_anchor(name: str, reduction: str) -> None:
    term = TERMS[name](weight=7.0, reduction=reduction)
    anchor = tensors(3, 0.4)
    term.anchor(anchor)
    assert term.metric_trace() == pytest.approx(np.trace(numeric_hessian(term, anchor)), rel=1e-6)


# --- calibration ----------------------------------------------------------------------------------------


def test_rho_is_within_its_standard_error_and_tokens_make_up_for_the_mean() -> None:
    """Targets of L tokens with independent gradients g ~ N(0, diag(h)): tr Σ = Σ h, whatever L."""
    anchor = tensors(0, dtype=torch.float32)
    spread = torch.linspace(0.1, 1, sum(SIZES))
    generator = torch.Generator().manual_seed(0)

    def losses(count: int, tokens: int):
        for _ in range(count):
            gradients = torch.randn(tokens, sum(SIZES), generator=generator) * spread
            yield (gradients @ flat(anchor)).mean()

    term = peso.L2(strength=0.5)
    term.anchor(anchor)
    true = float(spread.square().mean())  # tr(H) is the number of values
    for tokens in (1, 4):
        found = term.calibrate(anchor, losses(400, tokens), tokens)
        assert found.examples == 400
        assert abs(found.rho - true) < 4 * found.standard_error
        assert 0 < found.standard_error < 0.05 * true
        assert term.weight == 0.5 * found.rho
    assert all(value.grad is None for value in anchor)


def test_a_raw_weight_can_be_calibrated_and_stays() -> None:
    anchor = tensors(0)
    term = peso.SoftmaxKL(weight=3.0)
    term.anchor(anchor)
    rho = term.calibrate(anchor, [flat(anchor).sum(), 2 * flat(anchor).sum()]).rho
    assert term.weight == 3.0
    assert term.calibration.rho == rho > 0
    term.anchor(anchor)  # another stage, another ρ̄
    assert term.calibration is None


def test_the_scale_of_the_metric_drops_out_of_a_calibrated_term() -> None:
    """Sum or mean, ½ or not: at one strength the gradient near the anchor is the same."""
    anchor = tensors(0, 0.1)
    moved = [(value + 1e-3 * torch.ones_like(value).cumsum(0)).detach().requires_grad_() for value in anchor]
    values = []
    for reduction in ("sum", "mean"):
        term = peso.SoftmaxKL(strength=2.0, reduction=reduction)
        term.anchor(anchor)
        term.calibrate(anchor, [flat(anchor).sum(), (3 * flat(anchor)).sum()])
        values.append(float(term(moved).detach()))
    assert values[0] == pytest.approx(values[1], rel=1e-9)


def test_what_cannot_be_calibrated_says_why() -> None:
    anchor = tensors(0)
    term = peso.SoftmaxKL(strength=1.0)
    with pytest.raises(TrainingError, match="no anchor yet"):
        term.calibrate(anchor, [])
    term.anchor(anchor)
    assert term.weight is None
    with pytest.raises(TrainingError, match=r"strength 1 has no weight yet: call calibrate\(model, losses\)"):
        term(anchor)
    loss = flat(anchor).sum()
    with pytest.raises(TrainingError, match="1 losses for the calibration"):
        term.calibrate(anchor, [loss])
    with pytest.raises(TrainingError, match="has no graph"):
        term.calibrate(anchor, [loss.detach()])
    with pytest.raises(TrainingError, match="does not depend on any anchored parameter"):
        term.calibrate(anchor, [torch.ones(3, requires_grad=True).sum()])
    with pytest.raises(TrainingError, match=r"mean squared gradient .* is nan"):
        term.calibrate(anchor, [loss * math.nan, loss * math.nan])
    with pytest.raises(TrainingError, match="tensor 0 is anchored but frozen"):
        term.calibrate([value.detach() for value in anchor], [loss])
    single = [torch.ones(1, requires_grad=True)]
    term.anchor(single)
    with pytest.raises(TrainingError, match="no curvature"):
        term.calibrate(single, [single[0].sum()] * 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 1.0, "strength": 1.0}, "weight 1.0 and strength 1.0 exclude each other"),
        ({"strength": -1.0}, "strength -1.0 must be 0 or more"),
        ({"strength": math.inf}, "strength inf"),
        ({"weight": "2"}, "weight '2' must be 0 or more"),
        ({"strength": [1.0]}, r"strength \[1.0\] must be 0 or more"),
        ({"coupling": "tight"}, "coupling 'tight' is not one of loss, decoupled"),
    ],
)
def test_impossible_options_are_refused(options: dict, message: str) -> None:
    for term in (peso.L2, peso.SoftmaxKL, peso.PerRankKL):
        with pytest.raises(ConfigError, match=message):
            term(**options)


@pytest.mark.parametrize("source", [None, "model", torch.nn.Linear, [], [3]], ids=repr)
def test_an_anchor_is_a_model_or_tensors(source: object) -> None:
    with pytest.raises(TypeError, match="expected a model or a list of models and tensors"):
        peso.L2(weight=1.0).anchor(source)  # type: ignore[arg-type]


def test_other_groups_than_there_are_are_refused() -> None:
    for temperature in ("1", None, 0):
        with pytest.raises(ConfigError, match=f"temperature {temperature!r} must be a finite number above 0"):
            peso.SoftmaxKL(temperature=temperature)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="groups 'layer' is not one of factor, module, rank, all"):
        peso.SoftmaxKL(groups="layer")


# --- the decoupled form ---------------------------------------------------------------------------------

SCHEDULES = {
    "constant": [1e-3] * 50,
    "cosine": [3e-3 * (1 + math.cos(math.pi * step / 400)) / 2 for step in range(400)],
    "uneven": [10.0, 1e-9, 0.0, 3.0, 0.5] * 20,
}


def centred_on(values, weights) -> list[torch.Tensor]:
    return [value - (p * value).sum() for value, p in zip(values, weights, strict=True)]


@pytest.mark.parametrize("strength", [0.01, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_of_a_displacement_at_the_start_a_share_of_1_minus_exp_s_is_gone(
    strength: float, schedule: str, dtype: torch.dtype
) -> None:
    """Within 1 %, with no gradient from the data. Softmax-KL at τ = 1: of what is not a common shift, for
    values as an adapter has them."""
    rates = SCHEDULES[schedule]
    anchor = tensors(0, 0.002, dtype)
    for term in (
        peso.L2(strength=strength, coupling="decoupled"),
        peso.SoftmaxKL(strength=strength, coupling="decoupled"),
    ):
        with torch.no_grad():
            current = [a + 0.01 * b for a, b in zip(anchor, tensors(1, dtype=dtype), strict=True)]
        current = [value.requires_grad_() for value in current]
        term.anchor(anchor)
        before = [(v - a).detach() for v, a in zip(current, anchor, strict=True)]
        for rate in rates:
            term.after_step(current, rate, sum(rates))
        after = [(v - a).detach() for v, a in zip(current, anchor, strict=True)]
        if isinstance(term, peso.SoftmaxKL):
            priors = [torch.softmax(a.detach(), -1) for a in anchor]
            before, after = centred_on(before, priors), centred_on(after, priors)
        gone = 1 - float(flat(after).norm() / flat(before).norm())
        assert gone == pytest.approx(1 - math.exp(-strength), rel=0.01)


@pytest.mark.parametrize("name", TERMS)
def test_strength_0_touches_nothing(name: str) -> None:
    current = tensors(1, dtype=torch.float32)
    bits = [value.detach().clone() for value in current]
    term = TERMS[name](strength=0, coupling="decoupled")
    term.anchor(tensors(0, dtype=torch.float32))
    term.after_step(current, 1e-3, 1.0)
    assert all(torch.equal(v, b) for v, b in zip(current, bits, strict=True))
    in_loss = TERMS[name](strength=0)  # nothing to calibrate either
    in_loss.anchor(tensors(0, dtype=torch.float32))
    gradients = torch.autograd.grad(in_loss(current), current)
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_strength_1e6_is_the_anchor_after_one_step(dtype: torch.dtype) -> None:
    """Exactly for L2; for softmax-KL up to a common shift, that is at a KL of 0."""
    anchor, current = tensors(0, 0.1, dtype), tensors(1, 0.1, dtype)
    l2 = peso.L2(strength=1e6, coupling="decoupled")
    l2.anchor(anchor)
    l2.after_step(current, 1e-3, 1.0)
    assert all(torch.equal(v, a) for v, a in zip(current, anchor, strict=True))

    current = tensors(1, 0.1, dtype)
    kl = peso.SoftmaxKL(strength=1e6, coupling="decoupled")
    kl.anchor(anchor)
    start = float(peso.SoftmaxKL.value(current, anchor).detach())
    kl.after_step(current, 1e-3, 1.0)
    left = float(peso.SoftmaxKL.value(current, anchor).detach())
    assert left < start * 4 * torch.finfo(dtype).eps ** 2 * 100


@settings(max_examples=40, deadline=None)
@given(
    pair=st.tuples(st.floats(0, 50), st.floats(0, 50)),
    name=st.sampled_from(sorted(TERMS)),
    seed=st.integers(0, 1000),
)
def test_the_more_strength_the_nearer(pair: tuple[float, float], name: str, seed: int) -> None:
    """Each value's distance from the group's μ shrinks monotonically, and never changes its side."""
    left = []
    for strength in sorted(pair):
        anchor, current = tensors(seed, 0.3), tensors(seed + 1, 0.3)
        term = TERMS[name](strength=strength, coupling="decoupled")
        term.anchor(anchor)
        start = (flat(current) - flat(anchor)).detach()
        term.after_step(current, 1.0, 1.0)
        moved = (flat(current) - flat(anchor)).detach()
        middle = torch.zeros_like(start) if name == "l2" else means(name, anchor, start)
        assert ((moved - middle) * (start - middle) >= -1e-15).all()
        left.append((moved - middle).abs())
    assert (left[1] <= left[0] + 1e-12).all()


def means(name: str, anchor: list[torch.Tensor], displacement: torch.Tensor) -> torch.Tensor:
    groups = [flat(anchor)] if name == "all" else anchor
    parts, result = displacement.split([len(group) for group in groups]), []
    for group, part in zip(groups, parts, strict=True):
        values = group.detach()
        tau = {"softmax": 1.0, "auto": float(values.std(correction=0)), "mean": 0.3, "all": 0.5}[name]
        result.append((torch.softmax(values / tau, -1) * part).sum().expand(len(part)))
    return torch.cat(result)


def test_softmax_kl_pulls_where_the_prior_has_mass_and_leaves_a_common_shift() -> None:
    anchor = [torch.tensor([0.0, 0.0, 3.0, 0.0], dtype=torch.float64, requires_grad=True)]
    current = [(anchor[0] + torch.tensor([0.5, 0.5, 0.5, 0.5])).detach().requires_grad_()]
    term = peso.SoftmaxKL(strength=5.0, coupling="decoupled")
    term.anchor(anchor)
    term.after_step(current, 1.0, 1.0)
    torch.testing.assert_close(current[0] - anchor[0], torch.full((4,), 0.5, dtype=torch.float64))
    current = [(anchor[0] + torch.tensor([0.1, -0.1, 0.02, 0.0])).detach().requires_grad_()]
    delta = (current[0] - anchor[0]).detach()
    p = torch.softmax(anchor[0].detach(), -1)
    term.after_step(current, 0.1, 1.0)
    mu = (p * delta).sum()
    wanted = mu + (delta - mu) * torch.exp(-0.1 * 5.0 * 4 * p)
    torch.testing.assert_close((current[0] - anchor[0]).detach(), wanted)


def test_a_raw_weight_is_the_rate_itself() -> None:
    anchor, current = tensors(0), tensors(1)
    start = (flat(current) - flat(anchor)).detach()
    term = peso.L2(weight=3.0, coupling="decoupled")
    term.anchor(anchor)
    term.after_step(current, 0.1)
    torch.testing.assert_close((flat(current) - flat(anchor)).detach(), start * math.exp(-0.3))


def test_each_coupling_refuses_the_other_s_call() -> None:
    values = tensors(0)
    decoupled, in_loss = peso.L2(coupling="decoupled"), peso.L2(weight=1.0)
    for term in (decoupled, in_loss):
        term.anchor(values)
    with pytest.raises(TrainingError, match=r"not added to the loss: call after_step"):
        decoupled(values)
    with pytest.raises(TrainingError, match=r"coupling='loss': add term\(model\)"):
        in_loss.after_step(values, 1e-3, 1.0)
    with pytest.raises(TrainingError, match="needs its total_learning_rate"):
        decoupled.after_step(values, 1e-3)
    with pytest.raises(TrainingError, match="tensor 0 is anchored but frozen"):
        decoupled.after_step([value.detach() for value in values], 1e-3, 1.0)


# --- loss coupling under the usual optimiser ------------------------------------------------------------


@pytest.mark.parametrize("name", ["l2", "softmax"])
def test_a_huge_weight_under_adamw_with_clipping_stays_within_steps_of_the_anchor(name: str) -> None:
    """AdamW moves a value by about lr a step however long the gradient is, so a huge weight in the loss
    does not diverge; but it does not hold exactly either: values swing around the anchor within 3 lr."""
    rate = 1e-3
    anchor = tensors(0, 0.1, torch.float32)
    current = [value.detach().clone().requires_grad_() for value in anchor]
    term = TERMS[name](weight=1e6)
    term.anchor(anchor)
    optimizer = torch.optim.AdamW(current, lr=rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    farthest = 0.0
    for _ in range(300):
        data = [torch.randn(value.shape, generator=generator) + 0.5 for value in current]
        loss = sum((g * v).sum() for g, v in zip(data, current, strict=True)) + term(current)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(current, 1.0)
        optimizer.step()
        with torch.no_grad():
            moved = [v - a for v, a in zip(current, anchor, strict=True)]
            if name == "softmax":
                moved = centred_on(moved, [torch.softmax(a, -1) for a in anchor])
            farthest = max(farthest, float(flat(moved).abs().max()))
    assert 0 < farthest < 3 * rate  # 300 steps of the data alone would go 300 · rate


# --- storage --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TERMS)
def test_a_pickled_term_keeps_anchor_and_calibration(name: str) -> None:
    anchor, current = tensors(0), tensors(1)
    term = TERMS[name](strength=1.0)
    term.anchor(anchor)
    term.calibrate(anchor, [flat(anchor).sum(), flat(anchor).square().sum()])
    copy = pickle.loads(pickle.dumps(term))
    assert copy.calibration == term.calibration
    assert torch.equal(copy(current), term(current))
