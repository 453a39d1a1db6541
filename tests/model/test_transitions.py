"""Counts of transitions: evidence after a history, the file of a stage, a catalog that grows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import sparse

from peso.errors import WorkspaceError
from peso.model.transitions import FILE, Transitions, heaviest

ITEMS = 6
tables = arrays(np.float32, (ITEMS, ITEMS), elements=st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0]))
histories = st.lists(st.integers(0, ITEMS - 1), max_size=8)


@given(tables, st.lists(histories, min_size=1, max_size=4), st.booleans())
def test_evidence_is_the_sum_of_the_edges_of_the_newest_items(
    table: np.ndarray, rows: list[list[int]], repeats: bool
) -> None:
    counted = Transitions(sparse.csr_array(table), recency=0.5, window=3, repeats=repeats)
    found = counted.evidence([np.array(row, dtype=np.int64) for row in rows])
    for row, evidence in zip(rows, found, strict=True):
        expected = np.zeros(ITEMS)
        for place, item in enumerate(reversed(row[-3:])):
            expected += 0.5**place * table[item]
        if not repeats:
            expected[row] = 0
        np.testing.assert_allclose(evidence, expected, rtol=1e-6)


@given(tables, st.integers(1, ITEMS))
def test_the_heaviest_edges_of_every_item_are_kept(table: np.ndarray, most: int) -> None:
    kept = heaviest(sparse.csr_array(table), most).toarray()
    for row, found in zip(table, kept, strict=True):
        best = sorted(range(ITEMS), key=lambda item: (-row[item], item))[:most]
        expected = [row[item] if item in best else 0.0 for item in range(ITEMS)]
        assert found.tolist() == expected


def some(items: int = ITEMS) -> Transitions:
    table = np.random.default_rng(0).random((items, items)).astype(np.float32)
    table[table < 0.5] = 0
    return Transitions(sparse.csr_array(table), recency=0.7, window=5, repeats=False, prior=30.0)


def test_what_was_written_reads_back_for_a_larger_catalog(tmp_path: Path) -> None:
    counted = some()
    counted.save(tmp_path)
    read = Transitions.load(tmp_path, ITEMS + 2)
    assert read is not None
    assert (read.recency, read.window, read.repeats, read.prior) == (0.7, 5, False, 30.0)
    history = [np.array([0, 3, 1])]
    assert read.evidence(history)[0, :ITEMS].tolist() == counted.evidence(history)[0].tolist()
    assert read.evidence(history)[0, ITEMS:].tolist() == [0, 0]
    assert read.evidence([np.array([ITEMS + 1])]).sum() == 0


def test_without_a_file_nothing_was_counted(tmp_path: Path) -> None:
    assert Transitions.load(tmp_path, ITEMS) is None


@pytest.mark.parametrize("damage", [b"", b"no safetensors file", None])
def test_a_damaged_file_is_named(tmp_path: Path, damage: bytes | None) -> None:
    some().save(tmp_path)
    file = tmp_path / FILE
    file.write_bytes(file.read_bytes()[:-8] if damage is None else damage)
    with pytest.raises(WorkspaceError, match=r"transitions\.safetensors is damaged"):
        Transitions.load(tmp_path, ITEMS)


def test_counts_of_a_larger_catalog_are_refused(tmp_path: Path) -> None:
    some(ITEMS + 1).save(tmp_path)
    with pytest.raises(WorkspaceError, match="is damaged"):
        Transitions.load(tmp_path, ITEMS)
