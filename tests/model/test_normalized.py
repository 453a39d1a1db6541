"""The softmax without a copy of the scores, against that of PyTorch."""

from __future__ import annotations

import pytest
import torch

from peso.model import normalized as module
from peso.model.normalized import normalized

TARGETS = torch.tensor([0, 3, 4, 8, 7, 2, 1])


def scores(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two parts with 4 and 5 columns; some scores of the second are -inf, those of the targets are not."""
    generator = torch.Generator().manual_seed(seed)
    one, two = (torch.randn(len(TARGETS), columns, generator=generator) * 3 for columns in (4, 5))
    two[:, 2] = -torch.inf
    return one.requires_grad_(), two.requires_grad_()


@pytest.mark.parametrize("temperature", [0.5, 1, 1.0, 2.0])
@pytest.mark.parametrize("at_once", [1, 10, 2**20])
def test_values_and_gradients_are_those_of_a_log_softmax(
    temperature: float, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_VALUES", at_once)
    weights = torch.linspace(-1, 2, len(TARGETS))
    parts = scores(0)
    found = normalized(temperature, TARGETS, *parts)
    expected = (torch.cat(parts, dim=1) / temperature).log_softmax(-1)
    expected = expected.gather(1, TARGETS.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad((weights * found).sum(), parts)
    theirs = torch.autograd.grad((weights * expected).sum(), parts)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
        assert two.abs().max() > 0.1


def test_scores_are_left_as_they_were() -> None:
    parts = scores(1)
    before = [part.detach().clone() for part in parts]
    normalized(1.0, TARGETS, *parts).sum().backward()
    assert all(torch.equal(part, kept) for part, kept in zip(parts, before, strict=True))
