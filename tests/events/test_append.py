"""New events become further stages; what was there stays, byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest
from event_logs import appended, data_config, histories, ingested, write_log
from small_runs import Notes

from peso.errors import DataError, WorkspaceError
from peso.events.append import extend_stream
from peso.events.ingest import ingest
from peso.events.stream import Stream
from peso.events.times import iso
from peso.runtime.files import commit_directory

T = 1_600_000_000
EVENTS = [(f"u{k % 5}", f"i{k * k % 7}", T + k * 3600) for k in range(90)]
NEW = [(f"u{k % 6 + 2}", f"i{k % 9}", T + (100 + k) * 3600) for k in range(40)]  # new users and items among


@pytest.fixture
def stream(tmp_path: Path) -> Stream:
    path = write_log(tmp_path / "log.csv", EVENTS)
    return ingested(tmp_path / "stream", format="csv", path=str(path), stages=2)


def test_appending_equals_ingesting_all_at_once(tmp_path: Path, stream: Stream) -> None:
    path = write_log(tmp_path / "new.csv", NEW)
    longer = appended(tmp_path / "longer", stream, format="csv", path=str(path), stages=2)
    whole = ingested(
        tmp_path / "whole",
        format="csv",
        path=str(write_log(tmp_path / "all.csv", [*EVENTS, *NEW])),
        stages={"boundaries": [iso((T + 54 * 3600) * 1_000_000), iso((T + 95 * 3600) * 1_000_000)]},
    )
    assert histories(longer) == histories(whole)
    assert longer.item_ids == whole.item_ids
    assert longer.counts == whole.counts


def test_earlier_stages_and_item_rows_stay_as_they_are(tmp_path: Path, stream: Stream) -> None:
    path = write_log(tmp_path / "new.csv", NEW)
    longer = appended(tmp_path / "longer", stream, format="csv", path=str(path))
    for number in range(2):
        name = f"stage={number}/users.parquet"
        assert (longer.directory / name).stat().st_ino == (stream.directory / name).stat().st_ino
        assert longer.manifest["files"][name] == stream.manifest["files"][name]
    assert longer.items.slice(0, len(stream.items)).equals(stream.items)
    assert set(longer.item_ids[len(stream.items) :]) == {item for _, item, _ in NEW} - set(stream.item_ids)
    assert longer.counts[:2] == stream.counts
    assert longer.manifest["appended"][0]["new_items"] == len(longer.items) - len(stream.items)
    assert Stream.open(stream.directory).stages == 2


def test_appending_twice_continues_from_the_newest_history(tmp_path: Path, stream: Stream) -> None:
    more = [(u, i, t + 40 * 3600) for u, i, t in NEW]
    first = appended(
        tmp_path / "1", stream, format="csv", path=str(write_log(tmp_path / "a.csv", NEW)), stages=1
    )
    second = appended(
        tmp_path / "2", first, format="csv", path=str(write_log(tmp_path / "b.csv", more)), stages=1
    )
    whole = [*EVENTS, *NEW, *more]
    for user, (previous, current) in histories(second)[3].items():
        assert previous + current == [item for u, item, _ in whole if u == user]
        assert current == [item for u, item, _ in more if u == user]
    assert [entry["first_stage"] for entry in second.manifest["appended"]] == [2, 3]


def test_a_calendar_goes_on_where_it_was(tmp_path: Path) -> None:
    stages = {"every": "1 day", "from": iso((T + 24 * 3600) * 1_000_000)}
    log = [(f"u{k % 2}", f"i{k % 7}", T + k * 3600) for k in range(24 * 6)]
    at_once = ingested(
        tmp_path / "once", format="csv", path=str(write_log(tmp_path / "all.csv", log)), stages=stages
    )
    early = ingested(
        tmp_path / "early",
        format="csv",
        path=str(write_log(tmp_path / "a.csv", log[: 24 * 3])),
        stages=stages,
    )
    later = appended(
        tmp_path / "later",
        early,
        format="csv",
        path=str(write_log(tmp_path / "b.csv", log[24 * 3 :])),
        stages=stages,
    )
    assert (early.stages, later.stages) == (3, 6)
    assert histories(later) == histories(at_once)


def test_users_and_items_of_the_stream_are_never_too_rare(tmp_path: Path, stream: Stream) -> None:
    new = [
        *(("u0", item, T + 400_000 + k) for k, item in enumerate(["i0", "i1", "i2", "fresh"])),
        ("stranger", "i0", T + 400_100),
        *(("regular", f"i{k}", T + 400_200 + k) for k in range(3)),
    ]
    longer = appended(
        tmp_path / "longer",
        stream,
        format="csv",
        path=str(write_log(tmp_path / "new.csv", new)),
        min_user=3,
        min_item=2,
    )
    assert {user: current for user, (_, current) in histories(longer)[2].items()} == {
        "u0": ["i0", "i1", "i2"],
        "regular": ["i0", "i1", "i2"],
    }
    assert "fresh" not in longer.item_ids


def test_repeats_of_earlier_stages_are_repeats(tmp_path: Path) -> None:
    log = [("a", f"i{k}", T + k) for k in range(4)]
    new = [("a", item, T + 100 + k) for k, item in enumerate(["i1", "x", "i2", "y", "z", "x"])]
    stream = ingested(
        tmp_path / "s",
        format="csv",
        path=str(write_log(tmp_path / "log.csv", log)),
        repeats="drop",
        stages=1,
    )
    longer = appended(
        tmp_path / "longer",
        stream,
        format="csv",
        path=str(write_log(tmp_path / "new.csv", new)),
        repeats="drop",
    )
    assert histories(longer)[1] == {"a": (["i0", "i1", "i2", "i3"], ["x", "y", "z"])}


def test_events_older_than_the_stream_are_refused(tmp_path: Path, stream: Stream) -> None:
    path = write_log(tmp_path / "new.csv", [*EVENTS[-3:], *NEW])
    with pytest.raises(DataError, match=r"new\.csv: 2 events are older.*ingest everything into a new"):
        appended(tmp_path / "longer", stream, format="csv", path=str(path))
    with pytest.raises(DataError, match="all 80 events are older"):
        appended(
            tmp_path / "old",
            stream,
            format="csv",
            path=str(write_log(tmp_path / "old.csv", EVENTS[:80])),
            on_error="skip",
        )


def test_older_events_can_be_left_out_and_are_counted(tmp_path: Path, stream: Stream) -> None:
    path = write_log(tmp_path / "new.csv", [*EVENTS[:-1], *NEW])
    longer = appended(tmp_path / "longer", stream, format="csv", path=str(path), on_error="skip")
    clean = appended(tmp_path / "clean", stream, format="csv", path=str(write_log(tmp_path / "b.csv", NEW)))
    assert longer.manifest["appended"][0]["older"] == 89
    assert histories(longer) == histories(clean)


def test_a_stream_without_times_takes_nothing(tmp_path: Path, stream: Stream) -> None:
    from peso.runtime.manifest import write_manifest

    write_manifest(
        stream.directory, 1, {k: v for k, v in stream.manifest.items() if k not in ("time", "files")}
    )
    path = write_log(tmp_path / "new.csv", NEW)
    with pytest.raises(DataError, match="new events cannot be placed in it"):
        appended(tmp_path / "longer", stream, format="csv", path=str(path))


def test_a_damaged_stage_is_not_carried_on(tmp_path: Path, stream: Stream) -> None:
    (stream.directory / "stage=0" / "users.parquet").write_bytes(b"PAR1")
    path = write_log(tmp_path / "new.csv", NEW)
    with pytest.raises((WorkspaceError, DataError), match="stage=0"):
        appended(tmp_path / "longer", stream, format="csv", path=str(path))


def test_in_place_the_stream_is_the_old_or_the_new(tmp_path: Path, stream: Stream) -> None:
    from event_logs import data_config

    bad = data_config(format="csv", path=str(write_log(tmp_path / "bad.csv", [("a", "b", "soon")])))
    good = data_config(format="csv", path=str(write_log(tmp_path / "new.csv", NEW)))
    before = histories(stream)
    with pytest.raises(DataError), commit_directory(stream.directory) as directory:
        extend_stream(bad, stream.directory, directory)
    assert histories(Stream.open(stream.directory)) == before
    with commit_directory(stream.directory) as directory:
        extend_stream(good, stream.directory, directory)
    assert histories(Stream.open(stream.directory))[:2] == before
    assert Stream.open(stream.directory).stages == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.csv", "log.csv", "new.csv", "stream"]


def test_ingest_and_append_leave_no_trace_of_their_work(tmp_path: Path) -> None:
    from event_logs import data_config

    (tmp_path / "s").mkdir()
    path = write_log(tmp_path / "bad.csv", [("a", "b", "soon")])
    with pytest.raises(DataError):
        ingest(data_config(format="csv", path=str(path)), tmp_path / "s")
    assert list((tmp_path / "s").iterdir()) == []


def test_an_event_of_the_last_moment_is_appended_once(tmp_path: Path, stream: Stream) -> None:
    user, _, last = EVENTS[-1]
    other = (user, "i-late", last)  # at the same moment, and not in the stream
    exported = write_log(tmp_path / "all.csv", [*EVENTS, other, *NEW])
    longer = appended(tmp_path / "longer", stream, format="csv", path=str(exported), on_error="skip")
    clean = write_log(tmp_path / "new.csv", [other, *NEW])
    assert histories(longer) == histories(appended(tmp_path / "clean", stream, format="csv", path=str(clean)))
    assert {key: longer.manifest["appended"][0]["funnel"][3][key] for key in ("step", "events")} == {
        "step": "not in the stream yet",
        "events": 41,
    }


@pytest.mark.parametrize("late", [0, 2])
def test_times_in_the_future_are_reported_because_later_appends_depend_on_them(
    tmp_path: Path, stream: Stream, late: int
) -> None:
    told = Notes()
    far = [(u, i, t + 4_000_000_000) for u, i, t in NEW[:late]]
    new = write_log(tmp_path / "new.csv", [*NEW, *far])
    with commit_directory(tmp_path / "longer") as directory:
        extend_stream(data_config(format="csv", path=str(new)), stream.directory, directory, told)
    said = [note for note in told.notes if "in the future" in note]
    assert len(said) == bool(late)
    assert all(note.startswith("warning: 2 events are in the future, the last at 2147-") for note in said)
