"""The closed form against mpmath and float64, over the whole range of sizes, steps and precisions."""

from __future__ import annotations

import math
from itertools import pairwise

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peso.adapters.proximal.metrics import Prior, second_order, softmax_kl
from peso.errors import TrainingError

TOLERANCE = 1e-5


def group(n: int, step: float, dtype: torch.dtype, seed: int = 0, scale: float = 0.02):
    """An anchor as LoRA has them (values of about 0.02) and the same group after a step; (1, n) each."""
    generator = torch.Generator().manual_seed(seed)
    anchor = (torch.randn(1, n, generator=generator) * scale).to(dtype)
    current = (anchor.float() + torch.randn(1, n, generator=generator) * step).to(dtype)
    return current, anchor


def ours(current: torch.Tensor, anchor: torch.Tensor, temperature: float = 1.0):
    """Value and gradient with respect to `current`, computed in float32 (float64 for float64)."""
    wide = torch.promote_types(current.dtype, torch.float32)
    kl, gradient = softmax_kl(
        (current.to(wide) - anchor.to(wide)) / temperature, Prior.of(anchor.to(wide), temperature)
    )
    return kl, gradient / temperature


def float64_reference(current: torch.Tensor, anchor: torch.Tensor, temperature: float = 1.0):
    """The same quantities in float64, arranged otherwise: mean-centred, with exactly rounded sums."""
    a = anchor.double().numpy().ravel() / temperature
    d = current.double().numpy().ravel() / temperature - a
    p = np.exp(a - a.max())
    p /= math.fsum(p)
    d -= math.fsum(p * d)
    d -= math.fsum(p * d)
    z = math.fsum(p * (np.expm1(d) - d))
    kl = math.fsum(p * d * np.expm1(d)) / (1 + z) - math.log1p(z)
    s = p * np.exp(d) / (1 + z)
    return kl, s * (d - math.log1p(z) - kl) / temperature


def mpmath_reference(current: torch.Tensor, anchor: torch.Tensor, temperature: float = 1.0):
    """The textbook formula, with 50 digits."""
    with mpmath.workdps(50):
        tau = mpmath.mpf(temperature)
        v = [mpmath.exp(mpmath.mpf(x) / tau) for x in current.double().ravel().tolist()]
        a = [mpmath.exp(mpmath.mpf(x) / tau) for x in anchor.double().ravel().tolist()]
        v_sum, a_sum = mpmath.fsum(v), mpmath.fsum(a)
        s = [x / v_sum for x in v]
        ratios = [mpmath.log(x / v_sum * a_sum / y) for x, y in zip(v, a, strict=True)]
        kl = mpmath.fsum(x * ratio for x, ratio in zip(s, ratios, strict=True))
        gradient = [x * (ratio - kl) / tau for x, ratio in zip(s, ratios, strict=True)]
        return float(kl), np.array([float(x) for x in gradient])


def relative_errors(result, reference) -> tuple[float, float]:
    (kl, gradient), (true_kl, true_gradient) = result, reference
    difference = gradient.double().numpy().ravel() - true_gradient
    return abs(float(kl) - true_kl) / true_kl, np.linalg.norm(difference) / np.linalg.norm(true_gradient)


STEPS = [1e-2, 1e-3, 1e-4, 1e-5, 1e-6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("n", [1_000, 16_384, 1_000_000])
def test_value_and_gradient_are_exact_at_every_size_and_step(n: int, step: float, dtype: torch.dtype) -> None:
    # anchors of the size of the step keep bfloat16's own rounding from swallowing it
    current, anchor = group(n, step, dtype, scale=0.02 if dtype is torch.float32 else step)
    value_error, gradient_error = relative_errors(ours(current, anchor), float64_reference(current, anchor))
    assert value_error < TOLERANCE
    assert gradient_error < TOLERANCE


@pytest.mark.parametrize("step", STEPS)
def test_values_agree_with_fifty_digits(step: float) -> None:
    current, anchor = group(1_000, step, torch.float32)
    true = mpmath_reference(current, anchor)
    assert max(relative_errors(ours(current, anchor), true)) < TOLERANCE
    # the float64 reference that stands in for mpmath at a million values is itself far better than that
    kl, gradient = float64_reference(current, anchor)
    assert kl == pytest.approx(true[0], rel=1e-8)
    assert np.linalg.norm(gradient - true[1]) < 1e-8 * np.linalg.norm(true[1])


def test_the_range_reaches_down_to_1e_12() -> None:
    kl, _ = ours(*group(16_384, 1e-6, torch.float32))
    assert 1e-13 < float(kl) < 1e-12


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1_000, 4_000),
    log_step=st.floats(-6, -2),
    log_scale=st.floats(-6, 0),
    temperature=st.sampled_from([1.0, 0.3, 3.0]),
    shift=st.floats(-30, 30),
    seed=st.integers(0, 2**31),
)
def test_exact_for_any_spread_shift_and_temperature(
    n: int, log_step: float, log_scale: float, temperature: float, shift: float, seed: int
) -> None:
    current, anchor = group(n, 10**log_step, torch.float32, seed, 10**log_scale)
    current = current + shift * 10**log_step
    errors = relative_errors(
        ours(current, anchor, temperature), float64_reference(current, anchor, temperature)
    )
    assert max(errors) < TOLERANCE


