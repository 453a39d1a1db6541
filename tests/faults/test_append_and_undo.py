"""An append that cannot go on is refused, every step can be corrected or taken back, and a kill leaves no
state in between."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from event_logs import write_log

from peso.cli import app as cli
from peso.events.stream import Stream
from peso.items.semantic_ids import read_semantic_ids, write_release_index
from peso.runs import pipeline, preparation
from peso.runs.undo import last_step
from peso.runs.workspace import Workspace
from peso.runtime.files import checksum
from peso.runtime.progress import Silent

pytestmark = pytest.mark.slow

T = 1_600_000_000
EVENTS = [(f"u{k % 12}", f"i{(k * 7 + k // 12) % 20}", T + k * 3600) for k in range(200)]
NEW_ITEMS = [f"n{k}" for k in range(4)]
WEEK = [
    (f"u{k % 14}", NEW_ITEMS[k // 5 % 4] if k % 5 == 0 else f"i{k % 20}", T + (300 + k) * 3600)
    for k in range(60)
]
LATER = [(f"u{k % 12}", "m0" if k % 9 == 0 else f"i{k % 20}", T + (500 + k) * 3600) for k in range(50)]
SHELVES = ("Home > Garden", "Home > Kitchen")
PRODUCTS = [(f"i{k}", f"thing {k} of {k % 5}", SHELVES[k % 2]) for k in range(20)]
FRESH = [(name, f"new {name}", SHELVES[0]) for name in [*NEW_ITEMS, "m0"]]
TRAINED = "items: {quantizer: rq-kmeans, levels: 2, codes: 8}\n"
TWO_STAGES = f"data.stages={{boundaries: [{T + 330 * 3600}]}}"  # of a week
BY_CATEGORY = "items: {quantizer: category-path}\n"


def table(path: Path, rows: list[tuple[str, str, str]]) -> Path:
    return write_log(path, rows, "item,title,category")


@pytest.fixture(scope="module")
def logs(tmp_path_factory) -> Path:
    """A folder with the files of a shop: ``log.csv``, ``products.csv``, then ``week.csv``, ``later.csv``."""
    folder = tmp_path_factory.mktemp("logs")
    write_log(folder / "log.csv", EVENTS)
    write_log(folder / "week.csv", WEEK)
    write_log(folder / "later.csv", LATER)
    table(folder / "products.csv", [*PRODUCTS, *FRESH])
    table(folder / "old_products.csv", PRODUCTS)
    for name, items in (("trained", TRAINED), ("category", BY_CATEGORY)):
        (folder / f"{name}.yaml").write_text(
            "data:\n"
            "  format: csv\n  path: log.csv\n  stages: 2\n"
            "  items: {path: products.csv, columns: {title: title, category: category}}\n"
            f"{items}"
            "backbone: tiny\n"
            "strategy: single\nbaselines: []\n"
            "training: {epochs: 1, max_steps: 2, batch_size: 8}\n"
            "decoding: {beams: 5}\n"
            "evaluation: {k: [5]}\n"
        )
    return folder


def _call(*arguments: str | Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["peso", *map(str, arguments)])
        patch.setattr("peso.runs.report.report", lambda workspaces, directory: None)
        cli.app(standalone_mode=False)


@pytest.fixture(scope="module")
def _trained(logs: Path, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs") / "shop"
    _call("run", logs / "trained.yaml", "-w", root)
    return root


@pytest.fixture(scope="module")
def _by_category(logs: Path, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("category") / "shop"
    _call("ingest", logs / "category.yaml", "-w", root)
    _call("tokenize", "-w", root)
    return root


@pytest.fixture
def shop(_trained: Path, tmp_path: Path) -> Path:
    """A run with two trained stages and codebooks."""
    return shutil.copytree(_trained, tmp_path / "shop")


@pytest.fixture
def shelves(_by_category: Path, tmp_path: Path) -> Path:
    """A workspace with semantic IDs from category paths, nothing trained."""
    return shutil.copytree(_by_category, tmp_path / "shelves")


@pytest.fixture(autouse=True)
def reports(monkeypatch) -> list[list[int]]:
    """The stages in every report that is written, instead of plots."""
    written: list[list[int]] = []

    def report(workspaces: list[Workspace], directory: Path) -> None:
        written.append(workspaces[0].finished_stages)
        directory.mkdir(exist_ok=True)
        (directory / "index.html").write_text(str(written[-1]))

    monkeypatch.setattr("peso.runs.report.report", report)
    return written


def snapshot(root: Path, *but: str) -> dict[str, str]:
    """Checksums of all files that a workspace shows: what is hidden is no part of it."""
    found = {str(path.relative_to(root)): path for path in root.rglob("*") if path.is_file()}
    shown = {name: path for name, path in found.items() if not any(p[0] == "." for p in Path(name).parts)}
    return {name: checksum(path) for name, path in shown.items() if not name.startswith(but)}


def codes(root: Path) -> dict[str, list[int]]:
    ids = read_semantic_ids(root / "semantic_ids")
    return dict(zip(ids.item_ids, ids.codes.tolist(), strict=True))


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
    before = snapshot(root)
    status, _, err = peso("ingest", logs / "week.csv", "--append", "-w", root)
    assert status == 1
    assert "nothing was appended" in err
    assert "'n0'" in err
    assert snapshot(root) == before
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
    before = snapshot(root)
    status, _, err = peso("ingest", logs / "week.csv", "--append", "-w", root)
    assert status == 1
    assert "nothing was appended" in err
    assert "20 rows for 24 items" in err
    assert snapshot(root) == before
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


# -- undo --------------------------------------------------------------------------------------------


def test_an_append_is_taken_back_without_a_trace_and_repeated_alike(peso, logs: Path, shop: Path) -> None:
    """Append, tokenize, update, tests across: undone, the workspace is as before; done again, as after."""
    timed = ("report", "baselines", "stages/2/manifest", "stages/2/metrics", "stages/2/log")  # tell seconds
    start = snapshot(shop, "report")
    assert peso("ingest", logs / "week.csv", "--append", "-w", shop)[0] == 0
    appended = snapshot(shop, "report")
    assert peso("tokenize", "--append", "-w", shop)[0] == 0
    tokenized = snapshot(shop, "report")
    assert peso("update", "-w", shop)[0] == 0
    updated = snapshot(shop, *timed)
    assert peso("evaluate", "--stage", "0", "--on", "2", "-w", shop)[0] == 0
    assert (shop / "stages/0/on=2").is_dir()

    status, out, err = peso("undo", "--yes", "-w", shop)
    assert status == 0, err
    assert "the training of stage 2" in out
    assert snapshot(shop, "report") == tokenized
    status, out, _ = peso("undo", "--yes", "-w", shop)
    assert status == 0
    assert "their 4 new items and 4 semantic IDs" in out
    assert snapshot(shop, "report") == start
    assert list(pipeline.missing_steps(Workspace.open(shop), 2)) == []

    assert peso("ingest", logs / "week.csv", "--append", "-w", shop)[0] == 0
    assert snapshot(shop, "report") == appended
    assert peso("tokenize", "--append", "-w", shop)[0] == 0
    assert peso("update", "-w", shop)[0] == 0
    assert snapshot(shop, *timed) == updated


def test_the_report_shows_no_removed_stage(peso, shop: Path, reports: list[list[int]]) -> None:
    (shop / "report").mkdir()
    (shop / "report" / "index.html").write_text("[0, 1]")
    (shop / "baselines" / "ease" / "1").mkdir(parents=True)
    assert peso("undo", "--yes", "-w", shop)[0] == 0
    assert reports == [[0]]
    assert (shop / "report" / "index.html").read_text() == "[0]"
    assert not (shop / "baselines" / "ease" / "1").exists()


def test_undo_asks_and_stops_at_stage_0(peso, shop: Path, monkeypatch) -> None:
    before = snapshot(shop)
    for answer, expected in (("n", 0), ("", 2)):
        monkeypatch.setattr("sys.stdin", open(os.devnull) if not answer else _Answer(answer))  # noqa: SIM115
        status, out, err = peso("undo", "-w", shop)
        assert status == expected
        assert "nothing was removed" in out + err
        assert snapshot(shop) == before
    monkeypatch.setattr("sys.stdin", _Answer("y"))
    status, _, err = peso("undo", "-w", shop)
    assert status == 0
    assert "remove the training of stage 1" in err
    assert Workspace.open(shop).finished_stages == [0]
    status, _, err = peso("undo", "--yes", "-w", shop)
    assert status == 1
    assert "stage 0 and the ingested stream cannot be undone" in err
    assert Workspace.open(shop).finished_stages == [0]


class _Answer:
    """A standard input that holds one line."""

    def __init__(self, line: str) -> None:
        self.line = line

    def readline(self, *_: int) -> str:
        return self.line + "\n"


def test_undo_needs_the_lock_and_a_stream(peso, logs: Path, shop: Path, tmp_path: Path) -> None:
    with Workspace.open(shop).lock():
        before = snapshot(shop)
        status, _, err = peso("undo", "--yes", "-w", shop)
        assert status == 1
        assert "another process" in err
        assert snapshot(shop) == before


def test_appends_are_undone_one_by_one(peso, logs: Path, shelves: Path) -> None:
    """Two appends whose items got their IDs in one go; what was corrected in between stays corrected."""
    start = codes(shelves)
    assert peso("ingest", logs / "week.csv", "--append", "-w", shelves)[0] == 0
    assert peso("ingest", logs / "later.csv", "--append", "-w", shelves)[0] == 0
    assert peso("ingest", "--items", table(logs / "fix.csv", [("i0", "fixed", "")]), "-w", shelves)[0] == 0
    assert peso("tokenize", "--append", "-w", shelves)[0] == 0
    both = codes(shelves)
    assert peso("undo", "--yes", "-w", shelves)[0] == 0
    assert codes(shelves) == {item: code for item, code in both.items() if item != "m0"}
    assert peso("diagnose", "-w", shelves)[0] == 0
    assert peso("tokenize", "--append", "-w", shelves)[0] == 0  # nothing to do
    assert peso("undo", "--yes", "-w", shelves)[0] == 0
    assert codes(shelves) == start
    stream = Stream.open(shelves / "stream")
    assert (stream.stages, len(stream.items), "appended" in stream.manifest) == (2, 20, False)
    assert "fixed" in stream.titles
    for log in ("week.csv", "later.csv"):
        assert peso("ingest", logs / log, "--append", "-w", shelves)[0] == 0
    assert peso("tokenize", "--append", "-w", shelves)[0] == 0
    assert codes(shelves) == both


def test_ids_that_were_made_after_an_append_go_with_it(peso, logs: Path, shelves: Path) -> None:
    """Their sizes leave room for the items of the append as well: without it they would be others."""
    before, sizes = snapshot(shelves), read_semantic_ids(shelves / "semantic_ids").sizes
    assert peso("ingest", logs / "week.csv", "--append", "-w", shelves)[0] == 0
    assert peso("tokenize", "-w", shelves)[0] == 0
    assert read_semantic_ids(shelves / "semantic_ids").sizes != sizes
    status, out, _ = peso("undo", "--yes", "-w", shelves)
    assert status == 0
    assert "all 24 semantic IDs" in out
    assert not (shelves / "semantic_ids").exists()
    assert peso("tokenize", "-w", shelves)[0] == 0
    assert snapshot(shelves) == before


def test_an_append_that_is_trained_in_part_loses_its_training_first(peso, logs: Path, shop: Path) -> None:
    assert peso("ingest", logs / "week.csv", "--append", "-w", shop, "--set", TWO_STAGES)[0] == 0
    assert peso("tokenize", "--append", "-w", shop)[0] == 0
    assert peso("update", "-w", shop)[0] == 0
    for stages, trained, left in (([2], [0, 1], 4), ([2, 3], [0, 1], 2), ([1], [0], 2)):
        status, out, _ = peso("undo", "--yes", "-w", shop, "--json")
        assert status == 0
        assert json.loads(out)["stages"] == stages
        assert Workspace.open(shop).finished_stages == trained
        assert Stream.open(shop / "stream").stages == left


def test_an_append_of_several_stages_goes_whole(peso, logs: Path, shelves: Path) -> None:
    before = snapshot(shelves)
    assert peso("ingest", logs / "week.csv", "--append", "-w", shelves, "--set", TWO_STAGES)[0] == 0
    assert Stream.open(shelves / "stream").stages == 4
    status, out, _ = peso("undo", "--yes", "-w", shelves, "--json")
    assert status == 0
    assert json.loads(out)["stages"] == [2, 3]
    assert snapshot(shelves) == before


def test_an_undo_that_was_killed_is_finished_and_no_further_one_begun(
    peso, shop: Path, monkeypatch, reports: list[list[int]]
) -> None:
    shutil.copytree(shop / "stages" / "1", shop / "kept")

    def killed(*_: object) -> None:
        raise Killed

    for again in ([], ["--json"]):
        (shop / "report").mkdir(exist_ok=True)
        with monkeypatch.context() as patch:
            patch.setattr("peso.runs.report.report", killed)
            with pytest.raises(Killed):
                peso("undo", "--yes", "-w", shop)
        assert Workspace.open(shop).finished_stages == [0]
        status, out, _ = peso("undo", "-w", shop, *again)  # does not ask: it was answered before
        assert status == 0
        assert json.loads(out)["gone"] if again else "nothing else was removed" in out
        assert Workspace.open(shop).finished_stages == reports[-1] == [0]
        shutil.copytree(shop / "kept", shop / "stages" / "1")

    (shop / "report").mkdir(exist_ok=True)
    with monkeypatch.context() as patch:
        patch.setattr("peso.runs.report.report", killed)
        with pytest.raises(Killed):
            peso("undo", "--yes", "-w", shop)
    shutil.copytree(shop / "kept", shop / "stages" / "1")  # trained again: this undo is another one
    status, out, _ = peso("undo", "--yes", "-w", shop, "--json")
    assert (status, json.loads(out)["gone"]) == (0, False)
    assert Workspace.open(shop).finished_stages == [0]
    (shop / ".undo").write_text("{")
    status, _, err = peso("undo", "--yes", "-w", shop)
    assert status == 1
    assert ".undo is damaged" in err


def test_an_append_of_an_earlier_version_is_undone(peso, logs: Path, shelves: Path) -> None:
    assert peso("ingest", logs / "week.csv", "--append", "-w", shelves)[0] == 0
    manifest = shelves / "stream" / "manifest.json"
    content = json.loads(manifest.read_text())
    for key in ("before", "events", "users", "new_users", "new_items_without_text"):
        del content["appended"][0][key]
    del content["sha256"]
    manifest.write_text(json.dumps(content))
    assert peso("undo", "--yes", "-w", shelves)[0] == 0
    assert peso("ingest", logs / "week.csv", "--append", "-w", shelves)[0] == 0
    assert Stream.open(shelves / "stream").counts[2]["events"] == 60


def test_ingesting_again_does_not_drop_what_was_appended(peso, logs: Path, shelves: Path) -> None:
    assert peso("ingest", logs / "week.csv", "--append", "-w", shelves)[0] == 0
    before = snapshot(shelves)
    status, _, err = peso("ingest", "-w", shelves)
    assert status == 1
    assert f"peso undo -w {shelves}" in err
    assert snapshot(shelves) == before


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
    assert "warning: 4 of the new items have no title and no text" in out
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


# -- killed at any moment ----------------------------------------------------------------------------


class Killed(BaseException):
    """What no handler expects. From then on nothing reaches the disk, as in a process that is gone."""


def killed_at(monkeypatch, moment: int, work: Callable[[], object]) -> bool:
    """Do ``work``, killed at the ``moment``-th of its renames, replacements and removals; whether it was."""
    count = 0

    def deadly(function: Callable) -> Callable:
        def call(*arguments: object, **options: object) -> object:
            nonlocal count
            count += 1
            if count >= moment:
                raise Killed
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for module, name in ((os, "rename"), (os, "replace"), (shutil, "rmtree")):
            patch.setattr(module, name, deadly(getattr(module, name)))
        try:
            work()
        except Killed:
            return True
    return False


def command(root: Path, name: str, logs: Path) -> Callable[[], object]:
    workspace = Workspace.open(root)
    fixed = {"data.items.path": str(logs / "fixed.csv")}

    def work() -> None:
        with workspace.lock():
            if name == "append":
                path = str(logs / "week.csv")
                preparation.append(
                    workspace, Silent(), workspace.config.data.model_copy(update={"path": path})
                )
            elif name == "tokenize":
                preparation.tokenize_new(workspace, Silent())
            elif name == "items":
                assert workspace.config.data.items is not None
                table_of = workspace.config.data.items.model_copy(update={"path": fixed["data.items.path"]})
                preparation.update_items(
                    workspace, workspace.config.data.model_copy(update={"items": table_of}), Silent()
                )
            else:
                from peso.runs.undo import undo

                undo(workspace, last_step(workspace), Silent())

    return work


@pytest.mark.parametrize("name", ["append", "items", "tokenize", "undo append", "undo training"])
def test_killed_at_any_moment_the_workspace_is_as_before_or_as_after(
    logs: Path, shop: Path, shelves: Path, tmp_path: Path, monkeypatch, name: str
) -> None:
    root = shop if name == "undo training" else shelves
    table(logs / "fixed.csv", [("i0", "fixed", SHELVES[1])])
    prepared = {"tokenize": ["append"], "undo append": ["append", "tokenize"]}.get(name, [])
    for step in prepared:
        command(root, step, logs)()
    (root / "report").mkdir(exist_ok=True)
    before = snapshot(root, "report")
    finished = shutil.copytree(root, tmp_path / "finished")
    command(finished, name, logs)()
    after = snapshot(finished, "report")
    assert after != before
    moment = 0
    while True:
        moment += 1
        copy = shutil.copytree(root, tmp_path / str(moment))
        work = command(copy, name, logs)
        if not killed_at(monkeypatch, moment, work):
            break
        with Workspace.open(copy).lock():  # as the next command does
            found = snapshot(copy, "report")  # a report is removed first, and written again last
        if not name.startswith("undo"):
            assert found in (before, after)
            continue
        workspace = Workspace.open(copy)
        list(pipeline.missing_steps(workspace, Stream.open(copy / "stream").stages))
        assert workspace.stage(0).is_tested in (True, False)
        command(copy, name, logs)()  # as whoever saw no answer does
        assert snapshot(copy, "report") == after
        assert not (copy / ".undo").exists()
    assert moment > 3
