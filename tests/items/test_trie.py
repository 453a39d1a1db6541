"""The compressed trie holds the catalogue, in order, whatever its shape."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from peso.errors import DataError
from peso.items.semantic_ids import ItemTrie

catalogues = st.tuples(st.integers(1, 40), st.integers(1, 5)).flatmap(
    lambda shape: arrays(np.int32, shape, elements=st.integers(0, 3))
)


def prefixes(codes: np.ndarray, length: int) -> list[tuple[int, ...]]:
    return sorted({tuple(row[:length]) for row in codes.tolist()})


@given(catalogues)
@settings(max_examples=200, deadline=None)
def test_nodes_are_the_distinct_prefixes_in_order(codes: np.ndarray) -> None:
    trie = ItemTrie.build(codes)
    paths: list[tuple[int, ...]] = [()]
    for level in range(trie.levels):
        starts = trie.starts[level]
        assert starts[0] == 0
        assert starts[-1] == trie.nodes[level]
        paths = [
            (*path, int(code))
            for node, path in enumerate(paths)
            for code in trie.codes[level][starts[node] : starts[node + 1]]
        ]
        assert paths == prefixes(codes, level + 1)
        assert trie.fanout[level] == np.diff(starts).max()
    assert trie.leaves == len(paths)
    assert [tuple(path) for path in trie.paths(np.arange(trie.leaves)).tolist()] == paths


@given(catalogues)
@settings(max_examples=200, deadline=None)
def test_every_item_lies_in_the_leaf_of_its_codes_first_come_first(codes: np.ndarray) -> None:
    trie = ItemTrie.build(codes)
    assert (trie.paths(trie.leaf_of) == codes).all()
    assert sorted(trie.items) == list(range(len(codes)))
    for leaf in range(trie.leaves):
        items = trie.items_of(leaf)
        assert len(items)
        assert (np.diff(items) > 0).all()
        assert (trie.leaf_of[items] == leaf).all()


@given(catalogues)
@settings(max_examples=100, deadline=None)
def test_parents_undo_children(codes: np.ndarray) -> None:
    trie = ItemTrie.build(codes)
    for level in range(trie.levels):
        counts = np.diff(trie.starts[level])
        assert (
            trie.parents(level, np.arange(trie.nodes[level])) == np.repeat(range(len(counts)), counts)
        ).all()


def test_many_levels_need_no_key_that_could_overflow() -> None:
    # 12 levels × 65,536 codes is 192 bits: no integer holds such an ID
    codes = np.random.default_rng(0).integers(0, 65536, (300, 12), dtype=np.int32)
    trie = ItemTrie.build(codes)
    assert (trie.paths(trie.leaf_of) == codes).all()


def test_the_released_index(release_dir) -> None:
    import json

    index = json.loads(next(release_dir.glob("*.index.*.json")).read_text())
    codes = np.array([[int(token[3:-1]) for token in tokens] for tokens in index.values()], dtype=np.int32)
    trie = ItemTrie.build(codes)
    assert (trie.levels, trie.leaves, len(trie.items)) == (4, 25_707, 25_935)
    assert (trie.paths(trie.leaf_of) == codes).all()


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_an_empty_catalogue_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(DataError, match="needs items and levels"):
        ItemTrie.build(np.zeros(shape, dtype=np.int32))


def test_a_negative_code_is_named() -> None:
    with pytest.raises(DataError, match=r"item row 1 has a negative code: \[0, -1\]"):
        ItemTrie.build(np.array([[0, 1], [0, -1]], dtype=np.int32))