@pytest.mark.parametrize("step", [0.05, 0.1, 0.2, 1.0, 5.0])
def test_exact_where_the_series_ends_and_where_most_of_the_mass_moves(step: float) -> None:
    current, anchor = group(1_000, step, torch.float32)
    assert max(relative_errors(ours(current, anchor), mpmath_reference(current, anchor))) < TOLERANCE


@pytest.mark.parametrize("step", [3.0, 10.0, 20.0, 30.0])
def test_the_gradient_is_exact_where_one_value_holds_nearly_all_mass(step: float) -> None:
    """There ℓ and KL agree in all digits of float32, and the gradient is 1e-4 to 1e-12 in size."""
    for seed in range(6):
        current, anchor = group(1_000, step, torch.float32, seed)
        assert max(relative_errors(ours(current, anchor), mpmath_reference(current, anchor))) < TOLERANCE


@pytest.mark.parametrize("noise", [0.0, 1e-3, 0.1])
@pytest.mark.parametrize("moved", [-30.0, -20.0, -10.0, -5.0, 5.0, 10.0, 20.0, 30.0])
@pytest.mark.parametrize("count", [1, 4, 100, 200])
def test_the_error_is_bounded_where_values_move_far_together(count: int, moved: float, noise: float) -> None:
    """By 1e-5, plus what rounding the displacement itself does: 2⁻²³·max|d|·‖∂KL/∂d‖₁ for the value, and
    2⁻²³·max|d|·‖s‖ for the gradient. With all 200 values moved, the value is wrong by more than 1e-5, too."""
    current, anchor = group(200, noise, torch.float32, 1)
    current[0, :count] += moved
    kl, gradient = ours(current, anchor)
    true_kl, true_gradient = mpmath_reference(current, anchor)
    rounded = 2**-23 * float((current - anchor).abs().max())
    assert abs(float(kl) - true_kl) <= TOLERANCE * true_kl + rounded * np.abs(true_gradient).sum()
    if count < 200:
        assert float(kl) == pytest.approx(true_kl, rel=TOLERANCE)
    shares = torch.softmax(current.double(), -1)
    error = np.linalg.norm(gradient.double().numpy().ravel() - true_gradient)
    assert error <= TOLERANCE * np.linalg.norm(true_gradient) + rounded * float(shares.norm())


@pytest.mark.parametrize("moved", [-30.0, -20.0, -10.0, -5.0, -3.0, -1.0])
def test_a_few_values_that_lose_their_mass_have_an_exact_gradient(moved: float) -> None:
    """The others, which hold it, do not move: their ℓ and the KL agree in nearly all digits."""
    for count in (1, 10):
        current, anchor = group(400, 0.0, torch.float32, 1)
        current[0, :count] += moved
        kl, gradient = ours(current, anchor)
        # the displacement is what float32 makes of it, which is what the gradient is asked at
        exact = anchor.double() + (current - anchor).double()
        true = mpmath_reference(exact, anchor)
        assert max(relative_errors((kl, gradient), true)) < TOLERANCE


def test_a_near_and_a_far_group_of_one_stack_are_both_exact() -> None:
    pairs = [group(1_000, step, torch.float32, 1) for step in (1e-5, 1e-2, 1.0, 20.0)]
    current, anchor = (torch.cat(side) for side in zip(*pairs, strict=True))
    kl, gradient = ours(current, anchor)
    for row, pair in enumerate(pairs):
        result = kl[row], gradient[row : row + 1]
        assert max(relative_errors(result, mpmath_reference(*pair))) < TOLERANCE


@pytest.mark.parametrize("step", [30.0, 300.0])
def test_all_mass_on_one_value_is_no_overflow(step: float) -> None:
    """The KL is log 1/p of that value, and flat: its gradient is nothing but rounding."""
    current, anchor = group(1_000, step, torch.float32)
    kl, gradient = ours(current, anchor)
    true_kl, true_gradient = mpmath_reference(current, anchor)
    assert float(kl) == pytest.approx(true_kl, rel=TOLERANCE)
    np.testing.assert_allclose(gradient.numpy().ravel(), true_gradient, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 1_000, 16_385])
