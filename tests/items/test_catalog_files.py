"""Arrays for serving stacks contain exactly the catalog's semantic IDs, in the layouts that they read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peso.errors import ExportError
from peso.items.catalog_files import write_catalog
from peso.items.semantic_ids import SemanticIds


@st.composite
def catalogs(draw: st.DrawFn) -> SemanticIds:
    sizes = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    row = st.tuples(*(st.integers(0, size - 1) for size in sizes))
    codes = draw(st.lists(row, min_size=1, max_size=30))
    return SemanticIds([f"i{n}" for n in range(len(codes))], np.array(codes, np.int32), sizes)


@settings(max_examples=30, deadline=None)
@given(ids=catalogs())
def test_every_item_has_its_codes_in_both_layouts(
    ids: SemanticIds, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("c") / "catalog"
    write_catalog(ids, folder)
    sids = np.load(folder / "sids.npy")
    mapping = torch.load(folder / "item_id_to_sid.pt", weights_only=True)
    rows = pq.read_table(folder / "items.parquet").to_pylist()
    assert (sids.dtype, mapping.dtype) == (np.int32, torch.int64)
    assert [tuple(codes) for codes in sids.tolist()] == sorted({tuple(codes) for codes in ids.codes.tolist()})
    assert mapping.shape == (ids.levels, len(ids.item_ids))
    for row in rows:
        codes = ids.codes[ids.row(row["item_id"])].tolist()
        assert sids[row["sid"]].tolist() == codes
        assert mapping[:, row["item"]].tolist() == codes
    told = json.loads((folder / "catalog.json").read_text())
    numbers = sids.astype(np.int64) + np.array(told["offsets"])
    assert {ids.tokens()[n] for n in numbers.ravel()} == {
        token for i in ids.item_ids for token in ids.semantic_id(i)
    }


def test_a_directory_with_content_is_refused(tmp_path: Path) -> None:
    ids = SemanticIds(["a"], np.zeros((1, 2), np.int32), (1, 1))
    (tmp_path / "x").touch()
    with pytest.raises(ExportError, match="not empty"):
        write_catalog(ids, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
