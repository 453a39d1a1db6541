"""Every source gives the same stream, whatever the container: own files and the well-known data sets."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from event_logs import histories, ingested, write_json_lines, write_log

from peso.config import load_config
from peso.errors import DataError
from peso.events import columns
from peso.events.sources.files import find_files, kind_of
from peso.events.stream import Stream
from peso.events.times import iso

T = 1_600_000_000
LOG = [(f"u{k % 4}", f"i{k % 6}", T + k * 60, k % 5 + 1) for k in range(48)]
FIELDS = ("user", "item", "time", "rating")


def rows(names: tuple[str, ...] = FIELDS) -> list[dict[str, Any]]:
    return [dict(zip(names, event, strict=True)) for event in LOG]


def delimited(separator: str, header: bool = True) -> str:
    lines = [FIELDS, *LOG] if header else LOG
    return "".join(separator.join(map(str, line)) + "\n" for line in lines)


def item_rows(stream: Stream) -> dict[str, dict[str, Any]]:
    return {row[columns.ITEM_ID]: row for row in stream.items.to_pylist()}


@pytest.fixture
def reference(tmp_path: Path) -> list[dict[str, tuple[list[str], list[str]]]]:
    path = write_log(tmp_path / "reference.csv", LOG, "user,item,time,rating")
    return histories(ingested(tmp_path / "reference", format="csv", path=str(path), stages=3))


def csv(folder: Path) -> dict[str, Any]:
    (folder / "log.csv").write_text(delimited(","))
    return {"format": "csv", "path": folder / "log.csv"}


def tsv_gz(folder: Path) -> dict[str, Any]:
    (folder / "log.tsv.gz").write_bytes(gzip.compress(delimited("\t").encode()))
    return {"format": "csv", "path": folder / "log.tsv.gz"}


def semicolons(folder: Path) -> dict[str, Any]:
    (folder / "log.txt").write_text(delimited(";"))
    return {"format": "csv", "path": folder / "log.txt", "separator": ";"}


def double_colons_without_header(folder: Path) -> dict[str, Any]:
    (folder / "log.dat").write_text(delimited("::", header=False))
    return {"format": "csv", "path": folder / "log.dat", "columns": {"user": 1, "item": 2, "time": 3}}


def windows_text(folder: Path) -> dict[str, Any]:
    (folder / "log.csv").write_bytes(b"\xef\xbb\xbf" + delimited(",").replace("\n", "\r\n").encode())
    return {"format": "csv", "path": folder / "log.csv"}


def utf_16(folder: Path) -> dict[str, Any]:
    (folder / "log.csv").write_text(delimited(","), encoding="utf-16")
    return {"format": "csv", "path": folder / "log.csv", "encoding": "utf-16"}


def folder_of_csv(folder: Path) -> dict[str, Any]:
    lines = delimited(",").splitlines(keepends=True)
    (folder / "2020").mkdir()
    (folder / "2020" / "a.csv").write_text("".join([lines[0], *lines[1:20]]))
    (folder / "2020" / "b.csv.gz").write_bytes(gzip.compress("".join([lines[0], *lines[20:]]).encode()))
    (folder / "README.md").write_text("not a log")
    return {"format": "csv", "path": folder}


def glob_of_jsonl(folder: Path) -> dict[str, Any]:
    write_json_lines(folder / "part-1.jsonl", rows()[:30])
    write_json_lines(folder / "part-2.jsonl", rows()[30:])
    return {"format": "jsonl", "path": folder / "part-*.jsonl"}


def jsonl_gz_other_names(folder: Path) -> dict[str, Any]:
    records = "".join(json.dumps(row) + "\n" for row in rows(("who", "what", "when", "stars")))
    (folder / "log.jsonl.gz").write_bytes(gzip.compress(records.encode()))
    return {
        "format": "jsonl",
        "path": folder / "log.jsonl.gz",
        "columns": {"user": "who", "item": "what", "time": "when"},
    }


def parquet(folder: Path) -> dict[str, Any]:
    pq.write_table(pa.Table.from_pylist(rows()), folder / "log.parquet")
    return {"format": "parquet", "path": folder / "log.parquet"}


def parquet_with_timestamps(folder: Path) -> dict[str, Any]:
    table = pa.Table.from_pylist(rows())
    times = table["time"].cast(pa.timestamp("s"))
    table = table.set_column(2, "time", times).rename_columns(["user", "item", "time stamp", "rating"])
    pq.write_table(table.slice(0, 20), folder / "1.parquet")
    pq.write_table(table.slice(20), folder / "2.parquet")
    return {"format": "parquet", "path": folder, "columns": {"time": "time stamp"}}


CONTAINERS: list[Callable[[Path], dict[str, Any]]] = [
    csv,
    tsv_gz,
    semicolons,
    double_colons_without_header,
    windows_text,
    utf_16,
    folder_of_csv,
    glob_of_jsonl,
    jsonl_gz_other_names,
    parquet,
    parquet_with_timestamps,
]


@pytest.mark.slow
@pytest.mark.parametrize("container", CONTAINERS, ids=lambda c: c.__name__)
def test_a_log_is_the_same_in_every_container(
    container: Callable[[Path], dict[str, Any]], tmp_path: Path, reference: object
) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    data = container(folder)
    stream = ingested(tmp_path / "s", **{**data, "path": str(data["path"])}, stages=3)
    assert histories(stream) == reference


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("log.csv", "csv"),
        ("log.TSV.gz", "csv"),
        ("logs/*.jsonl", "jsonl"),
        ("a.parquet", "parquet"),
        ("a", None),
    ],
)
def test_a_file_s_ending_tells_its_kind(path: str, kind: str | None) -> None:
    assert kind_of(path) == kind


def test_numbers_as_ids_are_their_text(tmp_path: Path) -> None:
    table = pa.table({"user": [7] * 4, "item": [3, 1, 2, 3], "time": [1, 2, 3, 4]})
    pq.write_table(table, tmp_path / "log.parquet")
    stream = ingested(tmp_path / "s", format="parquet", path=str(tmp_path / "log.parquet"), stages=1)
    assert histories(stream) == [{"7": ([], ["3", "1", "2", "3"])}]


ITEMS = [
    {"id": "i0", "name": "Lamp, blue", "about": ["bright", "cheap"], "path": ["Home", "Light"]},
    {"id": "i1", "name": 'The "best"', "about": [], "path": ["Home"]},
    {"id": "i1", "name": "said twice", "about": ["no"], "path": ["Elsewhere"]},
    {"id": "i2", "name": None, "about": None, "path": None},
    {"id": "unsold", "name": "Nobody's", "about": ["x"], "path": ["y"]},
]


def test_the_product_table_joins_the_items_that_were_sold(tmp_path: Path) -> None:
    csv(tmp_path)
    write_json_lines(tmp_path / "products.jsonl", ITEMS)
    stream = ingested(
        tmp_path / "s",
        format="csv",
        path=str(tmp_path / "log.csv"),
        items={
            "path": str(tmp_path / "products.jsonl"),
            "format": "jsonl",
            "columns": {"item": "id", "title": "name", "text": "about", "category": "path"},
        },
        stages=1,
    )
    told = item_rows(stream)
    assert list(told) == [f"i{k}" for k in range(6)]
    assert told["i0"] == {
        "item_id": "i0",
        "title": "Lamp, blue",
        "text": "bright\ncheap",
        "category": "Home > Light",
    }
    assert (told["i1"]["title"], told["i1"]["text"]) == ('The "best"', None)
    assert told["i2"] == told["i5"] | {"item_id": "i2"}
    assert told["i5"] == {"item_id": "i5", "title": None, "text": None, "category": None}
    assert stream.manifest["repeated_rows_of_items"] == 1
    assert stream.manifest["items_without_title"] == 4


def test_of_an_item_that_stands_twice_the_first_row_is_taken_however_long_the_table(tmp_path: Path) -> None:
    csv(tmp_path)
    lines = [f"i{k % 6},row {k},{'x' * 40}" for k in range(200_000)]
    (tmp_path / "items.csv").write_text("\n".join(["item,name,more", *lines]))
    stream = ingested(
        tmp_path / "s",
        format="csv",
        path=str(tmp_path / "log.csv"),
        items={"path": str(tmp_path / "items.csv"), "columns": {"title": "name"}},
        stages=1,
    )
    assert {item: row["title"] for item, row in item_rows(stream).items()} == {
        f"i{k}": f"row {k}" for k in range(6)
    }
    assert stream.manifest["repeated_rows_of_items"] == 199_994


def test_a_product_table_in_parquet_or_csv_reads_alike(tmp_path: Path) -> None:
    csv(tmp_path)
    flat = [{"id": f"i{k}", "name": f"Name {k}", "brand": "B" if k else "", "more": "x"} for k in range(6)]
    pq.write_table(pa.Table.from_pylist(flat), tmp_path / "items.parquet")
    duckdb.execute(f"COPY (FROM '{tmp_path}/items.parquet') TO '{tmp_path}/items.csv'")
    streams = [
        ingested(
            tmp_path / kind,
            format="csv",
            path=str(tmp_path / "log.csv"),
            items={
                "path": str(tmp_path / f"items.{kind}"),
                "format": kind,
                "columns": {"item": "id", "title": "name", "text": ["brand", "more"]},
            },
            stages=1,
        )
        for kind in ("csv", "parquet")
    ]
    assert item_rows(streams[0])["i1"]["text"] == item_rows(streams[1])["i1"]["text"] == "B\nx"
    assert streams[0].titles == streams[1].titles == [f"Name {k}" for k in range(6)]


def test_names_of_files_and_folders_that_exist_are_not_patterns(tmp_path: Path, reference: object) -> None:
    home = tmp_path / "shop [new]" / "logs*"
    home.mkdir(parents=True)
    log = write_log(home / "a[b].csv", LOG, "user,item,time,rating")
    (home / "b.csv").write_text("another,table\n")
    (home.parent / "c.yaml").write_text("data: {format: csv, path: 'logs*/a*.csv', stages: 3}\n")
    configured = load_config(home.parent / "c.yaml").data.path
    for number, path in enumerate((str(log), f"{home}/a*.csv", f"{home}/[a]*", configured)):
        assert histories(ingested(tmp_path / f"s{number}", format="csv", path=path, stages=3)) == reference
    with pytest.raises(DataError, match=r"no file matches .*a\[c\]\.csv; check data.path"):
        find_files(f"{home}/a[c].csv", "csv")
    with pytest.raises(DataError, match=r"there is no file at none\.csv; check data.path"):
        find_files("none.csv", "csv")


# -- well-known data sets, in miniature --------------------------------------------------------------


def test_amazon_2023_reviews_and_metadata(tmp_path: Path, reference: object) -> None:
    folder = tmp_path / "amazon"
    folder.mkdir()
    reviews = [
        {"rating": float(r), "title": "t", "asin": "variant", "parent_asin": i, "user_id": u,
         "timestamp": t * 1000, "verified_purchase": True}
        for u, i, t, r in LOG
    ]  # fmt: skip
    meta = [
        {"main_category": "Games", "title": "Zelda", "features": ["big"], "description": ["long", "tale"],
         "categories": ["Games", "Switch"], "parent_asin": "i3", "price": 5.0, "details": {"a": "b"}},
        {"main_category": "Games", "title": "", "features": [], "description": [], "categories": [],
         "parent_asin": "i4", "price": None, "details": {}},
    ]  # fmt: skip
    for name, records in (("Video_Games", reviews), ("meta_Video_Games", meta)):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    stream = ingested(tmp_path / "s", format="amazon-2023", path=str(folder), stages=3)
    assert histories(stream) == reference
    assert stream.manifest["time"]["recognised"] == "milliseconds"
    told = item_rows(stream)
    assert told["i3"] == {
        "item_id": "i3", "title": "Zelda", "text": "big\nlong\ntale", "category": "Games > Switch"
    }  # fmt: skip
    assert told["i4"] == {"item_id": "i4", "title": None, "text": None, "category": None}


def test_amazon_2023_five_core_csv(tmp_path: Path, reference: object) -> None:
    path = write_log(
        tmp_path / "Video_Games.csv",
        [(u, i, float(r), t * 1000) for u, i, t, r in LOG],
        "user_id,parent_asin,rating,timestamp",
    )
    stream = ingested(tmp_path / "s", format="amazon-2023", path=str(path), stages=3)
    assert histories(stream) == reference


def test_movielens_100k(tmp_path: Path, reference: object) -> None:
    folder = tmp_path / "ml-100k"
    folder.mkdir()
    (folder / "u.data").write_text("".join(f"{u}\t{i}\t{r}\t{t}\n" for u, i, t, r in LOG))
    flags = ["0"] * 19
    flags[1] = flags[15] = "1"
    line = "|".join(["i0", "Misérables, Les (1995)", "01-Jan-1995", "", "http://x", *flags])
    (folder / "u.item").write_text(line + "\n", encoding="latin-1")
    stream = ingested(tmp_path / "s", format="movielens", path=str(folder), stages=3)
    assert histories(stream) == reference
    assert item_rows(stream)["i0"]["title"] == "Misérables, Les (1995)"
    assert item_rows(stream)["i0"]["category"] == "Action, Sci-Fi"


def test_movielens_100k_as_peso_pulls_it(tmp_path: Path, reference: object) -> None:
    folder = tmp_path / "ml-100k"
    folder.mkdir()
    (folder / "u.data").write_text("".join(f"{u}\t{i}\t{r}\t{t}\n" for u, i, t, r in LOG))
    (folder / "movies.tsv").write_text(
        'item_id\ttitle\tyear\tgenres\ni0\tToy "Story"\t1995\tAnimation|Comedy\ni1\tunknown\t\tunknown\n'
    )
    stream = ingested(tmp_path / "s", format="movielens", path=str(folder), stages=3)
    assert histories(stream) == reference
    of = item_rows(stream)
    assert (of["i0"]["title"], of["i0"]["category"]) == ('Toy "Story" (1995)', "Animation, Comedy")
    assert of["i1"]["title"] == "unknown"


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
def test_movielens_1m_and_10m(tmp_path: Path, reference: object, encoding: str) -> None:
    folder = tmp_path / "ml-1m"
    folder.mkdir()
    (folder / "ratings.dat").write_text("".join(f"{u}::{i}::{r}::{t}\n" for u, i, t, r in LOG))
    (folder / "movies.dat").write_text('i0::Fantômas "x" (1913)::Crime|Drama\n', encoding=encoding)
    stream = ingested(tmp_path / "s", format="movielens", path=str(folder), stages=3, min_rating=1)
    assert histories(stream) == reference
    assert item_rows(stream)["i0"]["title"] == 'Fantômas "x" (1913)'
    assert item_rows(stream)["i0"]["category"] == "Crime, Drama"


def test_movielens_latest(tmp_path: Path, reference: object) -> None:
    folder = tmp_path / "ml-latest"
    folder.mkdir()
    write_log(folder / "ratings.csv", [(u, i, r, t) for u, i, t, r in LOG], "userId,movieId,rating,timestamp")
    write_log(
        folder / "movies.csv",
        [("i0", '"American President, The (1995)"', "Comedy|Drama"), ("i1", "X", "(no genres listed)")],
        "movieId,title,genres",
    )
    stream = ingested(tmp_path / "s", format="movielens", path=str(folder), stages=3)
    assert histories(stream) == reference
    assert item_rows(stream)["i0"]["title"] == "American President, The (1995)"
    assert (item_rows(stream)["i0"]["category"], item_rows(stream)["i1"]["category"]) == (
        "Comedy, Drama",
        None,
    )


def test_movielens_as_recbole_packs_it(tmp_path: Path, reference: object) -> None:
    folder = tmp_path / "ml-100k"
    folder.mkdir()
    head = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    (folder / "ml-100k.inter").write_text(head + "".join(f"{u}\t{i}\t{r}\t{t}\n" for u, i, t, r in LOG))
    (folder / "ml-100k.item").write_text(
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        "i0\tToy Story\t1995\tAnimation Comedy\n"
    )
    stream = ingested(tmp_path / "s", format="movielens", path=str(folder), stages=3)
    assert histories(stream) == reference
    assert item_rows(stream)["i0"]["category"] == "Animation, Comedy"


def test_yelp(tmp_path: Path, reference: object) -> None:
    folder = tmp_path / "yelp"
    folder.mkdir()
    reviews = [
        {"review_id": str(t), "user_id": u, "business_id": i, "stars": float(r), "text": "ok",
         "date": iso(t * 1_000_000).replace("T", " ").removesuffix("Z")}
        for u, i, t, r in LOG
    ]  # fmt: skip
    write_json_lines(folder / "yelp_academic_dataset_review.json", reviews)
    write_json_lines(
        folder / "yelp_academic_dataset_business.json",
        [
            {"business_id": "i0", "name": "Café", "city": "Tampa", "categories": "Food, Coffee"},
            {"business_id": "i1", "name": "Shop", "city": "Reno", "categories": None},
        ],
    )
    stream = ingested(tmp_path / "s", format="yelp", path=str(folder), stages=3)
    assert histories(stream) == reference
    assert item_rows(stream)["i0"] == {
        "item_id": "i0", "title": "Café", "text": "Tampa", "category": "Food, Coffee"
    }  # fmt: skip
    assert item_rows(stream)["i1"]["category"] is None
