"""Rows of codes that nobody has had yet."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peso.items.semantic_ids import SemanticIds
from peso.model.item_head import ItemHead
from peso.model.vocabulary import SemanticVocabulary

WIDTH, SIZES = 6, (3, 5)
#                 known                    arriving                   neither
CODES = np.array([[0, 0], [0, 1], [1, 1], [0, 3], [1, 3], [2, 2], [1, 0], [1, 4]], dtype=np.int32)
KNOWN = np.array([True, True, True, False, False, False, False, False])
ARRIVING = np.array([False, False, False, True, True, True, True, False])


@pytest.fixture
def vocabulary() -> SemanticVocabulary:
    made = SemanticVocabulary(0, SIZES, WIDTH)
    made.item_head = ItemHead(SemanticIds([f"i{n}" for n in range(len(CODES))], CODES, SIZES), WIDTH)
    generator = torch.Generator().manual_seed(0)
    for p in made.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator))
    return made


def test_new_codes_begin_at_the_mean_of_their_neighbors_codes(vocabulary: SemanticVocabulary) -> None:
    tokens = CODES + np.array([0, SIZES[0]])
    before = {name: p.detach().clone() for name, p in vocabulary.named_parameters()}
    assert vocabulary.begin_new_codes(tokens, KNOWN, ARRIVING) == 3
    names = ["input_rows", "output_rows", "item_head.code_rows", "item_head.code_bias"]
    for name, p in vocabulary.named_parameters():
        expected = before[name].clone()
        if name in names:
            first, second = expected[:3], before[name][3:]
            first[2] = (2 * first[0] + first[1]) / 3  # of all known items
            # <b_3>: of an item after <a_0>, with two neighbors, and of one after <a_1>, with one
            expected[3 + 3] = ((second[0] + second[1]) / 2 + second[1]) / 2
            # <b_2>: nobody is known after <a_2>
            expected[3 + 2] = (second[0] + 2 * second[1]) / 3
        assert torch.allclose(p, expected, atol=1e-6), name
    assert not torch.equal(vocabulary.input_rows, before["input_rows"])


def test_nothing_begins_where_all_codes_are_known_or_nothing_is(vocabulary: SemanticVocabulary) -> None:
    tokens = CODES + np.array([0, SIZES[0]])
    before = {name: p.detach().clone() for name, p in vocabulary.named_parameters()}
    every, none = np.ones(len(CODES), bool), np.zeros(len(CODES), bool)
    assert vocabulary.begin_new_codes(tokens, every, ARRIVING) == 0
    assert vocabulary.begin_new_codes(tokens, none, every) == 0
    assert vocabulary.begin_new_codes(tokens, KNOWN, none) == 0
    for name, p in vocabulary.named_parameters():
        assert torch.equal(p, before[name])


#                unchanged                changed                  new items, one with another code
NOW = np.array([[0, 0], [0, 1], [1, 1], [1, 3], [2, 3], [2, 2], [0, 4], [1, 4]], dtype=np.int32)
MET = np.array([True, True, True, True, True, True, False, False])


def heads(vocabulary: SemanticVocabulary) -> tuple[np.ndarray, np.ndarray, ItemHead]:
    """Tokens before and now, and the head with the codes of now."""
    ids = SemanticIds([f"i{n}" for n in range(len(NOW))], NOW, SIZES)
    head = ItemHead(ids, WIDTH)
    assert vocabulary.item_head is not None
    head.load_state_dict(vocabulary.item_head.state_dict(), strict=False)
    return CODES + np.array([0, SIZES[0]]), ids.token_numbers, head


def test_changed_codes_leave_the_vectors_of_known_items_and_every_known_code_as_they_were(
    vocabulary: SemanticVocabulary,
) -> None:
    before, now, head = heads(vocabulary)
    old = vocabulary.item_head
    assert old is not None
    vectors, biases = old.vectors().detach(), old.biases().detach()
    rows = {name: p.detach().clone() for name, p in vocabulary.named_parameters()}
    vocabulary.item_head = head
    assert vocabulary.carry_over(before, now, MET) == 2
    assert torch.allclose(head.vectors()[MET], vectors[MET], atol=1e-5)
    assert torch.allclose(head.biases()[MET], biases[MET], atol=1e-5)
    same = MET & (before == now).all(1)
    assert torch.equal(head.vectors()[same], vectors[same])  # bit for bit
    for new in ~MET, same:
        assert torch.equal(head.rows[new], rows["item_head.rows"][new])
    for name in ("input_rows", "output_rows", "item_head.code_rows", "item_head.code_bias"):
        assert torch.equal(dict(vocabulary.named_parameters())[name], rows[name]), name


def test_a_code_that_no_known_item_had_begins_with_the_rows_of_the_codes_before(
    vocabulary: SemanticVocabulary,
) -> None:
    now = CODES.copy()
    # items that had <b_1>, <b_1> and <b_3> get <b_4>, which only an unknown item had
    now[[1, 2, 3], 1] = 4
    known, offset = np.arange(len(CODES)) < 7, np.array([0, SIZES[0]])
    before = {name: p.detach().clone() for name, p in vocabulary.named_parameters()}
    assert vocabulary.carry_over(CODES + offset, now + offset, known) == 3
    for name in ("input_rows", "output_rows", "item_head.code_rows", "item_head.code_bias"):
        expected = before[name].clone()
        second = before[name][3:]
        expected[3 + 4] = (2 * second[1] + second[3]) / 3
        assert torch.allclose(dict(vocabulary.named_parameters())[name], expected, atol=1e-6), name
