"""Semantic IDs from category paths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peso.errors import DataError
from peso.items.category_path import category_path_ids

PATHS = st.lists(
    st.tuples(st.sampled_from("AB"), st.sampled_from("xyz"), st.sampled_from("123")).map(" > ".join),
    min_size=1,
    max_size=60,
)


def named(paths: list[str]) -> list[str]:
    return [f"i{row}" for row in range(len(paths))]


def test_a_worked_example() -> None:
    paths = ["Home > Tea", "Home > Coffee", "Garden > Tea", "Home > Tea"]
    ids = category_path_ids(named(paths), paths)
    assert ids.codes.tolist() == [[0, 0, 0], [0, 1, 0], [1, 2, 0], [0, 0, 1]]
    assert ids.sizes == (2, 3, 2)
    assert ids.semantic_id("i3") == ["<a_0>", "<b_0>", "<c_1>"]


@given(PATHS)
def test_every_item_has_an_id_of_its_own_and_shares_exactly_the_levels_of_its_path(paths: list[str]) -> None:
    ids = category_path_ids(named(paths), paths)
    assert len(np.unique(ids.codes, axis=0)) == len(paths)
    parts = [path.split(" > ") for path in paths]
    for one, a in enumerate(parts):
        for other, b in enumerate(parts):
            for depth in range(1, 4):
                assert (a[:depth] == b[:depth]) == bool(
                    (ids.codes[one, :depth] == ids.codes[other, :depth]).all()
                )


@given(PATHS, PATHS)
def test_appended_items_leave_earlier_codes_unchanged(before: list[str], after: list[str]) -> None:
    old = category_path_ids(named(before), before)
    new = category_path_ids(named(before + after), before + after)
    assert np.array_equal(new.codes[: len(before)], old.codes)


def test_sizes_leave_room_and_are_limits() -> None:
    assert category_path_ids(["x"], ["A > B"], sizes=(4, 4, 8)).sizes == (4, 4, 8)
    with pytest.raises(DataError, match=r"3 items in 'A > B' do not fit into the 2 codes of level 3"):
        category_path_ids(["x", "y", "z"], ["A > B"] * 3, sizes=(4, 4, 2))
    with pytest.raises(DataError, match="give 3 levels, but sizes are given for 2"):
        category_path_ids(["x"], ["A > B"], sizes=(4, 4))


def test_a_level_that_overflows_names_what_does_not_fit() -> None:
    crowded = ["A > B"] * 5
    with pytest.raises(
        DataError, match=r"5 items in 'A > B' do not fit into the 4 codes.*finer or other categories"
    ):
        category_path_ids(named(crowded), crowded, limit=4)
    broad = [f"A > {n}" for n in range(5)]
    with pytest.raises(DataError, match="5 categories of depth 2 do not fit into the 4 codes of level 2"):
        category_path_ids(named(broad), broad, limit=4)


@pytest.mark.parametrize("bad", [None, "", "  ", "A > ", " > B"])
def test_an_item_without_a_whole_path_is_named(bad: str | None) -> None:
    with pytest.raises(DataError, match="item 'i1' has the category"):
        category_path_ids(["i0", "i1"], ["A > B", bad])


def test_paths_of_different_depth_are_refused() -> None:
    with pytest.raises(
        DataError, match=r"item 'i1' has a category path of depth 1 \('A'\).*to the same depth"
    ):
        category_path_ids(["i0", "i1"], ["A > B", "A"])


def test_an_empty_catalogue_is_refused() -> None:
    with pytest.raises(DataError, match="empty catalog"):
        category_path_ids([], [])
