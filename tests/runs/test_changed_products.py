"""A product table that changes between updates: texts change at once, codes and what was trained do not."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from event_logs import write_log
from small_runs import Notes

from peso.config import load_config
from peso.errors import DataError
from peso.events.received import ReceivedEvent, ReceivedEvents
from peso.runs import preparation
from peso.runs.intake import cut_received
from peso.runs.undo import last_step, undo
from peso.runs.workspace import Workspace
from peso.runtime.progress import Silent

T = 1_600_000_000
EVENTS = [(f"u{k % 7}", f"i{(k * 5 + k // 7) % 19}", T + k * 3600) for k in range(90)]
LAST = EVENTS[-1][2]
NEW = [(f"u{k % 3}", f"i{19 if k == 5 else (k * k + 2) % 12}", LAST + 60 * (k + 1)) for k in range(12)]
OLD_TABLE = [(f"i{k}", f"thing {k} of {('wood', 'iron', 'wool')[k % 3]}", "home") for k in range(19)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shops")
    columns = {"title": "title", "category": "kind"}
    tree = {
        "data": {
            "format": "csv",
            "path": str(write_log(folder / "log.csv", EVENTS)),
            "stages": 2,
            "items": {"path": "products.csv", "columns": columns},
        },
        "items": {"quantizer": "rq-kmeans", "levels": 2, "codes": 4},
        "head": {"name": "items", "contents": True},
        "backbone": "tiny",
        "strategy": "single",
        "baselines": [],
    }
    write_products(folder, OLD_TABLE)
    workspace = Workspace.create_or_open(folder / "shop", load_config(tree, base=folder))
    with workspace.lock():
        preparation.ingest(workspace, Silent())
        preparation.tokenize(workspace, Silent())
    return folder


def write_products(folder: Path, rows: list[tuple[str, str, str]]) -> None:
    write_log(folder / "products.csv", rows, "item,title,kind")


@pytest.fixture
def shop(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.setattr("peso.runs.intake.pipeline.unfinished", lambda workspace: (None, True))
    workspace = Workspace.open(shutil.copytree(made / "shop", tmp_path / "shop"))
    table = workspace.config.data.items.model_copy(update={"path": str(tmp_path / "products.csv")})
    data = workspace.config.data.model_copy(update={"items": table})
    workspace.config = workspace.config.model_copy(update={"data": data})
    return workspace


def changed(rows: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """With another title of i3, another category of i4, no title of i5, no row of i6, and a new item."""
    new = {"i3": ("i3", "a wooden boat", "home"), "i4": ("i4", rows[4][1], "sea"), "i5": ("i5", "", "home")}
    return [*(new.get(row[0], row) for row in rows if row[0] != "i6"), ("i19", "fresh thing", "home")]


def told(workspace: Workspace) -> dict[str, tuple[str | None, str | None]]:
    stream = workspace.stream
    return dict(zip(stream.item_ids, zip(stream.titles, stream.categories, strict=True), strict=True))


def append(workspace: Workspace, folder: Path) -> list[str]:
    observer, log = Notes(), write_log(folder / "new.csv", NEW)
    data = workspace.config.data.model_copy(update={"path": str(log)})
    with workspace.lock():
        preparation.append(workspace, observer, data)
        preparation.tokenize_new(workspace, observer)
    return observer.notes


def receive(workspace: Workspace, folder: Path) -> list[str]:
    observer = Notes()
    with ReceivedEvents(workspace.events_file) as received:
        received.add([ReceivedEvent(user, item, time * 10**6) for user, item, time in NEW])
    with workspace.lock():
        cut_received(workspace, observer)
        preparation.tokenize_new(workspace, observer)
    return observer.notes


@pytest.mark.parametrize("update", [append, receive])
def test_an_update_takes_the_new_texts_of_known_items_and_says_so(shop: Workspace, tmp_path, update) -> None:
    write_products(tmp_path, changed(OLD_TABLE))
    before, ids, first = told(shop), shop.semantic_ids, shop.stage(0).determination()
    notes = update(shop, tmp_path)
    (note,) = [note for note in notes if "other texts" in note]
    assert "for 2 known items (1 titles, 0 texts, 1 categories)" in note
    assert "existing semantic IDs and content vectors do not change" in note
    assert told(shop) == {
        **before,  # an empty cell and a missing row change nothing
        "i3": ("a wooden boat", "home"),
        "i4": (before["i4"][0], "sea"),
        "i19": ("fresh thing", "home"),
    }
    brought = shop.stream.manifest["appended"][-1]
    assert brought["corrected_items"] == {"titles": 1, "texts": 0, "categories": 1, "changed": 2}
    now = shop.semantic_ids
    assert (now.codes[:-1] == ids.codes).all()
    assert np.array_equal(now.required_contents[:-1], ids.required_contents)
    assert now.item_ids == [*ids.item_ids, "i19"]
    assert shop.stage(0).determination() == first


def test_the_same_table_changes_nothing_and_says_nothing(shop: Workspace, tmp_path: Path) -> None:
    write_products(tmp_path, [*OLD_TABLE, ("i19", "fresh thing", "home")])
    before = told(shop)
    assert not [note for note in append(shop, tmp_path) if "other texts" in note]
    assert told(shop) == {**before, "i19": ("fresh thing", "home")}
    assert "corrected_items" not in shop.stream.manifest["appended"][-1]


def test_corrections_of_an_undone_append_stay(shop: Workspace, tmp_path: Path) -> None:
    write_products(tmp_path, changed(OLD_TABLE))
    append(shop, tmp_path)
    after = told(shop)
    with shop.lock():
        undo(shop, last_step(shop), Silent())
    del after["i19"]
    assert told(shop) == after


def test_a_table_that_cannot_be_read_stops_the_append_and_changes_nothing(shop, tmp_path: Path) -> None:
    before = shop.stream.manifest
    (tmp_path / "products.csv").write_text("item,title\ni3,no kind\n")
    with pytest.raises(DataError, match="kind"):
        append(shop, tmp_path)
    assert shop.stream.manifest == before
