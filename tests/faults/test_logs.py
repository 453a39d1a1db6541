"""Logs and tables that were read wrongly in silence, or that ended in a traceback."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from event_logs import data_config, histories, write_json_lines, write_log
from safetensors.torch import save_file

from peso.config import load_config
from peso.errors import ConfigError, DataError, PesoError
from peso.events.append import extend_stream
from peso.events.ingest import ingest
from peso.events.sources import lines, reading
from peso.events.sources.files import format_of
from peso.events.sources.lines import Dialect, count_plain_rows
from peso.events.stream import Stream
from peso.items.vector_files import read_vectors
from peso.runs.report import read_user_table, report_users_found

T = 1_600_000_000
LOG = [(f"u{k % 4}", f"i{k * 7 % 10}", T + 60 * k) for k in range(60)]
ROWS = [{"user": user, "item": item, "time": time} for user, item, time in LOG]


class Notes:
    """An Observer that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, text: str) -> None:
        self.told.append(text)

    def begin(self, *_: object) -> None: ...
    def advance(self, *_: object, **__: object) -> None: ...
    def end(self) -> None: ...


def read(folder: Path, path: Path | str, format: str = "csv", **data: Any) -> tuple[Stream, str]:
    """The stream, and what was said while it was made."""
    folder.mkdir(parents=True)
    notes = Notes()
    ingest(data_config(format=format, path=str(path), **{"stages": 1, **data}), folder, observer=notes)
    return Stream.open(folder), "\n".join(notes.told)


def refused(folder: Path, match: str, path: Path | str, format: str = "csv", **data: Any) -> None:
    with pytest.raises(PesoError, match=match) as caught:
        read(folder, path, format, **data)
    assert "\n" not in str(caught.value)


def expected() -> list[dict[str, tuple[list[str], list[str]]]]:
    return [{f"u{u}": ([], [i for user, i, _ in LOG if user == f"u{u}"]) for u in range(4)}]


# -- a name is a name, a path is a path ---------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["log[1].csv", "log*.csv", "log?.csv", "it's {a,b} [!x].csv", "$HOME ~.csv"])
@pytest.mark.parametrize("table", ["log", "products", "users"])
def test_a_file_that_exists_is_that_file(tmp_path: Path, name: str, table: str) -> None:
    (tmp_path / "data").mkdir()
    other, this = tmp_path / "data" / "log1.csv", tmp_path / "data" / name
    if table == "users":
        other.write_text("user_id,group\nu1,other\n")
        this.write_text("user_id,group\nu1,this\n")
        assert read_user_table(this) == {"group": {"u1": "this"}}
        return
    if table == "log":
        write_log(other, [(f"other{user}", item, time) for user, item, time in LOG])
        assert histories(read(tmp_path / "s", write_log(this, LOG))[0]) == expected()
        return
    other.write_text("item,title\n" + "".join(f"i{k},other\n" for k in range(10)))
    this.write_text("item,title\n" + "".join(f"i{k},this\n" for k in range(10)))
    items = {"path": str(this), "columns": {"title": "title"}}
    stream, _ = read(tmp_path / "s", write_log(tmp_path / "log.csv", LOG), items=items)
    assert set(stream.titles) == {"this"}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_folder_s_name_is_no_column(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "log" / "user=someone" / "time=2024-01-01"
    folder.mkdir(parents=True)
    if kind == "csv":
        write_log(folder / "part.csv", LOG)
    elif kind == "jsonl":
        write_json_lines(folder / "part.jsonl", ROWS)
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), folder / "part.parquet")
    assert histories(read(tmp_path / "s", tmp_path / "log", kind)[0]) == expected()


def test_hidden_files_of_a_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "log" / ".ipynb_checkpoints").mkdir(parents=True)
    write_log(tmp_path / "log" / "log.csv", LOG)
    for hidden in ("._log.csv", ".log.csv", ".ipynb_checkpoints/log.csv"):
        write_log(tmp_path / "log" / hidden, [("hidden", "i", T)] * 5)
    assert histories(read(tmp_path / "s", tmp_path / "log")[0]) == expected()