def test_exactly_zero_at_the_anchor_and_after_a_common_shift(n: int, dtype: torch.dtype) -> None:
    anchor = torch.randn(3, n, dtype=dtype)
    for displacement in (torch.zeros(3, n, dtype=dtype), torch.full((3, n), 0.37, dtype=dtype)):
        kl, gradient = softmax_kl(displacement, Prior.of(anchor))
        assert not kl.any()
        assert not gradient.any()


@pytest.mark.parametrize("constant", [-2.0, -0.5, 1.0, 1024.0])
def test_unchanged_when_a_constant_is_added_to_a_group(constant: float) -> None:
    # steps of 2⁻¹³·k: multiples coarse enough for float32 to add the constant without rounding
    anchor = torch.randn(4, 3_000) * 0.02
    displacement = torch.randint(-20, 21, (4, 3_000)) * 2.0**-13
    prior = Prior.of(anchor)
    kl, gradient = softmax_kl(displacement.clone(), prior)
    shifted_kl, shifted_gradient = softmax_kl(displacement + constant, prior)
    torch.testing.assert_close(shifted_kl, kl, rtol=1e-5, atol=0)
    torch.testing.assert_close(shifted_gradient, gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))
    torch.testing.assert_close(
        second_order(displacement + constant, prior), second_order(displacement, prior), rtol=1e-5, atol=0
    )


def test_the_gradient_of_a_group_sums_to_zero() -> None:
    """Because a common shift changes nothing."""
    _, gradient = softmax_kl(torch.randn(5, 2_000) * 1e-3, Prior.of(torch.randn(5, 2_000)))
    assert (gradient.double().sum(-1).abs() < 1e-5 * gradient.double().abs().sum(-1)).all()


def test_the_second_order_form_is_approached_linearly() -> None:
    anchor = torch.randn(1, 2_000, dtype=torch.float64)
    direction = torch.distributions.Exponential(1.0).sample((1, 2_000)).double()  # skewed: third order ≠ 0
    prior = Prior.of(anchor)

    def gap(step: float) -> float:
        kl, _ = softmax_kl(direction * step, prior)
        return float(kl / second_order(direction * step, prior) - 1)

    gaps = [gap(step) for step in (1e-2, 1e-3, 1e-4, 1e-5)]
    assert abs(gaps[0]) < 0.05
    assert [big / small for big, small in pairwise(gaps)] == pytest.approx([10] * 3, rel=0.05)


def test_groups_of_one_stack_do_not_touch_each_other() -> None:
    anchor, displacement = (
        torch.randn(6, 1_500),
        torch.randn(6, 1_500) * torch.logspace(-6, 1, 6).unsqueeze(1),
    )
    together, gradients = softmax_kl(displacement.clone(), Prior.of(anchor))
    for row in range(6):
        alone, gradient = softmax_kl(displacement[row : row + 1].clone(), Prior.of(anchor[row : row + 1]))
        torch.testing.assert_close(together[row : row + 1], alone)
        torch.testing.assert_close(gradients[row : row + 1], gradient)


def test_a_temperature_at_which_weights_vanish_is_refused() -> None:
    anchor = torch.linspace(-1, 1, 1_000).unsqueeze(0)
    Prior.of(anchor, 2 / 60)
    with pytest.raises(
        TrainingError, match=r"temperature 0\.01 is too small.*Use a temperature above 0\.033"
    ):
        Prior.of(anchor, 0.01)


def textbook(current: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
    """Softmax, 1e-8 added, logarithm of the ratio, all in the dtype of the parameters: the released code."""
    s, p = torch.softmax(current, -1) + 1e-8, torch.softmax(anchor, -1) + 1e-8
    return (s * (s / p).log()).sum()


@pytest.mark.parametrize(
    ("step", "dtype", "too_wrong_by"),
    [(1e-3, torch.float32, 0.05), (1e-4, torch.float32, 1), (1e-3, torch.bfloat16, 100)],
)
def test_why_not_the_textbook_form(step: float, dtype: torch.dtype, too_wrong_by: float) -> None:
    """For n = 16,384 its value is wrong by this much; ours, on the same numbers, is not."""
    current, anchor = group(16_384, step, dtype)
    true = float64_reference(current, anchor)
    assert abs(float(textbook(current, anchor)) / true[0] - 1) > too_wrong_by
    assert max(relative_errors(ours(current, anchor), true)) < TOLERANCE


def test_the_textbook_gradient_points_elsewhere_in_bfloat16() -> None:
    current, anchor = group(16_384, 1e-3, torch.bfloat16)
    true = float64_reference(current, anchor)[1]
    parameter = current.clone().requires_grad_()
    textbook(parameter, anchor).backward()
    wrong = parameter.grad.double().numpy().ravel()
    assert wrong @ true / np.linalg.norm(wrong) / np.linalg.norm(true) < 0.6
    _, gradient = ours(current, anchor)
    right = gradient.double().numpy().ravel()
    assert right @ true / np.linalg.norm(right) / np.linalg.norm(true) > 1 - 1e-9
