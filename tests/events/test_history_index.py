"""Histories on disk are those of the stream, whatever was there before, and need no memory for each user."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peso.errors import WorkspaceError
from peso.events import columns, history_index
from peso.events.histories import Ragged, Stage
from peso.events.history_index import HistoryIndex
from peso.events.stream import Stream, stage_file, write_stream

ITEMS = 9

Users = dict[str, tuple[list[int], list[int]]]  # previous and current


def a_stream(directory: Path, stages: list[Users]) -> Stream:
    directory.mkdir()
    ids = [f"item {n}" for n in range(ITEMS)]
    items = pa.Table.from_arrays([pa.array(ids), *[pa.nulls(ITEMS, pa.string())] * 3], schema=columns.ITEMS)
    built = [
        Stage(
            n, list(users), Ragged.of(p for p, _ in users.values()), Ragged.of(c for _, c in users.values())
        )
        for n, users in enumerate(stages)
    ]
    write_stream(directory, items, built)
    return Stream.open(directory)


def two_stages(directory: Path) -> Stream:
    return a_stream(
        directory,
        [
            {"anna": ([], [1, 2, 3]), "ben": ([0], [4, 4, 5])},
            {"cleo": ([], [8, 7, 6]), "anna": ([1, 2, 3], [3, 0])},
        ],
    )


def everybody(index: HistoryIndex, size: int = 2) -> list[tuple[str, list[int]]]:
    return [(user.name, user.items.tolist()) for part in index.parts(size) for user in part]


def known(stream: Stream, through: int) -> list[tuple[str, list[int]]]:
    """The long way: every stage in memory."""
    found: dict[str, np.ndarray] = {}
    for number in range(through + 1):
        found.update(zip(*stream.stage(number).histories(), strict=True))
    return [(user, items.tolist()) for user, items in found.items()]


lists = st.lists(st.integers(0, ITEMS - 1), max_size=5)
stages = st.lists(
    st.dictionaries(st.text("abcñ'\" ", min_size=1, max_size=3), st.tuples(lists, lists), min_size=1).map(
        lambda users: {**users, "always": ([], [1, 2, 3])}  # a stage has somebody with three events
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=12)
@given(stages=stages)
def test_the_index_holds_what_the_stages_tell(tmp_path_factory, stages: list[Users]) -> None:
    root = tmp_path_factory.mktemp("w")
    stream = a_stream(root / "stream", stages)
    for through in [None, *range(len(stages))]:
        index = HistoryIndex.open(stream, root / "histories.sqlite", through)
        expected = known(stream, stream.stages - 1 if through is None else through)
        assert everybody(index) == expected
        assert index.count() == len(expected)
        for user, items in expected:
            found = index.of(user)
            assert found is not None
            assert found.items.tolist() == items
        assert index.of("nobody") is None
        index.close()


def test_only_the_index_of_the_whole_stream_is_kept(tmp_path: Path) -> None:
    stream = two_stages(tmp_path / "stream")
    early = HistoryIndex.open(stream, tmp_path / "h.sqlite", 0)
    assert everybody(early) == [("anna", [1, 2, 3]), ("ben", [0, 4, 4, 5])]
    assert [path.name for path in tmp_path.iterdir()] == ["stream"]
    HistoryIndex.open(stream, tmp_path / "h.sqlite")
    assert {path.name for path in tmp_path.iterdir()} == {"stream", "h.sqlite"}


def test_an_index_is_made_once_and_continued_where_the_stream_gains_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, pieces = [], Stream.pieces
    monkeypatch.setattr(
        Stream, "pieces", lambda stream, number: read.append(number) or pieces(stream, number)
    )
    first: list[Users] = [{"anna": ([], [1, 2, 3])}, {"ben": ([], [4, 5, 6])}]
    HistoryIndex.open(a_stream(tmp_path / "short", first), tmp_path / "h.sqlite")
    assert read == [0, 1]
    HistoryIndex.open(Stream.open(tmp_path / "short"), tmp_path / "h.sqlite")
    assert read == [0, 1], "nothing is read again"
    longer = a_stream(tmp_path / "long", [*first, {"anna": ([1, 2, 3], [7, 7, 7])}])
    index = HistoryIndex.open(longer, tmp_path / "h.sqlite")
    assert read == [0, 1, 2]
    assert everybody(index) == [("anna", [1, 2, 3, 7, 7, 7]), ("ben", [4, 5, 6])]
    # stages were taken away: a part of it belongs to another stream
    index = HistoryIndex.open(Stream.open(tmp_path / "short"), tmp_path / "h.sqlite")
    assert read[3:] == [0, 1]
    assert everybody(index) == [("anna", [1, 2, 3]), ("ben", [4, 5, 6])]


def test_who_has_an_index_open_goes_on_reading_it(tmp_path: Path) -> None:
    short = a_stream(tmp_path / "short", [{"anna": ([], [1, 2, 3])}])
    before = HistoryIndex.open(short, tmp_path / "h.sqlite")
    HistoryIndex.open(two_stages(tmp_path / "other"), tmp_path / "h.sqlite")
    assert everybody(before) == [("anna", [1, 2, 3])]


@pytest.mark.parametrize("content", [b"", b"text", None])
def test_a_damaged_index_is_made_again(tmp_path: Path, content: bytes | None) -> None:
    stream, path = two_stages(tmp_path / "stream"), tmp_path / "h.sqlite"
    HistoryIndex.open(stream, path).close()
    path.write_bytes(path.read_bytes()[:4096] if content is None else content)
    assert everybody(HistoryIndex.open(stream, path)) == known(stream, 1)


def test_damage_that_shows_while_reading_says_what_to_do(tmp_path: Path) -> None:
    stream, path = two_stages(tmp_path / "stream"), tmp_path / "h.sqlite"
    HistoryIndex.open(stream, path).close()
    good = path.read_bytes()
    path.write_bytes(good[:8192] + b"\xff" * (len(good) - 8192))
    with pytest.raises(WorkspaceError, match=r"h\.sqlite is damaged .*remove it, and it will be rebuilt"):
        everybody(HistoryIndex.open(stream, path))


def test_a_damaged_stage_makes_no_index(tmp_path: Path) -> None:
    stream = two_stages(tmp_path / "stream")
    (stream.directory / stage_file(1)).write_bytes(b"PAR1")
    with pytest.raises(WorkspaceError, match="is damaged"):
        HistoryIndex.open(stream, tmp_path / "h.sqlite")
    assert [path.name for path in tmp_path.iterdir()] == ["stream"]


def test_where_nothing_can_be_written_the_index_is_made_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = two_stages(tmp_path / "stream")
    (elsewhere := tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    monkeypatch.setattr(history_index.os, "access", lambda *asked: False)
    assert everybody(HistoryIndex.open(stream, tmp_path / "h.sqlite")) == known(stream, 1)
    assert not list(elsewhere.iterdir())
    assert not (tmp_path / "h.sqlite").exists()


MANY = """
import sys
from pathlib import Path
from peso.events.history_index import HistoryIndex
from peso.events.stream import Stream

