"""Generalised eigendirections: those of the dense problem, and true where prediction is truth."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from known_metrics import SIZES, TERMS, flat, known_metric, tensors

from peso.adapters.directions import (
    ExampleGradients,
    held_out,
    limit_weight,
    stage_weight,
    strongest,
)
from peso.errors import TrainingError

N = sum(SIZES)
TOKENS = 4.0


def sketched(name: str, gradients: torch.Tensor) -> tuple[ExampleGradients, np.ndarray, list[torch.Tensor]]:
    """At a random anchor, of losses with these gradients (examples, N); H by the design's formula."""
    anchor = tensors(0, 0.5)
    term = TERMS[name](weight=1.0)
    term.anchor(anchor)
    losses = (row @ flat(anchor) for row in gradients)
    return ExampleGradients(term, anchor, losses, TOKENS), known_metric(name, anchor), anchor


def random_gradients(examples: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.2, 2, N)
    # float32, as sketches are kept
    return (torch.randn(examples, N, generator=generator) * spread).double()


def null_space(name: str) -> np.ndarray:
    """Steps that cost nothing, (N, groups): a shift of each group."""
    if name == "l2":
        return np.zeros((N, 0))
    return (
        np.ones((N, 1)) if name == "all" else scipy.linalg.block_diag(*(np.ones((size, 1)) for size in SIZES))
    )


def slice_basis(name: str, metric: np.ndarray) -> np.ndarray:
    """A basis (N, m) of the gauge p·d = 0; p from the off-diagonal of H = s(diag(p) − ppᵀ)."""
    shifts = null_space(name)
    if not shifts.shape[1]:
        return np.eye(N)
    weights = np.zeros_like(shifts)
    for column in range(shifts.shape[1]):
        rows = np.flatnonzero(shifts[:, column])
        block = metric[np.ix_(rows, rows)]
        i, j, k = 0, 1, 2
        p = -block[i].copy()  # p_i·p_j·s for all j ≠ i; the ratio of two others gives p_i
        p[i] = block[i, j] * block[i, k] / block[j, k] * -1
        weights[rows, column] = p / p.sum()
    return scipy.linalg.null_space(weights.T)


@pytest.mark.parametrize("examples", [9, 200])
@pytest.mark.parametrize("name", TERMS)
def test_supports_are_the_eigenvalues_of_the_dense_problem(name: str, examples: int) -> None:
    gradients = random_gradients(examples)
    sketch, metric, _ = sketched(name, gradients)
    found = strongest(sketch.gram(), 5, TOKENS)
    sigma = TOKENS / examples * (gradients.T @ gradients).numpy()
    basis = slice_basis(name, metric)
    dense = scipy.linalg.eigh(basis.T @ sigma @ basis, basis.T @ metric @ basis, eigvals_only=True)
    np.testing.assert_allclose(found.support, dense[::-1][:5], rtol=1e-5)
    assert sketch.rho() == pytest.approx(np.trace(sigma) / np.trace(metric), rel=1e-5)


