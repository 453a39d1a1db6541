"""The stream directory: what is written is read, and damage is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peso.errors import DataError, WorkspaceError
from peso.events import columns
from peso.events.histories import Ragged, Stage
from peso.events.stream import FORMAT, Stream, stage_file, write_stream


def item_table(n: int = 4) -> pa.Table:
    return pa.table(
        {
            "item_id": [f"i{k}" for k in range(n)],
            "title": [None, *(f"Title {k}" for k in range(1, n))],
            "text": [f"text {k}" for k in range(n)],
            "category": ["A > B"] * n,
        },
        schema=columns.ITEMS,
    )


def stage(number: int, previous: list[list[int]], current: list[list[int]]) -> Stage:
    return Stage(number, [f"u{i}" for i in range(len(current))], Ragged.of(previous), Ragged.of(current))


@pytest.fixture
def stages() -> list[Stage]:
    return [
        stage(0, [[], []], [[0, 1, 2, 0], [3]]),
        stage(1, [[0, 1, 2, 0], [3], []], [[], [1, 2, 3], [3, 3, 0]]),
    ]


@pytest.fixture
def directory(tmp_path: Path, stages: list[Stage]) -> Path:
    write_stream(tmp_path, item_table(), stages, {"source": "here"})
    return tmp_path


def same(a: Stage, b: Stage) -> bool:
    return (a.number, a.users) == (b.number, b.users) and all(
        np.array_equal(x, y) and x.dtype == y.dtype
        for one, other in ((a.previous, b.previous), (a.current, b.current))
        for x, y in ((one.values, other.values), (one.offsets, other.offsets))
    )


def test_a_stream_reads_back_as_written(directory: Path, stages: list[Stage]) -> None:
    stream = Stream.open(directory)
    assert stream.stages == 2
    assert all(same(stream.stage(t), stages[t]) for t in range(2))
    assert stream.items.equals(item_table())
    assert stream.item_ids == ["i0", "i1", "i2", "i3"]
    assert stream.titles == [None, "Title 1", "Title 2", "Title 3"]
    assert stream.categories == ["A > B"] * 4
    assert stream.manifest["source"] == "here"


ROWS = st.lists(st.tuples(*[st.lists(st.integers(0, 3), max_size=6)] * 2), min_size=1, max_size=8)


@given(ROWS)
def test_any_stage_reads_back_as_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[list, list]]
) -> None:
    written = stage(0, [p for p, _ in rows], [c for _, c in rows[1:]] + [[0, 1, 2]])
    directory = tmp_path_factory.mktemp("stream")
    write_stream(directory, item_table(), [written])
    assert same(Stream.open(directory).stage(0), written)


def test_the_same_stream_is_written_as_the_same_bytes(
    directory: Path, stages: list[Stage], tmp_path_factory: pytest.TempPathFactory
) -> None:
    again = tmp_path_factory.mktemp("again")
    write_stream(again, item_table(), iter(stages), {"source": "here"})
    for name in ["items.parquet", stage_file(0), stage_file(1), "manifest.json"]:
        assert (directory / name).read_bytes() == (again / name).read_bytes()


def test_duckdb_reads_the_stages_as_one_partitioned_table(directory: Path) -> None:
    rows = duckdb.sql(
        "select stage, count(*), sum(len(current)) "
        f"from '{directory}/stage=*/users.parquet' group by 1 order by 1"
    ).fetchall()
    assert [tuple(map(int, row)) for row in rows] == [(0, 2, 5), (1, 3, 6)]


def test_the_manifest_counts_each_stage(directory: Path) -> None:
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["items"] == 4
    assert manifest["stages"] == [
        {"users": 2, "events": 5, "training_targets": 2, "validation": 1, "test": 1, "left_out": 1},
        {"users": 3, "events": 6, "training_targets": 2, "validation": 2, "test": 2, "left_out": 1},
    ]
    assert set(manifest["files"]) == {"items.parquet", stage_file(0), stage_file(1)}


@pytest.mark.parametrize("name", ["items.parquet", stage_file(1)])
def test_a_changed_byte_is_noticed(directory: Path, name: str) -> None:
    content = bytearray((directory / name).read_bytes())
    content[len(content) // 2] ^= 1
    (directory / name).write_bytes(content)
    stream = Stream.open(directory)
    assert same(stream.stage(0), stream.stage(0))  # an intact file still reads
    with pytest.raises(WorkspaceError, match=rf"{name}.* is damaged.*sha256"):
        stream.items if name == "items.parquet" else stream.stage(1)


def test_a_missing_file_is_named(directory: Path) -> None:
    (directory / stage_file(1)).unlink()
    with pytest.raises(WorkspaceError, match=rf"{stage_file(1)} is missing"):
        Stream.open(directory).stage(1)


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match=r"manifest\.json is missing"):
        Stream.open(tmp_path)


@pytest.mark.parametrize("content", ["", '{"format": 1', "[]", '{"format": 1}', '{"format": 1, "files": 3}'])
def test_a_damaged_manifest(directory: Path, content: str) -> None:
    (directory / "manifest.json").write_text(content)
    with pytest.raises(WorkspaceError, match=r"manifest\.json is damaged"):
        Stream.open(directory)


def test_a_manifest_of_a_newer_version_is_refused(directory: Path) -> None:
    manifest = json.loads((directory / "manifest.json").read_text())
    (directory / "manifest.json").write_text(json.dumps({**manifest, "format": FORMAT + 1}))
    with pytest.raises(WorkspaceError, match=rf"newer version of peso \(format {FORMAT + 1}.*update peso"):
        Stream.open(directory)


def test_a_stage_that_is_not_there(directory: Path) -> None:
    with pytest.raises(DataError, match="no stage 2; it has 0 to 1"):
        Stream.open(directory).stage(2)


def test_no_stream_is_written_from_a_stage_without_trainable_users(tmp_path: Path) -> None:
    idle = stage(1, [[0, 1, 2]], [[0, 1]])
    with pytest.raises(DataError, match="none of the 1 users of stage 1"):
        write_stream(tmp_path, item_table(), [stage(0, [[]], [[0, 1, 2]]), idle])
    assert not (tmp_path / "manifest.json").exists()


def test_no_stream_is_written_from_no_stage(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least stage 0"):
        write_stream(tmp_path, item_table(), [])


def test_an_item_id_twice_is_refused(tmp_path: Path, stages: list[Stage]) -> None:
    twice = pa.concat_tables([item_table(), item_table().slice(2, 1)])
    with pytest.raises(DataError, match="item 'i2' occurs 2 times"):
        write_stream(tmp_path, twice, stages)


def test_item_numbers_outside_the_table_are_a_defect_of_the_caller(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="outside the table of 4 items"):
        write_stream(tmp_path, item_table(), [stage(0, [[]], [[0, 1, 4]])])
