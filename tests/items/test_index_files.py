"""Semantic IDs on disk and in the released form: same codes back, every fault named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from catalogs import random_semantic_ids
from hypothesis import given
from hypothesis import strategies as st

from peso.errors import DataError, WorkspaceError
from peso.items.semantic_ids import (
    FORMAT,
    SemanticIds,
    read_release_index,
    read_semantic_ids,
    write_release_index,
    write_semantic_ids,
)


def same(a: SemanticIds, b: SemanticIds) -> bool:
    return (
        a.item_ids == b.item_ids
        and a.sizes == b.sizes
        and np.array_equal(a.codes, b.codes)
        and a.codes.dtype == b.codes.dtype
    )


@st.composite
def semantic_ids(draw: st.DrawFn) -> SemanticIds:
    sizes = tuple(draw(st.lists(st.integers(1, 300), min_size=1, max_size=6)))
    names = draw(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, unique=True))
    rows = [[draw(st.integers(0, size - 1)) for size in sizes] for _ in names]
    return SemanticIds(names, np.array(rows, dtype=np.int32), sizes)


@pytest.mark.slow
@given(semantic_ids())
def test_any_ids_read_back_as_written(tmp_path_factory: pytest.TempPathFactory, ids: SemanticIds) -> None:
    directory = tmp_path_factory.mktemp("ids")
    write_semantic_ids(ids, directory, {"source": "drawn"})
    assert same(read_semantic_ids(directory), ids)
    write_release_index(ids, directory / "index.json")
    assert same(read_release_index(directory / "index.json", ids.sizes), ids)


def test_the_released_files_survive_import_and_export(
    release_dir: Path, industrial_dir: Path, tmp_path: Path
) -> None:
    for source, levels, distinct in [
        (next(release_dir.glob("*.index.*.json")), 4, 25707),
        (industrial_dir / "Industrial_and_Scientific.index.json", 3, 3670),
    ]:
        ids = read_release_index(source)
        assert ids.sizes == (256,) * levels
        assert len(np.unique(ids.codes, axis=0)) == distinct
        write_release_index(ids, tmp_path / "out.json")
        before, after = (json.loads(path.read_text()) for path in (source, tmp_path / "out.json"))
        assert list(after.items()) == list(before.items())


@pytest.mark.parametrize(("largest", "size"), [(0, 1), (1, 2), (254, 256), (255, 256), (256, 512)])
def test_sizes_are_the_smallest_power_of_two_that_holds_every_code(
    tmp_path: Path, largest: int, size: int
) -> None:
    (tmp_path / "x.index.json").write_text(json.dumps({"i": ["<a_0>", f"<b_{largest}>"]}))
    assert read_release_index(tmp_path / "x.index.json").sizes == (size, size)


def test_the_manifest_says_what_is_inside(tmp_path: Path) -> None:
    ids = SemanticIds(["x", "y", "z"], np.array([[0, 1], [0, 1], [2, 0]], dtype=np.int32), (4, 2))
    write_semantic_ids(ids, tmp_path, {"source": "hand"})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["sizes"] == [4, 2]
    assert (manifest["items"], manifest["distinct_ids"], manifest["tokens_in_use"]) == (3, 2, 4)
    assert "first comes first" in manifest["shared_ids"]
    assert manifest["source"] == "hand"


def test_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    write_semantic_ids(random_semantic_ids(50, (5, 6, 7)), tmp_path)
    content = bytearray((tmp_path / "index.parquet").read_bytes())
    content[60] ^= 1
    (tmp_path / "index.parquet").write_bytes(content)
    with pytest.raises(WorkspaceError, match=r"index\.parquet is damaged.*sha256"):
        read_semantic_ids(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write_semantic_ids(random_semantic_ids(50, (5, 6, 7)), tmp_path)
    (tmp_path / "index.parquet").unlink()
    with pytest.raises(WorkspaceError, match=r"index\.parquet is missing"):
        read_semantic_ids(tmp_path)


def test_a_manifest_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    write_semantic_ids(random_semantic_ids(50, (5, 6, 7)), tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "format": FORMAT + 1}))
    with pytest.raises(WorkspaceError, match=r"newer version.*update peso"):
        read_semantic_ids(tmp_path)


@pytest.mark.parametrize("sizes", [[5, 6], [5, 6, 2], None, "abc"])
def test_a_manifest_that_does_not_fit_its_file(tmp_path: Path, sizes: object) -> None:
    write_semantic_ids(random_semantic_ids(49, (5, 6, 7)), tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "sizes": sizes}))
    with pytest.raises(WorkspaceError, match="does not match its own sha256"):
        read_semantic_ids(tmp_path)


GOOD = {"i": ["<a_1>", "<b_2>"]}


@pytest.mark.parametrize(
    ("index", "parts"),
    [
        ({}, ["has no items"]),
        ({**GOOD, "j": ["<a_1>"]}, ["item 'j' has 1 codes", "item 'i' has 2", "create the index again"]),
        ({**GOOD, "j": ["<a_1>", "b_2"]}, ["item 'j' has 'b_2' as code 2", "'<b_N>'"]),
        ({**GOOD, "j": ["<a_1>", "<a_2>"]}, ["item 'j' has '<a_2>' as code 2", "'<b_N>'"]),
        ({**GOOD, "j": ["<a_-1>", "<b_2>"]}, ["item 'j' has '<a_-1>' as code 1"]),
        ({**GOOD, "j": ["<a_99999999999>", "<b_2>"]}, ["item 'j'", "N from 0 to 65535"]),
        ({**GOOD, "j": ["<a_1>\n", "<b_2>"]}, ["item 'j' has '<a_1>\\n' as code 1"]),
        ({**GOOD, "j": [1, 2]}, ["item 'j' has 1 as code 1"]),
        ({**GOOD, "j": "<a_1><b_2>"}, ["item 'j'", "instead of a list of tokens"]),
        ({**GOOD, "j": []}, ["item 'j' has []", "instead of a list of tokens"]),
        ({**GOOD, "j": None}, ["item 'j' has None"]),
    ],
)
def test_a_faulty_index_names_file_item_and_cure(tmp_path: Path, index: dict, parts: list[str]) -> None:
    path = tmp_path / "x.index.json"
    path.write_text(json.dumps(index))
    with pytest.raises(DataError) as error:
        read_release_index(path)
    for part in [str(path), *parts]:
        assert part in str(error.value)


def test_codes_outside_given_sizes(tmp_path: Path) -> None:
    path = tmp_path / "x.index.json"
    path.write_text(json.dumps(GOOD))
    with pytest.raises(DataError, match=r"item 'i' has codes \[1, 2\] outside the sizes \[2, 2\]"):
        read_release_index(path, (2, 2))
    with pytest.raises(DataError, match="2 codes per item, but sizes are given for 3 levels"):
        read_release_index(path, (2, 2, 2))


def test_an_item_twice_in_an_index(tmp_path: Path) -> None:
    path = tmp_path / "x.index.json"
    path.write_text('{"i": ["<a_1>"], "i": ["<a_2>"]}')
    with pytest.raises(DataError, match=r"key 'i' twice.*keep only one"):
        read_release_index(path)


def test_a_missing_index_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no\.json is missing"):
        read_release_index(tmp_path / "no.json")
