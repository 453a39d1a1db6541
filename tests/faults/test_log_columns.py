"""Columns, times and event types of logs that were read wrongly in silence, or ended in a traceback."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from event_logs import histories, write_json_lines, write_log
from odd_logs import LOG, ROWS, T, expected, read, refused

from peso.runs.report import read_user_table

# -- columns -------------------------------------------------------------------------------------------


def test_columns_without_a_name_or_equal_but_for_case(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(
        ",USER,User,user,item,time,\n" + "".join(f"{k},X,Y,{u},{i},{t},\n" for k, (u, i, t) in enumerate(LOG))
    )
    assert histories(read(tmp_path / "1", path)[0]) == expected()
    assert set(histories(read(tmp_path / "2", path, columns={"user": "User"})[0])[0]) == {"Y"}
    rows = [{"User": "Y", **row, "USER": "X", "": 1} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "log.parquet")
    assert histories(read(tmp_path / "3", tmp_path / "log.parquet", "parquet")[0]) == expected()
    write_json_lines(tmp_path / "log.jsonl", rows)
    assert histories(read(tmp_path / "4", tmp_path / "log.jsonl", "jsonl")[0]) == expected()
    (tmp_path / "users.csv").write_text(",user_id,Group,group\n0,u1,a,b\n")
    assert read_user_table(tmp_path / "users.csv") == {"Group": {"u1": "a"}, "group": {"u1": "b"}}


def test_two_columns_of_one_name_matter_only_where_they_are_read(tmp_path: Path) -> None:
    path = write_log(tmp_path / "log.csv", [(*row, 1, 2) for row in LOG], "user,item,time,n,n")
    assert histories(read(tmp_path / "1", path)[0]) == expected()
    refused(tmp_path / "2", "two columns with the name 'n'", path, columns={"rating": "n"}, min_rating=1)


@pytest.mark.parametrize("optional", [False, True])
def test_a_key_of_json_may_come_late(tmp_path: Path, optional: bool) -> None:
    items = [{"item": f"x{k}", "title": "none"} for k in range(3000)]
    items += [{"item": f"i{k}", "title": "T", "brand/make~": "Acme"} for k in range(10)]
    path = write_json_lines(tmp_path / "p.jsonl", items)
    table = {"path": str(path), "format": "jsonl", "columns": {"title": "title", "text": ["brand/make~"]}}
    stream, _ = read(tmp_path / "s", write_log(tmp_path / "log.csv", LOG), items=table)
    assert set(stream.items["text"].to_pylist()) == {"Acme"}
    table["columns"] = {"text": ["colour"]}
    refused(tmp_path / "no", "no column 'colour'", tmp_path / "log.csv", items=table)


def test_late_fields_of_amazon_products_are_read(tmp_path: Path) -> None:
    reviews = [{"user_id": u, "parent_asin": i, "rating": 5.0, "timestamp": t * 1000} for u, i, t in LOG]
    write_json_lines(tmp_path / "Games.jsonl", reviews)
    meta = [{"parent_asin": f"x{k}", "price": 1} for k in range(1500)]
    meta += [{"parent_asin": f"i{k}", "title": f"Game {k}", "features": ["late"]} for k in range(10)]
    write_json_lines(tmp_path / "meta_Games.jsonl", meta)
    stream, _ = read(tmp_path / "s", tmp_path / "Games.jsonl", "amazon-2023")
    assert set(stream.items["text"].to_pylist()) == {"late"}
    assert None not in stream.titles


# -- times ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "Europe/Berlin", "+02:00"])
def test_timestamps_with_a_zone_are_moments(tmp_path: Path, unit: str, zone: str | None) -> None:
    moments = pa.array([datetime.fromtimestamp(t, UTC) for *_, t in LOG]).cast(
        pa.timestamp(unit, zone or "UTC")
    )
    moments = moments if zone else moments.cast(pa.timestamp(unit))
    users, items, _ = zip(*LOG, strict=True)
    pq.write_table(pa.table({"user": users, "item": items, "time": moments}), tmp_path / "log.parquet")
    stream, _ = read(tmp_path / "s", tmp_path / "log.parquet", "parquet")
    assert histories(stream) == expected()
    assert stream.manifest["time"]["first"] == T * 1_000_000


def test_an_unreadable_row_beside_timestamps_with_a_zone_is_named(tmp_path: Path) -> None:
    times = pa.array([T, None, T + 1], pa.timestamp("s", "UTC"))
    pq.write_table(pa.table({"user": ["a"] * 3, "item": ["b"] * 3, "time": times}), tmp_path / "log.parquet")
    refused(tmp_path / "s", "row 2 .* has no time", tmp_path / "log.parquet", "parquet")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("given", ["seconds", "milliseconds"])
def test_moments_past_the_calendar_are_unreadable(tmp_path: Path, kind: str, given: str) -> None:
    far = 10**15 if given == "seconds" else 10**18
    log = [*LOG, ("u0", "i0", far)]
    path = tmp_path / f"log.{kind}"
    if kind == "csv":
        write_log(path, log)
    else:
        pq.write_table(
            pa.table(dict(zip(("user", "item", "time"), map(list, zip(*log, strict=True)), strict=True))),
            path,
        )
    refused(tmp_path / "no", f"row 61 .* has the time '{far}' .* as {given}", path, kind, time_format=given)
    assert read(tmp_path / "s", path, kind, time_format=given, on_error="skip")[0].manifest["skipped"] == 1
    refused(tmp_path / "auto", "mixes|too large for microseconds|cannot be read", path, kind)


@pytest.mark.parametrize(
    "stages",
    [
        {"boundaries": [10**15]},
        {"boundaries": [-5]},
        {"every": "1 week", "from": 10**18},
        {"every": "9999999999999 years", "from": T},
        {"every": "99999999999999999999 hours", "from": T},
    ],
)
def test_boundaries_past_the_calendar_end_in_a_sentence(tmp_path: Path, stages: dict[str, Any]) -> None:
    refused(
        tmp_path / "s",
        "is not between 1970|has no event",
        write_log(tmp_path / "log.csv", LOG),
        stages=stages,
    )


# -- event types ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_events_of_other_types_are_left_out_and_counted(tmp_path: Path, kind: str) -> None:
    types = ["view", "purchase", "cart", None]
    rows = [{**row, "type": types[k % 4]} for k, row in enumerate(ROWS)]
    path = tmp_path / f"log.{kind}"
    if kind == "csv":
        write_log(path, [(*row.values(),) for row in rows], "user,item,time,type")
    elif kind == "jsonl":
        write_json_lines(path, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    events = {"column": "type", "keep": ["purchase", "cart", "refund"]}
    stream, said = read(tmp_path / "s", path, kind, events=events)
    kept = [(r["user"], r["item"]) for r in rows if r["type"] in events["keep"]]
    assert stream.counts[0]["events"] == len(kept) == 30
    assert {user: current for user, (_, current) in histories(stream)[0].items()} == {
        user: [i for u, i in kept if u == user] for user in {u for u, _ in kept}
    }
    steps = {step["step"]: step["events"] for step in stream.manifest["funnel"]}
    assert steps["events of type purchase, cart, refund"] == 30
    assert "no event has 'refund' in column 'type'" in said
    refused(tmp_path / "no", "check data.events", path, kind, events={**events, "keep": "x"})
    refused(
        tmp_path / "no2",
        "no column 'kind'.*data.events.column",
        path,
        kind,
        events={"column": "kind", "keep": 1},
    )


def test_event_types_that_are_numbers_are_their_text(tmp_path: Path) -> None:
    path = write_log(
        tmp_path / "log.csv", [(*row, k % 3) for k, row in enumerate(LOG)], "user,item,time,type"
    )
    stream, _ = read(tmp_path / "s", path, events={"column": "type", "keep": [1, 2]})
    assert stream.counts[0]["events"] == 40
