"""An index that was made elsewhere: taken over, measured, continued, and written out again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from event_logs import write_json_lines, write_log

from peso.config import load_config
from peso.errors import DataError
from peso.items.semantic_ids import read_semantic_ids
from peso.runs import preparation
from peso.runs.workspace import Workspace
from peso.runtime.progress import Silent

pytestmark = pytest.mark.slow

LOG = [(f"u{k % 9}", f"i{k * k % 23}", 1_600_000_000 + k) for k in range(300)]
ITEMS = sorted({item for _, item, _ in LOG}, key=lambda item: int(item[1:]))
INDEX = {f"i{k}": [f"<a_{k % 3}>", f"<b_{k % 5}>", f"<c_{k}>"] for k in range(25)}

Peso = Callable[..., tuple[int, str, str]]


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A configuration of a log, a product table and an index."""
    write_log(tmp_path / "log.csv", LOG)
    write_json_lines(tmp_path / "items.jsonl", [{"item": i, "title": f"tea {i[1:]}"} for i in ITEMS])
    (tmp_path / "shop.index.json").write_text(json.dumps(INDEX))
    data = {
        "format": "csv",
        "path": "log.csv",
        "stages": 2,
        "items": {"path": "items.jsonl", "format": "jsonl", "columns": {"title": "title"}},
    }
    config = {"data": data, "items": {"index": "shop.index.json"}, "backbone": "tiny"}
    (tmp_path / "shop.yaml").write_text(yaml.safe_dump({**config, "training": {"max_steps": 3}}))
    return tmp_path


def started(shop: Path, name: str, *overrides: str) -> Path:
    """A workspace with a stream and semantic IDs."""
    workspace = Workspace.create_or_open(shop / name, load_config(shop / "shop.yaml", overrides))
    preparation.ingest(workspace, Silent())
    preparation.tokenize(workspace, Silent())
    return workspace.root


def tokens(workspace: Path) -> dict[str, list[str]]:
    ids = read_semantic_ids(workspace / "semantic_ids")
    return {item: ids.semantic_id(item) for item in ids.item_ids}


def test_an_index_is_taken_as_it_is_measured_and_exported_again(peso: Peso, shop: Path) -> None:
    status, out, err = peso("run", shop / "shop.yaml", "-w", shop / "w")
    assert status == 0, err
    assert tokens(shop / "w") == {item: INDEX[item] for item in tokens(shop / "w")}
    assert set(tokens(shop / "w")) == set(ITEMS)
    assert f"{len(INDEX) - len(ITEMS)} items that are not in the log are ignored" in err
    manifest = json.loads((shop / "w" / "semantic_ids" / "manifest.json").read_text())
    assert manifest["source"] == str(shop / "shop.index.json")
    assert 0 <= manifest["quality"]["neighbours"]["first"] <= 1  # the titles are vectors enough
    assert manifest["quality"]["sample"]["items"][0]["title"].startswith("tea")
    page = (shop / "w" / "report" / "index.html").read_text()
    assert "nearest items under the same first code" in page

    status, out, err = peso("export", "-w", shop / "w", "--format", "index", "-o", shop / "out.json")
    assert (status, out.strip()) == (0, str(shop / "out.json"))
    written = json.loads((shop / "out.json").read_text())
    assert written == tokens(shop / "w")
    status, _, err = peso("export", "-w", shop / "w", "--format", "index", "-o", shop / "out.json")
    assert status == 1
    assert "exists already" in err
    assert peso("diagnose", "-w", shop / "w")[0] == 0


def test_what_was_exported_is_what_comes_in_again(peso: Peso, shop: Path) -> None:
    made = started(shop, "made", "items.index=null", "items.quantizer=rq-kmeans")
    assert peso("export", "-w", made, "--format", "index", "-o", shop / "made.json")[0] == 0
    taken = started(shop, "taken", f"items.index={shop / 'made.json'}")
    assert tokens(taken) == tokens(made) != INDEX


def test_an_item_that_the_index_does_not_know_is_named(shop: Path) -> None:
    (shop / "shop.index.json").write_text(json.dumps({k: v for k, v in INDEX.items() if k != "i4"}))
    with pytest.raises(DataError, match=r"shop.index.json: 1 of .*: 'i4'; add them to the index"):
        started(shop, "w")
    assert not (shop / "w" / "semantic_ids").exists()


