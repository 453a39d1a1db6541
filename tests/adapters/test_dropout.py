"""Dropout from sixteen bits a value does what ``nn.Dropout`` does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peso.adapters.fused import BitDropout, fast_dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [0.05, 0.5])
def test_zeroes_a_share_p_and_scales_the_rest(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = torch.randn(1000, 401, dtype=dtype) + 10
    dropped = BitDropout(p)(values)
    kept = dropped != 0
    # four standard errors of a share, for the whole and for each of the four places of a random word
    for offset in range(4):
        share = 1 - kept.flatten()[offset::4].double().mean().item()
        assert abs(share - p) < 4 * (p * (1 - p) / (kept.numel() / 4)) ** 0.5
    torch.testing.assert_close(dropped[kept], (values / (1 - p))[kept], rtol=1e-2, atol=0)
    assert dropped.dtype == dtype


def test_neighbours_are_dropped_independently() -> None:
    torch.manual_seed(0)
    gone = (BitDropout(0.5)(torch.ones(2**20)) == 0).double()
    for distance in (1, 2, 3, 4):
        both = (gone[distance:] * gone[:-distance]).mean().item()
        assert abs(both - 0.25) < 4 * (0.25 * 0.75 / 2**20) ** 0.5


def test_the_gradient_passes_where_the_value_did() -> None:
    x = torch.randn(7, 5).t().requires_grad_()  # not contiguous
    y = BitDropout(0.5)(x)
    (y * torch.arange(35.0).view(5, 7)).sum().backward()
    expected = torch.where(y != 0, torch.arange(35.0).view(5, 7) * 2, 0)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected)
    assert 0 < int((y != 0).sum()) < 35


def test_seeded_and_silent_in_evaluation() -> None:
    layer, x = BitDropout(0.3), torch.randn(50)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(layer(x))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert layer.eval()(x) is x


def test_a_model_has_it_within_the_context_only() -> None:
    model = nn.ModuleDict({"a": nn.Dropout(0.1), "b": nn.Sequential(nn.Dropout(0.0), nn.Linear(2, 2))})
    before = dict(model.named_modules())
    with fast_dropout(model):
        assert isinstance(model["a"], BitDropout)
        assert model["a"].p == pytest.approx(0.1, abs=2**-17)
        model.eval()
    assert dict(model.named_modules()) == before
    assert not model["a"].training
