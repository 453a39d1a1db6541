"""Files of logs and products that were read wrongly in silence, or that ended in a traceback."""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from event_logs import histories, write_json_lines, write_log
from odd_logs import LOG, ROWS, T, expected, read, refused

from peso.config import load_config
from peso.errors import ConfigError, DataError
from peso.events.ingest import ingest
from peso.events.sources import lines, reading
from peso.events.sources.files import format_of
from peso.events.sources.lines import Dialect, count_plain_rows
from peso.events.stream import Stream
from peso.runs.report import read_user_table

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
    limit = csv.field_size_limit()
    stream, _ = read(tmp_path / "s", path)
    assert histories(stream) == expected()
    assert stream.manifest["skipped"] == 0
    assert csv.field_size_limit() == limit  # of the whole process


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


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-8"])
@pytest.mark.parametrize("name", ["log.csv", "log.csv.gz"])
def test_utf_16_without_a_mark_ends_in_a_sentence(tmp_path: Path, encoding: str, name: str) -> None:
    content = "user,item,time\nu,i,1\n".encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    refused(tmp_path / "s", "does not begin like UTF-16", tmp_path / name, encoding="utf-16")


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
