"""What a log with something wrong in it gets: a message with file, row and cure, and nothing half-written."""

from __future__ import annotations

import errno
import gzip
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from event_logs import data_config, histories, ingested, write_json_lines, write_log
from small_runs import Notes

from peso.errors import ConfigError, DataError, WorkspaceError
from peso.events import stage_writer
from peso.events.database import temporary_database
from peso.events.ingest import ingest
from peso.runtime.files import commit_directory

LOG = [(f"u{k % 3}", f"i{k % 5}", 1_600_000_000 + k) for k in range(30)]
RECORDS = [{"user": user, "item": item, "time": time} for user, item, time in LOG]


def refused(tmp_path: Path, match: str, **data: Any) -> None:
    """Ingesting fails with this message, and no directory is left."""
    with (
        pytest.raises((DataError, ConfigError), match=match),
        commit_directory(tmp_path / "stream") as directory,
    ):
        ingest(data_config(**{"stages": 2, **data}), directory)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith((".", "stream"))]


def bad_row(tmp_path: Path, row: tuple[object, ...], place: int = 7) -> Path:
    rows: list[tuple[object, ...]] = [*LOG]
    rows.insert(place, row)
    return write_log(tmp_path / "log.csv", rows)


def test_no_file(tmp_path: Path) -> None:
    refused(
        tmp_path, r"no file at .*none\.csv; check data\.path", format="csv", path=str(tmp_path / "none.csv")
    )


def test_a_folder_without_logs(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    refused(tmp_path, "logs has no jsonl file", format="jsonl", path=str(tmp_path / "logs"))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_an_empty_file_is_named(tmp_path: Path, kind: str) -> None:
    (tmp_path / f"log.{kind}").touch()
    refused(tmp_path, rf"log\.{kind} is empty", format=kind, path=str(tmp_path / f"log.{kind}"))


def test_an_empty_file_among_others_is_named(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    write_log(tmp_path / "logs" / "1.csv", LOG)
    (tmp_path / "logs" / "2.csv").touch()
    refused(tmp_path, r"2\.csv is empty", format="csv", path=str(tmp_path / "logs"))


def test_a_file_with_a_header_only(tmp_path: Path) -> None:
    path = write_log(tmp_path / "log.csv", [])
    refused(tmp_path, r"log\.csv has no readable events", format="csv", path=str(path))


def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path) -> None:
    path = write_log(tmp_path / "log.csv", LOG, "user_id,item,time")
    refused(
        tmp_path,
        r"log\.csv has no column 'user'; it has user_id, item, time\. Set data\.columns\.user",
        format="csv",
        path=str(path),
    )


def test_a_missing_field_of_json_lines(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "log.jsonl", [{"user": "a", "item": "b", "timestamp": 1}])
    refused(tmp_path, r"no column 'time'; it has .*timestamp", format="jsonl", path=str(path))


def test_a_missing_column_of_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"user": ["a"], "time": [1]}), tmp_path / "log.parquet")
    refused(
        tmp_path, "no column 'item'; it has user, time", format="parquet", path=str(tmp_path / "log.parquet")
    )