@pytest.mark.parametrize("name", TERMS)
def test_coordinates_and_shares_are_those_of_the_dense_directions(name: str) -> None:
    gradients = random_gradients(9)
    sketch, metric, anchor = sketched(name, gradients)
    directions = strongest(sketch.gram(), 3)
    basis = slice_basis(name, metric)
    sigma = basis.T @ (gradients.T @ gradients).numpy() @ basis
    _, q = scipy.linalg.eigh(sigma, basis.T @ metric @ basis)
    q = basis @ q[:, ::-1][:, :3]  # (N, 3), H-orthonormal
    moved = torch.randn(N, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    step = sketch.step([value + d for value, d in zip(anchor, moved.split(SIZES), strict=True)])
    along = directions.along(sketch.products(step))
    np.testing.assert_allclose(along.abs(), np.abs(q.T @ metric @ moved.numpy()), rtol=1e-4)
    assert sketch.inner(step, step) == pytest.approx(float(moved.numpy() @ metric @ moved.numpy()), rel=1e-5)

    carried = sketch.composition(directions, batch=4)
    np.testing.assert_allclose(carried.shares.sum(1), 1, rtol=1e-9)
    by_value = q * (metric @ q)  # (N, 3): sums to 1
    wanted = [part.sum(0) for part in np.split(by_value, np.cumsum(SIZES)[:-1])]
    np.testing.assert_allclose(carried.shares.T, wanted, rtol=1e-4, atol=1e-6)
    variance = gradients.var(0).numpy()
    second = np.maximum(gradients.mean(0).numpy() ** 2 - variance / 9, 0) + variance / 4
    np.testing.assert_allclose(carried.inertia, (np.sqrt(second)[:, None] * q**2).sum(0), rtol=1e-4)


@pytest.mark.parametrize("weight", [0.3, 30.0])
@pytest.mark.parametrize("name", TERMS)
def test_the_prediction_is_the_truth_of_a_linear_gaussian_problem(name: str, weight: float) -> None:
    """Weight of v* in v̂ = argmin ½(v − v*)ᵀΣ(v − v*) + (λ/2)‖v − a‖²_H, solved densely, shifts free."""
    gradients = random_gradients(200)
    sketch, metric, anchor = sketched(name, gradients)
    # shifts N·c that cost nothing follow freely: min over c of ‖G(d + N·c)‖² is ‖(I − Π)·G·d‖², Π projecting
    # onto the columns of G·N, so that what a shift can do does not count as support
    basis, _ = torch.linalg.qr(gradients @ torch.from_numpy(null_space(name)))
    rest = torch.eye(200, dtype=torch.float64) - basis @ basis.T
    directions = strongest(rest @ sketch.gram() @ rest, N, TOKENS)
    assert len(directions.support) == N - null_space(name).shape[1]

    sigma = TOKENS / 200 * (gradients.T @ gradients).numpy()
    to_optimum = np.random.default_rng(0).normal(size=N)
    held = np.linalg.solve(sigma + weight * metric, sigma @ to_optimum)

    def coordinates(move: np.ndarray) -> np.ndarray:
        parts = torch.from_numpy(move).split(SIZES)
        step = sketch.step([value + d for value, d in zip(anchor, parts, strict=True)])
        return directions.along(sketch.products(step)).numpy()

    predicted = limit_weight(directions.support, weight)
    wanted, size = predicted.numpy() * coordinates(to_optimum), np.abs(coordinates(to_optimum)).max()
    np.testing.assert_allclose(coordinates(held), wanted, rtol=1e-4, atol=2e-5 * size)
    assert predicted.max() - predicted.min() > 0.1  # the directions differ


def test_a_stage_without_end_is_the_limit_and_no_support_decays() -> None:
    support, inertia = torch.tensor([5.0, 1.0, 1e-9]).double(), torch.tensor([0.1, 0.2, 0.4]).double()
    long = stage_weight(support[:2], 2.0, inertia[:2], time=1e3)
    np.testing.assert_allclose(long, limit_weight(support[:2], 2.0), rtol=1e-9)
    s = 0.7 * 2.0 / 0.4
    assert float(stage_weight(support, 2.0, inertia, 0.7)[2]) == pytest.approx((1 - np.exp(-s)) / s, rel=1e-6)


def test_a_short_stage_follows_its_differential_equation() -> None:
    """Δ' = −(ρ(Δ − 1) + λΔ)/δ in small steps, held and free."""
    support, weight, inertia, steps = 3.0, 2.0, 1.7, 20_000
    held = free = 0.0
    for _ in range(steps):
        held -= 0.9 / steps * (support * (held - 1) + weight * held) / inertia
        free -= 0.9 / steps * support * (free - 1) / inertia
    predicted = stage_weight(torch.tensor(support).double(), weight, torch.tensor(inertia).double(), 0.9)
    assert float(predicted) == pytest.approx(held / free, rel=1e-3)


def test_sample_and_held_out_supports_have_the_true_ones_between_them() -> None:
    """Σ = diag(4, 1, …, 1): means over draws of the sums of the first k, with errors several times smaller
    than the gaps."""
    true = torch.ones(60, dtype=torch.float64)
    true[0] = 4.0
    generator = torch.Generator().manual_seed(0)
    sample, fresh = [], []
    for _ in range(20):
        gradients = torch.randn(50, 60, generator=generator, dtype=torch.float64) * true.sqrt()
        gram = gradients @ gradients.T
        sample.append(strongest(gram, 3).support.cumsum(0))
        held = held_out(gram, 3, folds=5)
        fresh.append(held.support.cumsum(0))
        assert bool((held.standard_error > 0).all())
        assert bool((held.mean_share < 0.35).all())  # the mean is 0
    wanted = true.sort(descending=True).values[:3].cumsum(0)
    assert bool((torch.stack(fresh).mean(0) < wanted).all())
    assert bool((torch.stack(sample).mean(0) > wanted).all())
    assert float(torch.stack(fresh).mean(0)[0]) > 2.0  # the strong one is found


def test_a_pull_that_all_examples_share_is_told_from_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(60, 8, generator=generator, dtype=torch.float64)
    gradients[:, 0] += 5.0
    share = held_out(gradients @ gradients.T, 2).mean_share
    assert float(share[0]) > 0.9
    assert float(share[1]) < 0.3


def test_what_cannot_be_sketched_is_refused() -> None:
    with pytest.raises(TrainingError, match="no gradient"):
        strongest(torch.zeros(5, 5, dtype=torch.float64), 2)
    with pytest.raises(TrainingError, match="not finite"):
        strongest(torch.full((5, 5), float("nan"), dtype=torch.float64), 2)
    with pytest.raises(TrainingError, match="use 20 or more"):
        held_out(torch.eye(12, dtype=torch.float64), 2)
    assert len(strongest(torch.ones(5, 5, dtype=torch.float64), 4).support) == 1  # rank 1