def test_new_items_take_their_ids_from_a_later_state_of_the_index(peso: Peso, shop: Path) -> None:
    before = tokens(started(shop, "w"))
    week = [(f"u{k % 3}", f"i{19 + k % 6}", 1_700_000_000 + k) for k in range(30)]
    new = {item for _, item, _ in week} - set(before)
    assert new
    write_log(shop / "week.csv", week)
    assert peso("ingest", shop / "week.csv", "--append", "-w", shop / "w")[0] == 0

    changed = {**INDEX, ITEMS[3]: ["<a_1>", "<b_1>", "<c_0>"]}
    (shop / "shop.index.json").write_text(json.dumps(changed))
    status, _, err = peso("tokenize", "--append", "-w", shop / "w")
    assert status == 1
    assert f"1 items have another ID than before, the first is '{ITEMS[3]}'" in err
    assert tokens(shop / "w") == before

    (shop / "shop.index.json").write_text(json.dumps(INDEX))
    assert peso("tokenize", "--append", "-w", shop / "w")[0] == 0
    assert tokens(shop / "w") == {**before, **{item: INDEX[item] for item in new}}


def test_contents_beside_an_index_are_those_of_the_texts(peso: Peso, shop: Path) -> None:
    keep = ["head.name=items", "head.contents=true"]
    words = ["green tea", "black tea", "steel nail", "iron nail", "oak table"]
    titles = [{"item": item, "title": words[row % 5]} for row, item in enumerate(INDEX)]
    write_json_lines(shop / "items.jsonl", titles)
    root = started(shop, "w", *keep)
    before = read_semantic_ids(root / "semantic_ids")
    assert before.contents.shape[0] == len(before.item_ids)
    assert len(np.unique(before.contents, axis=0)) > 1
    write_log(shop / "week.csv", [(f"u{k % 3}", f"i{19 + k % 6}", 1_700_000_000 + k) for k in range(30)])
    assert peso("ingest", shop / "week.csv", "--append", "-w", root)[0] == 0
    assert peso("tokenize", "--append", "-w", root)[0] == 0
    after = read_semantic_ids(root / "semantic_ids")
    assert len(after.contents) == len(after.item_ids) > len(before.item_ids)
    np.testing.assert_array_equal(after.contents[: len(before.contents)], before.contents)

    with pytest.raises(DataError, match=r"head\.contents needs items with texts or vectors"):
        started(shop, "bare", *keep, "data.items=null")
    assert not (shop / "bare" / "semantic_ids").exists()


def test_an_index_that_came_with_the_data_is_measured_by_vectors_from_elsewhere(
    peso: Peso, tmp_path: Path
) -> None:
    folder = tmp_path / "release"
    folder.mkdir()
    for block in range(2):
        users = {
            f"u{u}": {"previous_block": [], "current_block": [f"i{u}", "i1", "i2", "i3"]} for u in range(6)
        }
        (folder / f"x.all.block_{block}.json").write_text(json.dumps(users))
    (folder / "x.index.epoch1.json").write_text(json.dumps(INDEX))
    np.save(tmp_path / "v.npy", np.random.default_rng(0).normal(size=(len(INDEX), 4)))
    (tmp_path / "v.ids.txt").write_text("\n".join(reversed(INDEX)))
    workspace = tmp_path / "w"
    assert peso("ingest", folder, "-w", workspace)[0] == 0
    assert peso("tokenize", "-w", workspace)[0] == 0
    manifest = json.loads((workspace / "semantic_ids" / "manifest.json").read_text())
    assert "neighbours" not in manifest["quality"]
    vectors = ["--set", "items.encoder=vectors", "--set", f"items.vectors=[{tmp_path / 'v.npy'}]"]
    assert peso("ingest", folder, "-w", tmp_path / "v", *vectors)[0] == 0
    status, out, _ = peso("tokenize", "-w", tmp_path / "v")
    assert status == 0
    assert "first two codes" in out
    assert tokens(tmp_path / "v") == tokens(workspace)
