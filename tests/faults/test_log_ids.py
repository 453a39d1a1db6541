"""Ids of logs, tables of users and vectors that were read wrongly in silence, or ended in a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from event_logs import data_config, histories, write_json_lines, write_log
from odd_logs import LOG, ROWS, Notes, T, expected, read, refused
from safetensors.torch import save_file

from peso.errors import DataError
from peso.events.append import extend_stream
from peso.items.vector_files import read_vectors
from peso.runs.report import read_user_table, report_users_found

# -- ids -----------------------------------------------------------------------------------------------


IDS: dict[str, tuple[Any, list[str | None]]] = {
    "floats": (pa.array([3.0, float("nan"), None, float("inf"), 2.5, 1e15, -0.0]),
               ["3", None, None, None, "2.5", "1000000000000000", "0"]),
    "integers": (pa.array([3, None, 2**62], pa.int64()), ["3", None, str(2**62)]),
    "decimals": (pa.array([3, None, 250], pa.decimal128(9, 2)), ["3", None, "250"]),
    "texts": (pa.array(["3", " ", "", None, "0003", "3.0", "nan"]),
              ["3", None, None, None, "0003", "3.0", "nan"]),
    "dictionary": (pa.array(["a", None, "b"]).dictionary_encode(), ["a", None, "b"]),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("side", ["user", "item"])
def test_ids_of_parquet_are_what_they_mean(tmp_path: Path, name: str, side: str) -> None:
    column, ids = IDS[name]
    n = len(column)
    base = {"user": pa.array(["u"] * n), "item": pa.array(["i"] * n), "time": pa.array(range(T, T + n))}
    base[side] = column
    filler = pa.table({"user": ["u0"] * 3, "item": ["i0"] * 3, "time": [T - 1, T - 2, T - 3]})
    (tmp_path / "log").mkdir()
    pq.write_table(filler, tmp_path / "log" / "a.parquet")  # a text column: the two files differ in type
    pq.write_table(pa.table(base), tmp_path / "log" / "b.parquet")
    stream, _ = read(tmp_path / "s", tmp_path / "log", "parquet", on_error="skip")
    found = set(stream.item_ids) if side == "item" else set(histories(stream)[0])
    assert found - {"u0", "i0"} == {i for i in ids if i is not None}
    assert stream.manifest["skipped"] == ids.count(None)
    if None in ids:
        refused(tmp_path / "no", f"row .* has no {side}", tmp_path / "log", "parquet")


@pytest.mark.parametrize(
    "column", [[["a"]] * 9, [{"id": "a"}] * 9, pa.array([[("a", 1)]] * 9, pa.map_(pa.string(), pa.int64()))]
)
def test_a_list_or_a_record_is_not_an_id(tmp_path: Path, column: Any) -> None:
    pq.write_table(pa.table({"user": ["u"] * 9, "item": column, "time": range(9)}), tmp_path / "log.parquet")
    refused(
        tmp_path / "s", "column 'item' of .* but ids are text or numbers", tmp_path / "log.parquet", "parquet"
    )
    pq.write_table(pa.table({"user_id": column, "x": range(9)}), tmp_path / "users.parquet")
    with pytest.raises(DataError, match="but ids are text or numbers"):
        read_user_table(tmp_path / "users.parquet")
    pq.write_table(pa.table({"item_id": column, "x": range(9)}), tmp_path / "vectors.parquet")
    with pytest.raises(DataError, match="but ids are text or numbers"):
        read_vectors(tmp_path / "vectors.parquet", ["a"])


def test_json_lines_that_are_odd_but_end_in_a_sentence(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "log.jsonl", ROWS)
    deep = '{"user": ' + "[" * 5000 + "]" * 5000 + ', "item": "i", "time": 1}\n'
    path.write_text(path.read_text() + '{"user": "\\ud800", "item": "i", "time": 1}\n' + deep)
    refused(tmp_path / "no", r"log\.jsonl: line 61 is not valid JSON", path, "jsonl")
    stream, _ = read(tmp_path / "s", path, "jsonl", on_error="skip")
    assert (histories(stream), stream.manifest["skipped"]) == (expected(), 2)
    path.write_text(deep)
    with pytest.raises(DataError, match=r"row 1 .* has no user") as caught:
        read(tmp_path / "deep", path, "jsonl")
    assert len(str(caught.value)) < 500
    path.write_text("".join(json.dumps(row, indent=1) for row in ROWS))
    refused(tmp_path / "pretty", "has no JSON objects", path, "jsonl")


def test_a_column_of_nothing_and_times_in_nanoseconds(tmp_path: Path) -> None:
    rows = [{**row, "user": None} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "log.parquet")
    refused(tmp_path / "1", "row 1 .* has no user", tmp_path / "log.parquet", "parquet")
    path = write_log(tmp_path / "log.csv", [(u, i, t * 10**9) for u, i, t in LOG])
    refused(tmp_path / "2", "too large for microseconds", path)


def test_ids_of_json_are_what_they_mean(tmp_path: Path) -> None:
    big = 123456789012345678901234567890
    users = [3, 3.0, "3", "3.0", True, big, -0.0, 0, None, ["a"], {"a": 1}, "", " "]
    rows = [{"user": user, "item": "i", "time": T + k} for k, user in enumerate(users * 3)]
    path = write_json_lines(tmp_path / "log.jsonl", [*rows, {"item": "i", "time": T}])
    stream, _ = read(tmp_path / "s", path, "jsonl", on_error="skip")
    counts = {user: len(current) for user, (_, current) in histories(stream)[0].items()}
    assert counts == {"3": 9, "3.0": 3, "true": 3, str(big): 3, "0": 6}
    assert stream.manifest["skipped"] == 16
    path.write_text(path.read_text().replace("null", "1e400"))  # beyond every number
    assert read(tmp_path / "t", path, "jsonl", on_error="skip")[0].manifest["skipped"] == 16


def test_whole_numbers_that_pandas_wrote_as_decimals_meet_their_products(tmp_path: Path) -> None:
    path = write_log(tmp_path / "log.csv", [(user, f"{item[1:]}.0", time) for user, item, time in LOG])
    (tmp_path / "products.csv").write_text("item,title\n" + "".join(f"{k},title {k}\n" for k in range(12)))
    items = {"path": str(tmp_path / "products.csv"), "columns": {"title": "title"}}
    stream, said = read(tmp_path / "s", path, items=items)
    assert stream.titles == [f"title {item}" for item in stream.item_ids]
    assert "10 of 10 items of the log have a row in" in said
    assert "which has 12 items" in said
    assert "column 'item' are written as decimals (3.0) and read as integers (3)" in said


@pytest.mark.parametrize("spoil", ["0{}", "{} ", "I{}", "{}.0"])
def test_ids_that_nearly_meet_are_told(tmp_path: Path, spoil: str) -> None:
    path = write_log(tmp_path / "log.csv", [(u, "n5" if k else "x", t) for k, (u, _, t) in enumerate(LOG)])
    path.write_text(path.read_text().replace("n5", spoil.format("i5" if "I" not in spoil else "5")))
    (tmp_path / "products.csv").write_text("item,title\ni5,T\nx,X\n")
    items = {"path": str(tmp_path / "products.csv"), "columns": {"title": "title"}}
    _, said = read(tmp_path / "s", path, items=items)
    assert "1 of 2 items of the log have a row in" in said
    assert "differ from an id in the product table only in leading zeros, decimals, spaces or case" in said
    assert ("with spaces around them" in said) == (spoil == "{} ")


def test_products_of_another_shop_are_refused(tmp_path: Path) -> None:
    (tmp_path / "products.csv").write_text("item,title\nsomething,else\n")
    items = {"path": str(tmp_path / "products.csv"), "columns": {"title": "title"}}
    match = r"none of the 10 items of the log has a row in .*products\.csv"
    refused(tmp_path / "s", match, write_log(tmp_path / "log.csv", LOG), items=items)


def test_a_text_that_looks_like_no_value_is_told(tmp_path: Path) -> None:
    _, said = read(tmp_path / "s", write_log(tmp_path / "log.csv", [*LOG, ("NaN", "null", T)]))
    assert "column 'user' has 1 ids that look like missing values" in said
    assert "column 'item' has 1 ids that look like missing values" in said


def test_users_of_the_user_table_have_the_ids_of_the_log(tmp_path: Path) -> None:
    floats = pa.table(
        {
            "user_id": [3.0, 4.0],
            "age": [30.0, float("nan")],
            "since": pa.array([0, 1], pa.timestamp("us", "UTC")),
        }
    )
    pq.write_table(floats, tmp_path / "users.parquet")
    told = read_user_table(tmp_path / "users.parquet")
    assert told["age"] == {"3": "30"}
    assert told["since"]["3"].startswith("1970-01-01 00:00:00")
    (tmp_path / "users.jsonl").write_text('{"user_id": 3}\n{"user_id": "007", "late": true}\n')
    assert read_user_table(tmp_path / "users.jsonl") == {"late": {"007": "true"}}


def test_a_table_of_users_is_read_whole_or_refused(tmp_path: Path) -> None:
    path, notes = tmp_path / "u.csv", Notes()
    path.write_text("user_id,age,age\nu1,1,2\n")
    with pytest.raises(DataError, match="two columns with the name 'age'"):
        read_user_table(path)
    path.write_text('user_id,age\nu1,"1\nu2,2\nu3,3\nu4,4\nu5,5\n')
    with pytest.raises(DataError, match=r"line 2 has a missing or misplaced quote: .* correct the line$"):
        read_user_table(path)
    path.write_text("user_id;age\nu1;1\n")
    with pytest.raises(DataError, match=r"no column 'user_id'; it has user_id;age. [^.]*user_id$"):
        read_user_table(path)
    path.write_text("user_id,age\n")
    report_users_found(
        read_user_table(path), read(tmp_path / "s", write_log(tmp_path / "log.csv", LOG))[0], notes
    )
    assert notes.told == ["0 of 4 users of the log have a row in report.users, which has 0 users"]


@pytest.mark.parametrize("vector", [{"a": 1.0}, ["a"], "a", True, None])
def test_vectors_that_are_no_numbers_end_in_a_sentence(tmp_path: Path, vector: Any) -> None:
    pq.write_table(pa.table({"item_id": ["a", "b"], "v": [vector, vector]}), tmp_path / "v.parquet")
    with pytest.raises(DataError, match=r"v\.parquet"):
        read_vectors(tmp_path / "v.parquet", ["a", "b"])


def test_vectors_of_other_types_end_in_a_sentence(tmp_path: Path) -> None:
    for name in ("v.npy", "v.safetensors"):
        if name == "v.npy":
            np.save(tmp_path / name, np.ones((2, 2), complex))
        else:
            save_file({"v": torch.ones(2, 2, dtype=torch.bfloat16)}, tmp_path / name)
        with pytest.raises(DataError, match=r"row of numbers|with float32"):
            read_vectors(tmp_path / name, ["a", "b"])


def test_users_and_vectors_that_nearly_meet_are_told(tmp_path: Path) -> None:
    notes = Notes()
    stream, _ = read(tmp_path / "s", write_log(tmp_path / "log.csv", LOG))
    report_users_found({"age": {"U1": "3", "u2 ": "4", "u3": "5", "x": "6"}}, stream, notes)
    pq.write_table(pa.table({"item_id": ["I1", "a"], "x": [1.0, 2.0]}), tmp_path / "v.parquet")
    read_vectors(tmp_path / "v.parquet", ["i1", "a", "b"], notes)
    assert notes.told == [
        "1 of 4 users of the log have a row in report.users, which has 4 users",
        "note: 2 users of the log without a row differ from an id there only in leading zeros, decimals, "
        "spaces or case, for example 'u1' and 'U1'; use one spelling for each id",
        "v.parquet: no vector for 2 of 3 items",
        "note: 1 of them differ from an id in the file only in leading zeros, decimals, spaces or case, "
        "for example 'i1' and 'I1'; use one spelling for each id",
    ]


def test_vectors_have_the_ids_of_the_log(tmp_path: Path) -> None:
    pq.write_table(pa.table({"item_id": [3.0, 4.0], "x": [1.0, 2.0]}), tmp_path / "v.parquet")
    assert read_vectors(tmp_path / "v.parquet", ["4", "3"]).tolist() == [[2.0], [1.0]]
    pq.write_table(pa.table({"item_id": [3.0, None], "x": [1.0, 2.0]}), tmp_path / "v.parquet")
    with pytest.raises(DataError, match="row 2 has no item_id"):
        read_vectors(tmp_path / "v.parquet", ["3"])


def test_nan_of_json_is_no_id(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({**row, "user": float("nan")}) + "\n" for row in ROWS[:2]))
    refused(tmp_path / "s", "row 1 .* has no user", path, "jsonl")


def test_ids_that_lost_digits_or_are_written_in_two_ways_are_told(tmp_path: Path) -> None:
    log = [(("7" if k % 2 else "7.0"), "1.5e+18", time) for k, (_, _, time) in enumerate(LOG)]
    said = read(tmp_path / "s", write_log(tmp_path / "log.csv", log))[1]
    assert "'7' and '7.0'" in said
    assert "scientific notation" in said
    table = pa.table({"user": [2.0**60] * 9, "item": [1.0] * 9, "time": range(9)})
    pq.write_table(table, tmp_path / "log.parquet")
    said = read(tmp_path / "t", tmp_path / "log.parquet", "parquet")[1]
    assert "column 'user' are decimals above" in said
    assert "column 'item'" not in said


def test_decimals_of_json_that_lost_digits_are_told(tmp_path: Path) -> None:
    rows = [{"user": 2**60 + k % 3, "item": 2.0**60 + k, "time": k} for k in range(9)]
    said = read(tmp_path / "s", write_json_lines(tmp_path / "log.jsonl", rows), "jsonl")[1]
    assert "column 'item' are decimals above" in said
    assert "column 'user'" not in said


@pytest.mark.slow
@pytest.mark.parametrize("spoil", ["i3 ", "\u200bi3", "I3", "0i3", "i3.0"])
def test_ids_that_differ_in_how_they_are_written_are_told(tmp_path: Path, spoil: str) -> None:
    """In one log, and between a log and its append."""
    log = [(user, "j" if item == "i3" else item, time) for user, item, time in LOG]
    one = [*log, ("u0", "i3", LOG[-1][2] + 1), ("u0", spoil, LOG[-1][2] + 2)]
    said = read(tmp_path / "s", write_log(tmp_path / "one.csv", one))[1]
    assert "column 'item' has 1 ids in several spellings" in said

    stream, _ = read(tmp_path / "t", write_log(tmp_path / "log.csv", one[:-1]))
    known = f"U{LOG[0][0][1:]}"
    week = [(known, spoil, LOG[-1][2] + 10 + k) for k in range(5)]
    (tmp_path / "u").mkdir()
    data = data_config(format="csv", path=str(write_log(tmp_path / "week.csv", week)))
    notes = Notes()
    manifest = extend_stream(data, stream.directory, tmp_path / "u", notes)
    remarks = manifest["appended"][-1]["remarks"]
    told = "differ from {} of the stream only in leading zeros, decimals, spaces or case, for example "
    told += "{!r} and {!r}"
    for remark in (told.format("users", known, LOG[0][0]), told.format("items", spoil, "i3")):
        assert any(remark in said for said in remarks)
        assert any(remark in said for said in notes.told)
