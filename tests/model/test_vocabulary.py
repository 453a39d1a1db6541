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
