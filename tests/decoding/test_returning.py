"""A returning user's answer is that of its whole prompt, of which only what is new is computed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from peso.decoding import search
from peso.decoding.returning import GROWTH, PromptMemory, _continued
from peso.model.ensemble import Ensemble, twin
from peso.model.item_head import ItemHead

WINDOW = 5
LARGE = 2**30


def wide(model):
    """The same model with a window that no prompt here fills."""
    other = type(model)(
        model.backbone,
        model.tokenizer,
        model.vocabulary,
        replace(model.layout, window=GROWTH * WINDOW),
        model.semantic_ids,
        model.loss_vocabulary,
    )
    return other.eval()


def assert_same(found, expected) -> None:
    np.testing.assert_array_equal(found.leaves, expected.leaves)
    np.testing.assert_allclose(found.scores, expected.scores, atol=2e-4)


@pytest.mark.parametrize(("layout", "head"), [("stream", False), ("instruct", False), ("stream", True)])
def test_answers_are_those_of_the_prompts_that_grew(make_model, layout, head):
    """Users who come back after up to three new items, in one batch with others who are there first."""
    model, draw = make_model(layout, window=WINDOW), np.random.default_rng(0)
    if head:
        width = model.vocabulary.input_rows.shape[1]
        model.vocabulary.item_head = ItemHead(model.semantic_ids, width, reads=True)
        model.vocabulary.item_head.initialise(0, embedding_spread=0.5)
    memory, shown = PromptMemory(LARGE), {}
    histories = {user: draw.integers(0, 50, draw.integers(0, 9)) for user in range(6)}
    for step in range(6):
        for user in histories:
            new = draw.integers(0, 50, draw.integers(0, 4))
            histories[user] = np.concatenate([histories[user], new])
            shown[user] = _continued(shown.get(user, np.empty(0, dtype=np.int64)), histories[user], WINDOW)
        asked = [*draw.permutation(6), 10 + step]
        histories[10 + step] = draw.integers(0, 50, 7)
        shown[10 + step] = histories[10 + step][-WINDOW:]
        found = search(
            model,
            [histories[user] for user in asked],
            returning=[memory.of(user) if user != 0 else None for user in asked],
        )
        shown[0] = histories[0][-WINDOW:]
        assert_same(found, search(wide(model), [shown[user] for user in asked]))
    assert memory.reused > memory.computed / 2
    assert max(len(items) for items in shown.values()) > WINDOW


def test_a_new_event_costs_the_tokens_of_an_item(make_model):
    model, memory = make_model(window=WINDOW), PromptMemory(LARGE)
    levels, history = model.semantic_ids.levels, np.arange(WINDOW)

    def computed(items) -> int:
        before = memory.computed
        search(model, [np.asarray(items)], returning=[memory.of("a")])
        return memory.computed - before

    assert computed(history) == len(model.layout.prefix) + WINDOW * levels
    assert computed(history) == levels  # the state after the last item predicts what comes next
    for new in range(WINDOW, GROWTH * WINDOW):
        assert computed(np.arange(new + 1)) == levels
    rebuilt = len(model.layout.prefix) + WINDOW * levels
    assert rebuilt - 1 <= computed(np.arange(GROWTH * WINDOW + 1)) + len(model.layout.prefix) <= rebuilt + 1


def test_a_history_that_does_not_continue_the_last_one_is_read_anew(make_model):
    model, memory = make_model(window=WINDOW), PromptMemory(LARGE)
    for history in (
        [1, 2, 3],
        [1, 2, 4],
        [4],
        [],
        [9, 8, 7, 6, 5, 4, 3],
        [7, 6, 5],
        [1, 9, 8, 7, 6, 5, 4, 3],
    ):
        items = np.array(history, dtype=np.int64)
        assert_same(search(model, [items], returning=[memory.of("a")]), search(model, [items]))


def test_the_memory_keeps_the_latest_users_within_its_bound(make_model):
    model = make_model(window=WINDOW)
    one = PromptMemory(LARGE)
    search(model, [np.arange(WINDOW)], returning=[one.of("a")])
    memory = PromptMemory(3 * one.used)
    for user in range(10):
        search(model, [np.arange(WINDOW)], returning=[memory.of(user)])
        if user >= 3:
            search(model, [np.arange(WINDOW)], returning=[memory.of(3)])
    assert len(memory) == 3
    assert memory.used == sum(kept.size for kept in memory._kept.values()) <= memory.size
    assert {3, 9} <= set(memory._kept)
    nothing = PromptMemory(0)
    search(model, [np.arange(WINDOW)], returning=[nothing.of("a")])
    assert (len(nothing), nothing.used) == (0, 0)


def test_filters_and_a_wrong_number_of_places(make_model):
    model, memory = make_model(window=WINDOW), PromptMemory(LARGE)
    history = np.arange(4)
    search(model, [history], returning=[memory.of("a")])
    grown = np.arange(5)
    found = search(model, [grown], exclude=[grown], returning=[memory.of("a")])
    assert_same(found, search(model, [grown], exclude=[grown]))
    with pytest.raises(ValueError, match="returning has 1 entries for 2 histories"):
        search(model, [history, history], returning=[None])


def test_two_models_that_answer_as_one_continue_both_prompts(make_model):
    first = make_model(window=WINDOW)
    other = twin(first)
    with torch.no_grad():
        for rows in (other.vocabulary.input_rows, other.vocabulary.output_rows):
            rows.add_(torch.randn(rows.shape, generator=torch.Generator().manual_seed(1)) * rows.std())
    model, memory = Ensemble(first, other, 0.5).eval(), PromptMemory(LARGE)
    for count in range(3, WINDOW + 1):
        history = np.arange(count)
        found = search(model, [history], returning=[memory.of("a")])
        assert_same(found, search(model, [history]))
    assert memory.reused > 0