def most():  # MB; getrusage would count the process that started this one
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024

stream = Stream.open(sys.argv[1])
before = most()
index = HistoryIndex.open(stream, Path(sys.argv[2]))
users = sum(len(part) for part in index.parts(512))
print(users, most() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs the process table of Linux")
def test_memory_does_not_grow_with_the_number_of_users(tmp_path: Path) -> None:
    """200,000 users more need some 120 MB in a dictionary."""
    needed = []
    for count in (20_000, 220_000):
        users = [f"user {n}" for n in range(count)]
        offsets = np.arange(count + 1) * 5
        directory = tmp_path / str(count)
        directory.mkdir()
        ids = pa.array([f"item {n}" for n in range(ITEMS)])
        items = pa.Table.from_arrays([ids, *[pa.nulls(ITEMS, pa.string())] * 3], schema=columns.ITEMS)
        none = Ragged(np.empty(0, np.int32), np.zeros(count + 1, np.int64))
        stage = Stage(
            0, users, none, Ragged(np.resize(np.arange(ITEMS), count * 5).astype(np.int32), offsets)
        )
        write_stream(directory, items, [stage])
        done = subprocess.run(
            [sys.executable, "-c", MANY, directory, tmp_path / f"{count}.sqlite"],
            capture_output=True,
            text=True,
            check=True,
        )
        answered, grown = map(int, done.stdout.split())
        assert answered == count
        needed.append(grown)
    assert needed[1] - needed[0] < 60, needed