def test_no_file_of_a_folder_is_left_out_in_silence(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    (tmp_path / "elsewhere").mkdir()
    folder.mkdir()
    write_log(folder / "a.csv", LOG[:30])
    write_log(tmp_path / "elsewhere" / "b.csv", LOG[30:])
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    assert histories(read(tmp_path / "s", folder)[0]) == expected()
    (folder / "c.csv").symlink_to(tmp_path / "gone.csv")
    refused(tmp_path / "t", r"c\.csv is not a file, or is a broken link", folder)
    refused(tmp_path / "u", r"c\.csv is not a file, or is a broken link", folder / "*.csv")
    (folder / "c.csv").unlink()
    os.mkfifo(folder / "c.csv")
    refused(tmp_path / "v", r"c\.csv is not a file", folder)


# -- rows read and rows left out are the rows that there are ------------------------------------------


def quoted(lines: list[str], at: int, text: str) -> list[str]:
    return [*lines[:at], text, *lines[at + 1 :]]


NOTED = ["user,item,time,note", *(f"{user},{item},{time},ok" for user, item, time in LOG)]


def test_one_unclosed_quote_costs_one_row(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("\n".join(quoted(NOTED, 11, f'u1,i1,{T},"half a note')) + "\n")
    refused(tmp_path / "no", r"log\.csv: line 12 has a missing or misplaced quote", path)
    stream, _ = read(tmp_path / "s", path, on_error="skip")
    assert (stream.manifest["skipped"], stream.counts[0]["events"]) == (1, 59)


@pytest.mark.parametrize("apart", [1, 2, 40])
@pytest.mark.parametrize(
    ("first", "last"),
    [
        ('u1,i1,{},"half', 'u2,i2,{},half"'),
        ('u1,"i1,{},half', 'u2,i2",{},half'),
        ('"u1,i1,{},x', 'u2",i2,{},x'),
    ],
)
def test_two_stray_quotes_swallow_nothing(tmp_path: Path, apart: int, first: str, last: str) -> None:
    path = tmp_path / "log.csv"
    lines = quoted(quoted(NOTED, 11, first.format(T)), 11 + apart, last.format(T))
    path.write_text("\n".join(lines) + "\n")
    refused(tmp_path / "no", r"line 12 has a missing or misplaced quote", path)
    stream, _ = read(tmp_path / "s", path, on_error="skip")
    assert stream.manifest["funnel"][0]["events"] == 60
    assert stream.counts[0]["events"] + stream.manifest["skipped"] == 60
    assert stream.manifest["skipped"] <= 2


def test_notes_of_several_lines_are_notes(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    lines = [
        f'{u},{i},{t},"first, line\nsecond ""quoted"", line, {k}\n\nlast"' for k, (u, i, t) in enumerate(LOG)
    ]
    path.write_text("\n".join(["user,item,time,note", *lines]) + "\n")
    stream, _ = read(tmp_path / "s", path)
    assert histories(stream) == expected()
    assert stream.manifest["skipped"] == 0


def test_quotes_may_be_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user,item,time\n" + "".join(f'{user},"{item}" x,{time}\n' for user, item, time in LOG))
    refused(tmp_path / "no", "line 2 has a missing or misplaced quote", path)
    stream, _ = read(tmp_path / "s", path, quote="")
    assert stream.item_ids[0] == '"i0" x'


@pytest.mark.slow
@pytest.mark.parametrize("where", ["log.csv.gz", "log.jsonl.gz", "products.csv.gz", "users.csv.gz"])
def test_a_flipped_bit_of_a_gzip_file_is_found(tmp_path: Path, where: str) -> None:
    rng = random.Random(0)
    path, log = tmp_path / where, write_log(tmp_path / "plain.csv", LOG)
    texts = {
        "log.csv.gz": "user,item,time\n" + "".join(f"{u},{i}-{rng.random()},{t}\n" for u, i, t in LOG),
        "log.jsonl.gz": "".join(json.dumps(row) + "\n" for row in ROWS),
        "products.csv.gz": "item,title\n" + "".join(f"i{k},{rng.random()}\n" for k in range(100)),
        "users.csv.gz": "user_id,x\n" + "".join(f"u{k},{rng.random()}\n" for k in range(100)),
    }
    whole = gzip.compress(texts[where].encode(), mtime=0)
    path.write_bytes(whole)

    def use(number: int) -> None:
        if where.startswith("users"):
            read_user_table(path)
        elif where.startswith("log"):
            read(tmp_path / f"s{number}", path, where.split(".")[1], on_error="skip")
        else:
            items = {"path": str(path), "columns": {"title": "title"}}
            read(tmp_path / f"s{number}", log, items=items, on_error="skip")

    use(0)
    for place in range(12, len(whole), len(whole) // 8):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"is damaged|is truncated|is not text|not UTF-8"):
            use(place)


def test_a_flipped_bit_of_a_parquet_file_never_ends_in_a_traceback(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "whole.parquet", compression="none")
    whole, rng, found = (tmp_path / "whole.parquet").read_bytes(), random.Random(1), 0
    for number in range(12):
        damaged = bytearray(whole)
        damaged[rng.randrange(4, len(whole) // 2)] ^= 1 << rng.randrange(8)
        (tmp_path / "log.parquet").write_bytes(damaged)
        try:
            read(tmp_path / f"s{number}", tmp_path / "log.parquet", "parquet")
        except DataError:
            found += 1
    assert found


def test_line_ends_may_be_mixed(tmp_path: Path) -> None:
    ends = ["\n", "\r\n", "\r"]
    lines = ["user,item,time", *(",".join(map(str, row)) for row in LOG)]
    for kinds in (ends[:2], ends[:1], ends[1:2], ends[2:], ends, ends[1:]):
        name = "-".join(str(ends.index(end)) for end in kinds)
        path = tmp_path / f"{name}.csv"
        path.write_bytes("".join(line + kinds[k % len(kinds)] for k, line in enumerate(lines)).encode())
        assert histories(read(tmp_path / name, path)[0]) == expected()
    path = write_json_lines(tmp_path / "log.jsonl", ROWS)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r"))
    assert histories(read(tmp_path / "json", path, "jsonl")[0]) == expected()


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_line_beyond_measure_is_named_and_can_be_left_out(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "LONGEST", 10_000)
    path, long = tmp_path / f"log.{kind}", "x" * 50_000
    if kind == "csv":
        write_log(path, [*LOG, (long, "i1", T)])
    else:
        write_json_lines(path, [*ROWS, {"user": long, "item": "i1", "time": T}])
    refused(tmp_path / "no", rf"log\.{kind}: line 6\d has more than .* characters", path, kind)
    stream, _ = read(tmp_path / "s", path, kind, on_error="skip")
    assert (histories(stream), stream.manifest["skipped"]) == (expected(), 1)


def test_a_field_of_some_megabytes_is_read(tmp_path: Path) -> None:
    path = write_log(tmp_path / "log.csv", [*((*row, "") for row in LOG), ("u0", "i0", T, "x" * 3_000_000)])
    path.write_text(path.read_text().replace("user,item,time", "user,item,time,note", 1))
    assert read(tmp_path / "s", path)[0].manifest["funnel"][0]["events"] == 61


def test_objects_that_run_on_or_share_a_line_are_no_json_lines(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "log.jsonl", ROWS)
    two = json.dumps(ROWS[0])
    path.write_text(
        path.read_text() + two + two + "\n" + "\n5\n[1]\nnull\n" + '{"user":\n"u"}\n' + '{"user": NaN}\n'
    )
    refused(tmp_path / "no", r"log\.jsonl: line 61 is not valid JSON", path, "jsonl")
    stream, _ = read(tmp_path / "s", path, "jsonl", on_error="skip")
    assert (histories(stream), stream.manifest["skipped"]) == (expected(), 7)


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


# -- what is the matter --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"path": ""}, r"data\.path: .*at least 1 character"),
        ({"items": {"path": ""}}, r"data\.items\.path: .*at least 1 character"),
        ({"columns": {"user": "item"}}, "one column for two fields: user 'item', item 'item'"),
        ({"time_format": "%Q"}, r"data\.time_format: '%Q' is not a valid time pattern"),
        ({"time_format": "%"}, r"data\.time_format: '%' is not a valid time pattern"),
        ({"path": "~nobody_of_this_name/log.csv"}, "~ and an unknown user name"),
    ],
)
def test_a_key_of_the_data_that_means_nothing_is_named(
    tmp_path: Path, peso: Any, data: dict[str, Any], message: str
) -> None:
    write_log(tmp_path / "log.csv", LOG)
    tree = {"data": {"format": "csv", "path": "log.csv", "stages": 1, **data}}
    (tmp_path / "c.yaml").write_text(json.dumps(tree))
    status, _, said = peso("ingest", tmp_path / "c.yaml", "-w", tmp_path / "w")
    assert status == 1
    assert re.search(message, said), said
    assert not (tmp_path / "w").exists()


def test_a_json_array_is_named(tmp_path: Path) -> None:
    (tmp_path / "log.json").write_text(json.dumps(ROWS, indent=1))
    refused(
        tmp_path / "s", r"log\.json is a JSON array; convert it to JSON lines", tmp_path / "log.json", "jsonl"
    )
    for name, start in (("a.csv", "["), ("b.csv", "")):  # under the name of another format
        (tmp_path / name).write_text(start + "\n".join(map(json.dumps, ROWS)))
        refused(tmp_path / name[0], "looks like JSON.* set --format jsonl", tmp_path / name)


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (
            gzip.compress(b"user,item,time\n", mtime=0),
            "is a gzip file: rename it to end in .gz|was compressed twice with gzip: decompress it once",
        ),
        (b"PK\x03\x04....", "is a zip archive"),
        (b"PAR1....", "is a Parquet file"),
        (b"BZh91AY", "is a bzip2 file"),
    ],
    ids=["gzip", "zip", "parquet", "bzip2"],
)
@pytest.mark.parametrize("name", ["log.csv", "log.csv.gz", "log.jsonl"])
def test_what_is_not_text_is_named(tmp_path: Path, start: bytes, what: str, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(start) if name.endswith(".gz") else start)
    kind = name.split(".")[1]
    refused(tmp_path / "s", what, tmp_path / name, kind)
    (tmp_path / "users").with_suffix(f".{kind}").write_bytes(start)
    with pytest.raises(DataError, match=what):
        read_user_table((tmp_path / "users").with_suffix(f".{kind}"))


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"user,item,time\n", "is not a Parquet file: set the right format"),
        (gzip.compress(b"PAR1"), "is a gzip file: decompress it"),
        (b"PK\x03\x04....", "is a zip archive"),
    ],
    ids=["csv", "gzip", "zip"],
)
def test_what_is_not_parquet_is_named(tmp_path: Path, start: bytes, what: str) -> None:
    for name in ("log.parquet", "log.parquet.gz"):
        (tmp_path / name).write_bytes(start)
        refused(tmp_path / "s" / name, what, tmp_path / name, "parquet")