def test_the_wrong_separator_is_suggested(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user;item;time\na;b;1\n")
    refused(tmp_path, r"Set data\.columns\.user, or data\.separator", format="csv", path=str(path))


def test_columns_by_name_and_by_number_at_once(tmp_path: Path) -> None:
    path = write_log(tmp_path / "log.csv", LOG)
    refused(tmp_path, "partly by name", format="csv", path=str(path), columns={"user": 1})


def test_files_of_different_shape(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    write_log(tmp_path / "logs" / "1.csv", LOG)
    write_log(tmp_path / "logs" / "2.csv", LOG, "item,user,time")
    refused(
        tmp_path, r"2\.csv has the columns item, user, time, but", format="csv", path=str(tmp_path / "logs")
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "match"),
    [
        (("u1", "i1", "soon"), r"row 8 .* has the time 'soon' in column 'time'.*on_error: skip"),
        (("u1", "i1", ""), r"row 8 .* has no time"),
        (("u1", "i1", "-5"), r"row 8 .* has the time '-5'"),
        (("u1", "i1", "inf"), r"row 8 .* has the time 'inf'"),
        (("", "i1", "1600000000"), r"row 8 .* has no user"),
        (("u1", "", "1600000000"), r"row 8 .* has no item"),
    ],
)
def test_an_unreadable_row_is_named_or_counted(tmp_path: Path, row: tuple[str, ...], match: str) -> None:
    path = bad_row(tmp_path, row)
    refused(tmp_path, match, format="csv", path=str(path))
    stream = ingested(tmp_path / "s", format="csv", path=str(path), on_error="skip", stages=2)
    assert stream.manifest["skipped"] == 1
    good = ingested(tmp_path / "t", format="csv", path=str(write_log(tmp_path / "good.csv", LOG)), stages=2)
    assert histories(stream) == histories(good)


def test_the_row_is_counted_in_its_own_file(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    write_log(tmp_path / "logs" / "1.csv", LOG)
    write_log(tmp_path / "logs" / "2.csv", [*LOG[:2], ("u", "i", "never")])
    refused(tmp_path, r"2\.csv: row 3 .*'never'", format="csv", path=str(tmp_path / "logs"))


def test_a_rating_that_is_no_number(tmp_path: Path) -> None:
    rows = [*((*event, 5) for event in LOG), (*LOG[0], "great")]
    path = write_log(tmp_path / "log.csv", rows, "user,item,time,stars")
    refused(
        tmp_path,
        "row 31 .* has the rating 'great' in column 'stars'",
        format="csv",
        path=str(path),
        columns={"rating": "stars"},
        min_rating=3,
    )


def test_times_that_are_no_times(tmp_path: Path) -> None:
    path = write_log(tmp_path / "log.csv", [(u, i, "noon") for u, i, _ in LOG])
    refused(
        tmp_path, "has 'noon', which is neither seconds, milliseconds nor ISO", format="csv", path=str(path)
    )


def test_another_encoding_of_the_header_is_named(tmp_path: Path) -> None:
    path = write_log(tmp_path / "log.csv", LOG)
    path.write_bytes(path.read_bytes().decode().encode("utf-16"))
    refused(tmp_path, "is not utf-8 text; set data.encoding .*encoding=utf-16", format="csv", path=str(path))


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("items.jsonl", ['{"item": "i1", "title": "cut', '{"title": "of no item"}']),
        ("items.csv", ["i1,too,many", ",of no item"]),
    ],
)
def test_unreadable_rows_of_the_product_table_are_refused_or_counted(
    tmp_path: Path, name: str, bad: list[str]
) -> None:
    log = write_log(tmp_path / "log.csv", LOG)
    good = ['{"item": "i0", "title": "T"}'] if name.endswith("jsonl") else ["item,title", "i0,T"]
    (tmp_path / name).write_text("\n".join([*good, *bad]) + "\n")
    table = {"path": str(tmp_path / name), "format": name[6:], "columns": {"title": "title"}}
    data: dict[str, Any] = {"format": "csv", "path": str(log), "items": table}
    refused(tmp_path, rf"{name}: line \d", **data)
    write_log(log, [*LOG, ("u1",)])  # the log's own bad line is no product's
    stream = ingested(tmp_path / "s", **data, stages=2, on_error="skip")
    assert (stream.manifest["skipped"], stream.manifest["skipped_rows_of_items"]) == (1, 2)
    assert dict(zip(stream.item_ids, stream.titles, strict=True))["i0"] == "T"


def test_times_in_two_units(tmp_path: Path) -> None:
    path = bad_row(tmp_path, ("u1", "i1", 1_600_000_000_000))
    refused(tmp_path, "mixes seconds and milliseconds.*data.time_format", format="csv", path=str(path))


