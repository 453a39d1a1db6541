"""A user's targets share one pass over their history, and nothing about the losses changes.

The reference (``plain_path.py``) shares no code with the packing.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packed_losses import gradients, packed_batch, packed_loss
from plain_path import TARGETS, random_sequences, separate_loss, with_adapter
from torch import Tensor

from peso.events.histories import TargetSequence
from peso.model.generative import GenerativeModel
from peso.training.likelihood import target_token_log_probabilities


@pytest.mark.parametrize("layout", ["stream", "instruct"])
@pytest.mark.parametrize("loss_vocabulary", ["full", "semantic", "level"])
def test_losses_and_gradients_equal_those_of_separate_examples(
    make_model: Callable[..., GenerativeModel], layout: str, loss_vocabulary: str
) -> None:
    model = with_adapter(make_model(layout, loss_vocabulary, window=20))
    sequences = random_sequences(seed=3, count=6, longest=9)
    shared = packed_loss(model, packed_batch(model, sequences, row_tokens=512, pass_tokens=512))
    separate = separate_loss(model, sequences)
    torch.testing.assert_close(shared, separate, rtol=1e-5, atol=1e-5)
    ours, theirs = gradients(model, shared), gradients(model, separate)
    assert len(ours) == 2 * 2 * len(TARGETS) + 2  # A and B in two layers, input and output rows
    for name, gradient in theirs.items():
        assert gradient.norm() > 1e-4, name  # a comparison of zeros would show nothing
        assert (ours[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("layout", ["stream", "instruct"])
def test_a_history_of_exactly_the_window_is_exact_and_a_longer_one_is_not(
    make_model: Callable[..., GenerativeModel], layout: str
) -> None:
    model = with_adapter(make_model(layout, "semantic", window=5))
    items = np.arange(7, dtype=np.int32)
    for length, exact in ((6, True), (7, False)):  # the last target sees 5 items, and 6
        sequences = [TargetSequence("user", items[:length], 0)]
        shared = packed_loss(model, packed_batch(model, sequences, 512, 512))
        difference = abs(shared.item() - separate_loss(model, sequences).item())
        assert (difference < 1e-5) is exact, (length, difference)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    row_tokens=st.integers(1, 600),
    pass_tokens=st.integers(1, 2000),
    layout=st.sampled_from(["stream", "instruct"]),
    data=st.data(),
)
def test_neither_budgets_nor_the_order_of_users_change_a_loss(
    models: dict[str, GenerativeModel],
    seed: int,
    row_tokens: int,
    pass_tokens: int,
    layout: str,
    data: st.DataObject,
) -> None:
    model = models[layout]
    sequences = random_sequences(seed, count=5, longest=12)
    shuffled = data.draw(st.permutations(sequences))
    with torch.no_grad():
        one = packed_loss(model, packed_batch(model, sequences, 4096, 4096))
        other = packed_loss(model, packed_batch(model, shuffled, row_tokens, pass_tokens))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def models(make_model: Callable[..., GenerativeModel]) -> dict[str, GenerativeModel]:
    return {
        layout: with_adapter(make_model(layout, "full", window=6, layers=1))
        for layout in ("stream", "instruct")
    }


@pytest.mark.parametrize("layout", ["stream", "instruct"])
def test_a_user_never_sees_another_user_nor_the_future(
    make_model: Callable[..., GenerativeModel], layout: str
) -> None:
    """Changing one item changes the losses of that user's later targets and of nothing else."""
    model = make_model(layout, "semantic", items=50)
    sequences = [TargetSequence(u, np.arange(i, i + 6, dtype=np.int32), 0) for i, u in enumerate("abc")]
    changed = [*sequences]
    changed[1] = TargetSequence("b", np.array([1, 2, 3, 40, 5, 6], dtype=np.int32), 0)

    def scores(batch: list[TargetSequence]) -> Tensor:
        (packed,) = packed_batch(model, batch, 4096, 4096)
        values = torch.zeros(3, 6)
        by_token = target_token_log_probabilities(model, packed).view(-1, model.vocabulary.levels)
        owners = packed.owners[:: model.vocabulary.levels]
        for owner in range(3):
            values[owner] = by_token[owners == owner].sum(-1)
        return values

    with torch.no_grad():
        moved = (scores(sequences) - scores(changed)).abs() > 1e-4
    assert moved.tolist() == [[False] * 6, [False] * 3 + [True] * 3, [False] * 6]


def test_a_hotter_softmax_is_a_flatter_one(make_model: Callable[..., GenerativeModel]) -> None:
    model = make_model("stream", "full")
    sequences = random_sequences(0, 3, 5)
    passes = packed_batch(model, sequences, 512, 512)
    with torch.no_grad():
        for temperature in (0.5, 0.8, 1.0, 2.0):
            torch.testing.assert_close(
                packed_loss(model, passes, temperature),
                separate_loss(model, sequences, temperature),
                rtol=1e-5,
                atol=1e-5,
            )
        uniform = np.log(len(model.tokenizer) + len(model.vocabulary))
        assert abs(float(packed_loss(model, passes, 1e6)) - uniform) < 1e-3