def test_an_unknown_ending_is_said(tmp_path: Path) -> None:
    (tmp_path / "log.xlsx").write_bytes(b"PK\x03\x04")
    with pytest.raises(DataError, match=r"log\.xlsx is a zip archive \(or a spreadsheet\): .*export it"):
        format_of(str(tmp_path / "log.xlsx"))
    (tmp_path / "log.text").write_text("user,item,time\n")
    with pytest.raises(ConfigError, match=r"the format of .*log\.text cannot be recognized .*--format csv"):
        format_of(str(tmp_path / "log.text"))
    (tmp_path / ".hidden.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match="no file or folder at"):
        format_of(str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match="no file of a known format"):
        format_of(str(tmp_path))
    write_log(tmp_path / "log.csv", LOG)
    assert format_of(str(tmp_path)) == "csv"
    (tmp_path / "x.all.block_0.json").write_text("{}")
    assert format_of(str(tmp_path)) == "peso-release"


def test_a_first_call_that_fails_leaves_nothing(
    tmp_path: Path, peso: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_log(tmp_path / "log.csv", LOG)
    (tmp_path / "bad.csv.gz").write_bytes(gzip.compress(path.read_bytes())[:-3] + b"xyz")
    for source in (tmp_path / "bad.csv.gz", tmp_path / "gone.csv"):
        status, _, error = peso("ingest", source, "-w", tmp_path / "w")
        assert status == 1
        assert source.name in error
        assert not (tmp_path / "w").exists()
    monkeypatch.setattr("peso.events.ingest.order_by_time", lambda _: 1 / 0)
    assert peso("ingest", path, "-w", tmp_path / "w")[0] == 1
    assert not (tmp_path / "w").exists()


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


def test_a_key_twice_in_one_record_is_named_and_can_be_left_out(tmp_path: Path) -> None:
    lines_ = [json.dumps(row) for row in ROWS]
    lines_.insert(5, '{"user": "u1", "item": "i1", "time": 1600000301, "item": "i2"}')
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(lines_))
    refused(tmp_path / "s", "line 6 has the key 'item' twice", path, "jsonl")
    stream, _ = read(tmp_path / "t", path, "jsonl", on_error="skip")
    assert histories(stream) == expected()
    assert stream.manifest["skipped"] == 1
    # the same words as a value, or deeper down, are not that
    odd = [{**row, "note": "item", "more": {"item": 1}} for row in ROWS]
    assert histories(read(tmp_path / "u", write_json_lines(path, odd), "jsonl")[0]) == expected()


def test_a_key_written_with_escapes_is_that_key(tmp_path: Path) -> None:
    lines_ = [json.dumps({**row, "title": 'caf\u00e9: "x" \\u0041'}) for row in ROWS]
    path = tmp_path / "log.jsonl"
    lines_[5] = lines_[5].replace('"user"', r'"\u0075ser"')
    path.write_text("\n".join(lines_))
    assert histories(read(tmp_path / "s", path, "jsonl")[0]) == expected()
    lines_.insert(6, r'{"user": "u1", "\u0075ser": "u2", "item": "i1", "time": 1600000301}')
    path.write_text("\n".join(lines_))
    refused(tmp_path / "t", "line 7 has the key 'user' twice", path, "jsonl")
    stream, _ = read(tmp_path / "u", path, "jsonl", on_error="skip")
    assert (histories(stream), stream.manifest["skipped"]) == (expected(), 1)


def test_a_separator_at_the_end_of_a_line_is_none_wherever_it_is_read(tmp_path: Path) -> None:
    path = write_log(tmp_path / "log.csv", [(*row, "") for row in LOG])
    assert histories(read(tmp_path / "s", path)[0]) == expected()
    text = path.read_text()
    path.write_text(text.replace("u0", '"u0"'))
    assert histories(read(tmp_path / "t", path)[0]) == expected()
    path.write_text(text.replace(",\n", ',""\n', 1))  # read line by line now
    assert histories(read(tmp_path / "u", path)[0]) == expected()


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_quotes_around_whole_fields_need_no_reading_line_by_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    rows = [("user", "item", "time"), *((f"{user}, {user}", item, time) for user, item, time in LOG)]
    path = tmp_path / "log.csv"
    path.write_text("".join(",".join(f'"{field}"' for field in row) + end for row in rows), newline="")
    by_line = []
    stage = reading.Reading._stage
    monkeypatch.setattr(reading.Reading, "_stage", lambda self: (by_line.append(1), stage(self)))
    found = histories(read(tmp_path / "s", path)[0])
    assert found == [{f"{user}, {user}": had for user, had in part.items()} for part in expected()]
    assert not by_line
    path.write_text(path.read_text() + '"a ""b""","i1",1\n')
    read(tmp_path / "t", path)
    assert by_line


@pytest.mark.parametrize(
    "row",
    ['"a ""b"",i,1', '"a"b,i,1', 'a"b"c,i,1', '"a\nb",i,1', '"",i,1', '"a,i,1', '"a, "b",i,1', 'a",i,"1'],
)
def test_other_quotes_are_read_line_by_line(tmp_path: Path, row: str) -> None:
    path = tmp_path / "log.csv"
    for text, rows in ((f"user,item,time\nu,i,1\n{row}\n", None), ('user,item,time\n"u",i,"1"\n', 1)):
        path.write_text(text)
        assert count_plain_rows(path, Dialect(",", header=True)) == rows


def test_nan_of_json_is_no_id(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({**row, "user": float("nan")}) + "\n" for row in ROWS[:2]))
    refused(tmp_path / "s", "row 1 .* has no user", path, "jsonl")