def test_mixed_encodings_name_the_line_and_can_be_skipped(tmp_path: Path) -> None:
    path = write_log(tmp_path / "log.csv", LOG)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:5], "ué,i1,1600000001\n".encode("latin-1"), *lines[5:]]))
    refused(tmp_path, r"log\.csv: line 6 is not UTF-8.*data\.encoding=latin-1", format="csv", path=str(path))
    stream = ingested(tmp_path / "s", format="csv", path=str(path), on_error="skip", stages=2)
    assert (stream.manifest["skipped"], stream.manifest["funnel"][0]["events"]) == (1, 31)
    whole = ingested(tmp_path / "t", format="csv", path=str(path), encoding="latin-1", stages=1)
    assert "ué" in histories(whole)[0]


def test_json_that_is_not_utf_8(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "log.jsonl", RECORDS)
    path.write_bytes(path.read_bytes() + b'{"user": "\xe9", "item": "i1", "time": 1600000000}\n')
    refused(tmp_path, r"log\.jsonl: line 31 .*UTF-8", format="jsonl", path=str(path))
    stream = ingested(tmp_path / "s", format="jsonl", path=str(path), on_error="skip", stages=2)
    assert stream.manifest["skipped"] == 1


def test_a_broken_line_of_json(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "log.jsonl", RECORDS)
    path.write_text(path.read_text() + '{"user": "u1", "item"\n')
    refused(tmp_path, r"log\.jsonl: line 31 is not valid JSON", format="jsonl", path=str(path))
    stream = ingested(tmp_path / "s", format="jsonl", path=str(path), on_error="skip", stages=2)
    assert (stream.manifest["skipped"], stream.counts[0]["events"]) == (1, 18)


def test_a_line_of_another_width(tmp_path: Path) -> None:
    path = bad_row(tmp_path, ("u1", "i1"))
    refused(tmp_path, r"log\.csv: line 9 has 2 columns instead of 3", format="csv", path=str(path))
    stream = ingested(tmp_path / "s", format="csv", path=str(path), on_error="skip", stages=2)
    assert stream.manifest["skipped"] == 1


def test_a_gzip_file_cut_short(tmp_path: Path) -> None:
    text = "user,item,time\n" + "".join(f"u{k % 97},i{k * k % 1009},{k}\n" for k in range(20_000))
    (tmp_path / "log.csv.gz").write_bytes(gzip.compress(text.encode())[:-500])
    refused(tmp_path, r"log\.csv\.gz is truncated", format="csv", path=str(tmp_path / "log.csv.gz"))


def test_a_file_that_only_claims_to_be_gzip(tmp_path: Path) -> None:
    write_log(tmp_path / "log.csv", LOG).rename(tmp_path / "log.csv.gz")
    refused(tmp_path, r"log\.csv\.gz.*gzip", format="csv", path=str(tmp_path / "log.csv.gz"))


def test_a_file_that_is_not_parquet(tmp_path: Path) -> None:
    write_log(tmp_path / "log.parquet", LOG)
    refused(
        tmp_path,
        r"log\.parquet is not a Parquet file: set the right format",
        format="parquet",
        path=str(tmp_path / "log.parquet"),
    )


def test_a_huge_user_is_one_history(tmp_path: Path) -> None:
    events = 100_000
    rng = np.random.default_rng(0)
    items = rng.integers(0, 500, events)
    log = [("huge", f"i{item}", k) for k, item in enumerate(items)]
    log += [(f"u{k % 50}", f"i{k % 500}", k) for k in range(0, events, 20)]
    stream = ingested(tmp_path / "s", format="csv", path=str(write_log(tmp_path / "log.csv", log)), stages=3)
    told = [stage["huge"] for stage in histories(stream)]
    assert [item for _, current in told for item in current] == [f"i{item}" for item in items]
    assert told[2][0] == told[0][1] + told[1][1]


def test_a_stage_without_events(tmp_path: Path) -> None:
    path = write_log(tmp_path / "log.csv", LOG)
    refused(
        tmp_path,
        "stage 1, from 2020-09-13T12:30:00Z to 2020-09-13T12:40:00Z, has no event",
        format="csv",
        path=str(path),
        stages={"boundaries": ["2020-09-13 12:30", "2020-09-13 12:40"]},
    )


