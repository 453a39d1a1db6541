"""An append that cannot go on is refused, and what a product table says wrongly can be corrected."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from event_logs import write_log
from growing_shop import (
    EVENTS,
    NEW_ITEMS,
    PRODUCTS,
    SHELVES,
    WEEK,
    T,
    codes,
    snapshot,
    table,
)

from peso.events.stream import Stream
from peso.items.semantic_ids import read_semantic_ids, write_release_index
from peso.runs import pipeline, preparation
from peso.runs.workspace import Workspace


def refused(peso, week: Path, root: Path) -> str:
    """What an append says that is refused and changes nothing."""
    before = snapshot(root)
    status, _, err = peso("ingest", week, "--append", "-w", root)
    assert status == 1
    assert "nothing was appended" in err
    assert snapshot(root) == before
    return err


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("reports")]


# -- an append that could not be tokenized is not committed -------------------------------------------


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            [(name, "x", "" if name == "n2" else SHELVES[0]) for name in NEW_ITEMS],
            "item 'n2' has the category None",
        ),
        ([(name, "x", "Home") for name in NEW_ITEMS], "depth 1"),
        ([], "item 'n0' has the category None"),
    ],
)
def test_new_items_that_cannot_get_an_id_are_refused_with_their_append(
    peso, logs: Path, shelves: Path, tmp_path: Path, rows: list, words: str
) -> None:
    before, products = snapshot(shelves), table(tmp_path / "p.csv", rows or [("other", "x", SHELVES[0])])
    status, _, err = peso("ingest", logs / "week.csv", "--append", "--items", products, "-w", shelves)
    assert status == 1
    assert "nothing was appended" in err
    assert words in err
    assert snapshot(shelves) == before
    assert peso("ingest", logs / "week.csv", "--append", "-w", shelves)[0] == 0
    assert peso("tokenize", "--append", "-w", shelves)[0] == 0


def test_a_full_category_is_refused_with_advice_that_exists(peso, shelves: Path, tmp_path: Path) -> None:
    """20 items fill 10 codes of each leaf, which has 20: of 11 more items in one leaf one is too many."""
    names = [f"x{k}" for k in range(11)]
    week = write_log(tmp_path / "w.csv", [(f"u{k % 3}", names[k % 11], T + 10**7 + k) for k in range(33)])
    full = table(tmp_path / "full.csv", [(name, "x", SHELVES[0]) for name in names])
    before = snapshot(shelves)
    status, _, err = peso("ingest", week, "--append", "--items", full, "-w", shelves)
    assert status == 1
    assert "21 items in 'Home > Garden' do not fit into the 20 codes of level 3" in err
    assert "other categories in the product table" in err
    assert "limit" not in err
    assert snapshot(shelves) == before
    spread = table(tmp_path / "spread.csv", [(name, "x", SHELVES[k % 2]) for k, name in enumerate(names)])
    assert peso("ingest", week, "--append", "--items", spread, "-w", shelves)[0] == 0
    assert peso("tokenize", "--append", "-w", shelves)[0] == 0


def test_an_imported_index_without_the_new_items_refuses_the_append(
    peso, logs: Path, shelves: Path, tmp_path: Path
) -> None:
    index, root = tmp_path / "index.json", tmp_path / "w"
    write_release_index(read_semantic_ids(shelves / "semantic_ids"), index)
    assert peso("ingest", logs / "category.yaml", "-w", root, "--set", f"items.index={index}")[0] == 0
    assert peso("tokenize", "-w", root)[0] == 0
    assert "'n0'" in refused(peso, logs / "week.csv", root)
    known = json.loads(index.read_text())
    index.write_text(
        json.dumps(known | {name: ["<a_0>", "<b_0>", f"<c_{9 - k}>"] for k, name in enumerate(NEW_ITEMS)})
    )
    assert peso("ingest", logs / "week.csv", "--append", "-w", root)[0] == 0
    assert peso("tokenize", "--append", "-w", root)[0] == 0


def test_vectors_that_do_not_cover_the_new_items_are_noticed_at_the_append(
    peso, logs: Path, tmp_path: Path
) -> None:
    vectors, root = tmp_path / "v.npy", tmp_path / "w"
    np.save(vectors, np.random.default_rng(0).normal(size=(20, 4)))
    items = [
        "--set",
        "items={encoder: vectors, quantizer: rq-kmeans, levels: 2, codes: 8, vectors: ["
        + str(vectors)
        + "]}",
    ]
    assert peso("ingest", logs / "trained.yaml", "-w", root, *items)[0] == 0
    assert peso("tokenize", "-w", root)[0] == 0
    assert "20 rows for 24 items" in refused(peso, logs / "week.csv", root)
    vectors.with_name("v.ids.txt").write_text("\n".join(Stream.open(root / "stream").item_ids))
    status, _, err = peso("ingest", logs / "week.csv", "--append", "-w", root)
    assert status == 0
    assert "no vector for 4 of 24 items" in err


@pytest.mark.parametrize("cure", ["items", "undo"])
def test_a_workspace_that_is_stuck_gets_free(
    peso, logs: Path, shelves: Path, tmp_path: Path, monkeypatch, cure: str
) -> None:
    """As an earlier version left it: appended, and its items without a category."""
    before = snapshot(shelves)
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "_continue_ids", lambda *_: None)
        bare = logs / "old_products.csv"
        assert peso("ingest", logs / "week.csv", "--append", "--items", bare, "-w", shelves)[0] == 0
    status, _, err = peso("tokenize", "--append", "-w", shelves)
    assert status == 1
    assert f"peso ingest --items FILE -w {shelves}" in err
    assert f"peso undo -w {shelves}" in err
    if cure == "undo":
        assert peso("undo", "--yes", "-w", shelves)[0] == 0
        assert snapshot(shelves) == before
        return
    status, _, err = peso("ingest", "--items", logs / "products.csv", "-w", shelves)
    assert status == 0, err
    assert f"next: peso tokenize --append -w {shelves}" in err
    assert peso("tokenize", "--append", "-w", shelves)[0] == 0
    assert set(NEW_ITEMS) <= set(codes(shelves))


# -- the product table is corrected ------------------------------------------------------------------


def test_known_items_get_new_texts_and_keep_their_codes(
    peso, logs: Path, shelves: Path, tmp_path: Path
) -> None:
    """Also those whose category moves: what comes later into their old category is coded as before."""
    before, ids = codes(shelves), snapshot(shelves, "stream/", "config.yaml")
    moved = table(
        tmp_path / "moved.csv",
        [("i0", "renamed", SHELVES[1]), ("i1", "", ""), ("i2", "", SHELVES[1]), ("ghost", "x", SHELVES[0])],
    )
    status, out, err = peso("ingest", "--items", moved, "-w", shelves, "--json")
    assert status == 0, err
    done = json.loads(out)
    assert [done[key] for key in ("rows", "items_found", "changed", "titles", "texts", "categories")] == [
        4,
        3,
        2,
        1,
        0,
        2,
    ]
    stream = Stream.open(shelves / "stream")
    assert dict(zip(stream.item_ids, stream.titles, strict=True))["i0"] == "renamed"
    assert dict(zip(stream.item_ids, stream.titles, strict=True))["i1"] == "thing 1 of 1"  # empty: kept
    assert snapshot(shelves, "stream/", "config.yaml") == ids
    assert peso("ingest", logs / "week.csv", "--append", "-w", shelves)[0] == 0
    assert peso("tokenize", "--append", "-w", shelves)[0] == 0
    after = codes(shelves)
    assert {item: after[item] for item in before} == before
    assert after["n0"][:2] == before["i0"][:2] != before["i1"][:2]  # Garden is what it was
    assert len({tuple(code) for code in after.values()}) == len(after)


def test_categories_can_be_corrected_where_an_earlier_version_made_the_ids(
    peso, logs: Path, shelves: Path, tmp_path: Path
) -> None:
    manifest = shelves / "semantic_ids" / "manifest.json"
    (shelves / "semantic_ids" / "categories.json").unlink()
    content = json.loads(manifest.read_text())
    del content["files"]["categories.json"], content["sha256"]
    manifest.write_text(json.dumps(content))
    before = codes(shelves)
    moved = table(tmp_path / "moved.csv", [(item, "x", "Toys > Small") for item, _, _ in PRODUCTS])
    assert peso("ingest", "--items", moved, "-w", shelves)[0] == 0
    assert peso("ingest", logs / "week.csv", "--append", "-w", shelves)[0] == 0
    assert peso("tokenize", "--append", "-w", shelves)[0] == 0
    after = codes(shelves)
    assert {item: after[item] for item in before} == before
    assert after["n0"][:2] == before["i0"][:2]


def test_trained_stages_stay_valid_when_texts_change(peso, shop: Path, tmp_path: Path) -> None:
    before = snapshot(shop, "stream/items", "stream/manifest")
    renamed = table(tmp_path / "r.csv", [(item, "other words", "") for item, _, _ in PRODUCTS])
    assert peso("ingest", "--items", renamed, "-w", shop)[0] == 0
    assert snapshot(shop, "stream/items", "stream/manifest") == before
    workspace = Workspace.open(shop)
    assert list(pipeline.missing_steps(workspace, 2)) == []
    assert set(Stream.open(shop / "stream").titles) == {"other words"}


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([("0", "x", "y")], [], "none of the 20 items of the stream"),
        ([("i0", "x", "y")], ["--set", "data.items.columns.title=name"], "no column 'name'"),
        ([("i0", "x", "y")], ["--set", "data.items.columns={item: item}"], "give the columns"),
    ],
)
def test_a_product_table_that_corrects_nothing_is_refused(
    peso, shelves: Path, tmp_path: Path, rows: list, options: list[str], words: str
) -> None:
    before = snapshot(shelves)
    status, _, err = peso("ingest", "--items", table(tmp_path / "p.csv", rows), "-w", shelves, *options)
    assert status == 1
    assert words in err
    assert snapshot(shelves) == before
    assert peso("ingest", "--items", tmp_path / "p.csv")[0] == 2  # no workspace


def test_a_forgotten_product_table_is_said_and_can_be_given_later(peso, logs: Path, tmp_path: Path) -> None:
    root = tmp_path / "w"
    status, out, _ = peso("ingest", logs / "log.csv", "-w", root, "--set", "data.stages=2")
    assert status == 0
    assert "no item has a title or text" in out
    columns = ("--set", "data.items.columns={title: title, category: category}")
    assert peso("ingest", "--items", logs / "products.csv", "-w", root, *columns)[0] == 0
    assert "thing 3 of 3" in Stream.open(root / "stream").titles


@pytest.mark.parametrize("name", ["week.jsonl", "week.jsonl.gz", "week.parquet", "folder", "week.tsv"])
def test_new_events_may_come_in_another_format(peso, logs: Path, tmp_path: Path, name: str) -> None:
    """The extension says which; the product table, which has none, stays what it is."""
    (tmp_path / "log.csv").write_text((logs / "log.csv").read_text().replace(",", ";"))
    products = (logs / "products.csv").read_text()
    (tmp_path / "products").write_text(products.replace(",", "|"))
    options = ["--items", tmp_path / "products", "-w", tmp_path / "w"]
    for key in ("stages=1", "separator=;", "quote=''", "items.separator=|", "items.columns.title=title"):
        options += ["--set", f"data.{key}"]
    assert peso("ingest", tmp_path / "log.csv", *options)[0] == 0
    rows = [dict(zip(("user", "item", "time"), row, strict=True)) for row in WEEK]
    path = tmp_path / name
    if "jsonl" in name or name == "folder":
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        if name == "folder":
            path.mkdir()
        (path / "a.jsonl" if name == "folder" else path).write_bytes(
            gzip.compress(text) if name.endswith(".gz") else text
        )
    elif name == "week.parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text((logs / "week.csv").read_text().replace(",", "\t"))
    more = ["--set", "data.separator=null"] if name == "week.tsv" else []
    status, out, err = peso("ingest", path, "--append", *more, "-w", tmp_path / "w")
    assert status == 0, err
    assert "appended: 60 events" in out
    stream = Stream.open(tmp_path / "w" / "stream")
    assert stream.titles[-4:] == [f"new {item}" for item in stream.item_ids[-4:]]
    assert Workspace.open(tmp_path / "w").config.data.format == "csv"


# -- what is printed, and configurations as source ---------------------------------------------------


def test_an_append_says_what_came_in_and_what_to_do_next(peso, logs: Path, shelves: Path) -> None:
    status, out, err = peso("ingest", logs / "week.csv", "--append", "-w", shelves)
    assert status == 0
    assert "appended: 60 events of 14 users (2 new) as stage 2; 4 new items" in out
    assert "warning" not in out
    assert f"next: peso tokenize --append -w {shelves}" in err
    assert peso("tokenize", "--append", "-w", shelves)[0] == 0
    known = write_log(logs / "known.csv", [(f"u{k % 3}", f"i{k}", T + 10**7 + k) for k in range(12)])
    status, out, _ = peso("ingest", known, "--append", "-w", shelves, "--json")
    assert status == 0
    told = json.loads(out)
    assert told["next"] == f"peso train -w {shelves}"
    brought = told["appended"][-1]
    keys = ("events", "users", "new_users", "new_items", "new_items_without_text")
    assert [brought[key] for key in keys] == [12, 3, 0, 0, 0]


def test_the_next_command_can_be_copied_where_a_path_has_a_space(
    peso, logs: Path, shelves: Path, tmp_path: Path
) -> None:
    spaced = shutil.copytree(shelves, tmp_path / "my shop")
    status, _, err = peso("ingest", logs / "week.csv", "--append", "-w", spaced)
    assert status == 0
    assert f"next: peso tokenize --append -w '{spaced}'" in err
    assert peso("undo", "--yes", "-w", spaced)[0] == 0
    _, out, _ = peso("ingest", logs / "week.csv", "--append", "-w", spaced, "--json")
    assert json.loads(out)["next"] == f"peso tokenize --append -w '{spaced}'"


def test_new_items_without_text_are_said_loudly(peso, logs: Path, shop: Path) -> None:
    status, out, _ = peso(
        "ingest", logs / "week.csv", "--append", "--items", logs / "old_products.csv", "-w", shop
    )
    assert status == 0
    assert "warning: new items without a title and a text: 4" in out
    assert f"peso ingest --items FILE -w {shop}" in out
    assert peso("ingest", "--items", logs / "products.csv", "-w", shop)[0] == 0
    assert peso("tokenize", "--append", "-w", shop)[0] == 0
    stages = json.loads((shop / "semantic_ids" / "manifest.json").read_text())["fitness"]["stages"]
    assert stages[-1]["without_vector"] == 0


@pytest.mark.parametrize("repeats", ["keep", "drop"])
def test_a_repeated_append_is_called_that(peso, shelves: Path, tmp_path: Path, repeats: str) -> None:
    again = write_log(tmp_path / "again.csv", EVENTS[-1:])
    status, _, err = peso("ingest", again, "--append", "-w", shelves, "--set", f"data.repeats={repeats}")
    assert status == 1
    assert "no new events" in err
    assert "min_rating" not in err


def test_a_configuration_is_a_source(peso, logs: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert peso("ingest", logs / "category.yaml", "--set", "data.stages=3")[0] == 0
    root = tmp_path / "runs" / "category"
    assert Stream.open(root / "stream").stages == 3
    assert peso("tokenize", "-w", root)[0] == 0
    assert Workspace.open(root).config.items.quantizer == "category-path"
    for further in (("--append", "-w", root), ("--format", "csv", "-w", root)):
        status, _, err = peso("ingest", logs / "category.yaml", *further)
        assert status == 2
        assert "is a configuration" in err