def test_utf_16_without_a_mark_ends_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_bytes("user,item,time\nu,i,1\n".encode("utf-16-le"))
    refused(tmp_path / "s", "does not begin like UTF-16", tmp_path / "log.csv", encoding="utf-16")


@pytest.mark.parametrize("separator", ["|", r"\t"])
def test_separators_as_people_type_them(tmp_path: Path, separator: str) -> None:
    written = separator.replace(r"\t", "\t")
    path = tmp_path / "log.csv"
    path.write_text("".join(written.join(map(str, row)) + "\n" for row in [("user", "item", "time"), *LOG]))
    data = {"format": "csv", "path": str(path), "stages": 1}
    given = load_config({"data": data}, [f"data.separator={separator}"], base=Path()).data
    (tmp_path / "s").mkdir()
    ingest(given, tmp_path / "s")
    assert histories(Stream.open(tmp_path / "s")) == expected()


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


def test_a_product_table_is_of_the_kind_that_its_ending_says(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv", LOG)
    products = tmp_path / "p.jsonl"
    rows = [{"item": f"i{k}", "title": "nan" if k == 3 else f"t{k}"} for k in [*range(10), 9]]
    items = {"path": str(write_json_lines(products, rows)), "columns": {"title": "title"}}
    stream, said = read(tmp_path / "s", log, items=items)
    assert stream.items["title"].null_count == 0
    assert "the title of 1 rows is 'nan'" in said
    assert "1 rows of the product table repeat an item" in said
    refused(tmp_path / "t", "check data.items.path", log, items={**items, "path": str(tmp_path / "no.csv")})