def test_boundaries_that_do_not_ascend(tmp_path: Path) -> None:
    path = write_log(tmp_path / "log.csv", LOG)
    refused(
        tmp_path,
        "boundaries must be in ascending order",
        format="csv",
        path=str(path),
        stages={"boundaries": [1_600_000_020, 1_600_000_010]},
    )


def test_a_boundary_that_is_no_moment(tmp_path: Path) -> None:
    path = write_log(tmp_path / "log.csv", LOG)
    refused(
        tmp_path,
        "'tomorrow' is not a date or time",
        format="csv",
        path=str(path),
        stages={"boundaries": ["tomorrow"]},
    )


def test_a_calendar_of_too_many_periods(tmp_path: Path) -> None:
    path = write_log(tmp_path / "log.csv", LOG)
    refused(
        tmp_path,
        "more than 10,000 stages",
        format="csv",
        path=str(path),
        stages={"every": "1 hour", "from": "1970-01-01"},
    )


def test_a_stage_in_which_nobody_has_three_events(tmp_path: Path) -> None:
    log = [*LOG, *((f"v{k}", "i1", 1_600_001_000 + k) for k in range(20))]
    path = write_log(tmp_path / "log.csv", log)
    refused(
        tmp_path,
        "none of the 20 users of stage 1 has 3 events",
        format="csv",
        path=str(path),
        stages={"fractions": [0.6, 0.4]},
    )


def test_a_core_that_leaves_nothing(tmp_path: Path) -> None:
    path = write_log(tmp_path / "log.csv", LOG)
    refused(
        tmp_path,
        "no event is left after the cleaning step 'core: users of 50",
        format="csv",
        path=str(path),
        min_user=50,
    )


@pytest.mark.parametrize("format", ["amazon-2023", "movielens", "movietweetings", "yelp"])
def test_a_folder_that_is_not_the_data_set(tmp_path: Path, format: str) -> None:
    (tmp_path / "data").mkdir()
    refused(tmp_path, r"data", format=format, path=str(tmp_path / "data"))


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_log(tmp_path / "log.csv", LOG)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stage_writer.pq.ParquetWriter, "write_table", full)
    with (
        pytest.raises(WorkspaceError, match="no space left while writing"),
        commit_directory(tmp_path / "stream") as directory,
    ):
        ingest(data_config(format="csv", path=str(path), stages=2), directory)
    assert [p.name for p in tmp_path.iterdir()] == ["log.csv"]
    monkeypatch.undo()
    with commit_directory(tmp_path / "stream") as directory:
        ingest(data_config(format="csv", path=str(path), stages=2), directory)
    assert (tmp_path / "stream" / "manifest.json").is_file()


def test_a_disk_that_fills_up_with_what_is_spilt_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(WorkspaceError, match=r"no space left for temporary tables .* no partial output"),
        temporary_database(tmp_path),
    ):
        raise duckdb.IOException('IO Error: Could not write file "x.tmp": No space left on device')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("seconds", "warned"), [(190, False), (100, True)])
def test_a_large_share_of_rows_left_out_is_warned_of(tmp_path: Path, seconds: int, warned: bool) -> None:
    """For example a log whose format of times changed one day."""
    rows: list[tuple[object, ...]] = [(f"u{k % 5}", f"i{k % 7}", 1_600_000_000 + k) for k in range(seconds)]
    rows += [(f"u{k % 5}", f"i{k % 7}", f"2021-01-01T00:{k % 60:02}:00") for k in range(200 - seconds)]
    config = data_config(
        format="csv", path=str(write_log(tmp_path / "log.csv", rows)), stages=2, on_error="skip", min_user=1
    )
    notes = Notes()
    with commit_directory(tmp_path / "stream") as directory:
        ingest(config, directory, observer=notes)
    found = [note for note in notes.notes if "of the rows were left out" in note]
    assert len(found) == warned
    assert all(note.startswith("warning: 50% ") for note in found)
