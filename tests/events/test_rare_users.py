"""Users who are too rare for a stage are kept apart: with their items, in no stage, in no training."""

from __future__ import annotations

from pathlib import Path

import pytest
from event_logs import appended, core, histories, ingested, write_log
from hypothesis import given, settings
from hypothesis import strategies as st

from peso.events.append import shorten_stream
from peso.events.erase import erase_user
from peso.events.history_index import HistoryIndex
from peso.events.stream import Stream, rare_file

pytestmark = pytest.mark.slow

T = 1_600_000_000
USUAL = [(f"u{k % 4}", f"i{k % 5}", T + k * 60) for k in range(60)]
RARE = [("once", "i3", T + 5), ("twice", "i1", T + 7), ("twice", "i0", T + 6), ("odd", "nowhere else", T + 8)]
RULES = {"min_user": 3, "min_item": 2}


def make(folder: Path, events: list[tuple[str, str, int]], **rules: int) -> Stream:
    folder.mkdir(exist_ok=True)
    log = write_log(folder / "log.csv", events)
    return ingested(folder / "stream", format="csv", path=str(log), stages=2, **rules)


def rare(stream: Stream, number: int = 0) -> dict[str, list[str]]:
    pieces = list(stream.rare_pieces(number))
    assert not any(len(had) for stage in pieces for had in stage.current)
    return {
        user: [stream.item_ids[row] for row in had]
        for stage in pieces
        for user, had in zip(stage.users, stage.previous, strict=True)
    }


def indexed(stream: Stream, path: Path, through: int | None = None) -> dict[str, list[str]]:
    index = HistoryIndex.open(stream, path, through)
    return {
        user.name: [stream.item_ids[row] for row in user.items] for part in index.parts(3) for user in part
    }


def test_rare_users_are_kept_with_what_the_stream_has_of_their_items(tmp_path: Path) -> None:
    stream = make(tmp_path / "w", [*USUAL, *RARE], **RULES)
    assert rare(stream) == {"once": ["i3"], "twice": ["i0", "i1"], "odd": []}
    assert stream.manifest["rare_users"] == 3
    without = make(tmp_path / "without", USUAL, **RULES)
    assert histories(stream) == histories(without)
    assert [stream.fingerprint(n) for n in (0, 1)] == [without.fingerprint(n) for n in (0, 1)]
    assert rare(without) == {}
    assert rare_file(0) not in without.manifest["files"]


def test_they_are_in_the_index_of_the_whole_stream_alone(tmp_path: Path) -> None:
    stream = make(tmp_path / "w", [*USUAL, *RARE], **RULES)
    found = indexed(stream, tmp_path / "h.sqlite")
    assert list(found)[-3:] != list(found)[:3]
    assert {user: found[user] for user in ("once", "twice", "odd")} == rare(stream)
    assert set(found) == {"u0", "u1", "u2", "u3", "once", "twice", "odd"}
    assert set(indexed(stream, tmp_path / "h.sqlite", 0)) == {"u0", "u1", "u2", "u3"}


def test_who_comes_often_enough_later_begins_there(tmp_path: Path) -> None:
    first = make(tmp_path / "w", [*USUAL, *RARE], **RULES)
    new = [*[("once", f"i{k}", T + 9000 + k) for k in range(3)], ("late", "i2", T + 9100)]
    log = write_log(tmp_path / "new.csv", [*new, ("u1", "i1", T + 9200)])
    longer = appended(tmp_path / "longer", first, format="csv", path=str(log), stages=1, **RULES)
    assert rare(longer, 2) == {"late": ["i2"]}
    assert rare(longer, 0) == rare(first)
    found = indexed(longer, tmp_path / "h.sqlite")
    assert (found["once"], found["late"], found["twice"]) == (["i0", "i1", "i2"], ["i2"], ["i0", "i1"])
    (shorter := tmp_path / "shorter").mkdir()
    shorten_stream(longer.directory, shorter)
    assert Stream.open(shorter).manifest["files"] == first.manifest["files"]


def test_a_rare_user_can_be_erased(tmp_path: Path) -> None:
    stream = make(tmp_path / "w", [*USUAL, *RARE], **RULES)
    (new := tmp_path / "new").mkdir()
    erase_user(stream.directory, new, "twice")
    assert set(rare(Stream.open(new))) == {"once", "odd"}
    assert histories(Stream.open(new)) == histories(stream)
    assert "twice" not in indexed(Stream.open(new), tmp_path / "h.sqlite")


events = st.lists(
    st.tuples(st.sampled_from("abcdef"), st.sampled_from("pqrst"), st.integers(0, 40)), max_size=25
)


@settings(max_examples=8)
@given(events=events, min_user=st.integers(1, 4), min_item=st.integers(1, 4))
def test_every_user_of_a_log_is_in_its_index(tmp_path_factory, events, min_user: int, min_item: int) -> None:
    folder = tmp_path_factory.mktemp("w")
    events = [(f"user {u}", f"item {i}", T + at) for u, i, at in events]
    usual = [(f"u{k % 2}", f"i{k % 4}", T + k) for k in range(24)]
    stream = make(folder, [*usual, *events], min_user=min_user, min_item=min_item)
    distinct = sorted(dict.fromkeys([*usual, *events]), key=lambda event: event[2])
    kept = core(distinct, min_user, min_item)
    items = {item for _, item, _ in kept}
    expected = {user: [] for user, _, _ in distinct}
    for user, item, _ in kept:
        expected[user].append(item)
    for user, had in expected.items():
        if not had:
            expected[user] = [item for u, item, _ in distinct if u == user and item in items]
    assert indexed(stream, folder / "h.sqlite") == expected


def test_a_split_by_users_keeps_them(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv", [*USUAL, *RARE])
    stream = ingested(
        tmp_path / "stream", format="csv", path=str(log), stages=2, split="user-disjoint", **RULES
    )
    assert rare(stream) == {"once": ["i3"], "twice": ["i0", "i1"], "odd": []}


@pytest.mark.parametrize("rules", [{}, {"min_user": 1, "min_item": 1}])
def test_where_nobody_is_rare_nothing_is_added(tmp_path: Path, rules: dict[str, int]) -> None:
    stream = make(tmp_path / "w", [*USUAL, *RARE], **rules)
    assert "rare_users" not in stream.manifest
    assert rare(stream) == {}
