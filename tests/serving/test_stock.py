"""What is not in stock is never recommended, whoever asks and whatever answers."""

from __future__ import annotations

import time

import pytest

from peso.config import DataConfig, ItemColumnsConfig, ItemTableConfig
from peso.errors import UsageError
from peso.runs import preparation
from peso.runs.place import RETIRED
from peso.runs.retired import restore, retire
from peso.runtime.progress import Silent
from peso.serving import live
from peso.serving.stock import Stock, StockFiles

pytestmark = pytest.mark.slow


def test_only_items_in_stock_come_back_and_the_files_are_read_again(serving, shop, tmp_path):
    ids = shop.semantic_ids.item_ids
    allow, deny = tmp_path / "allow.txt", tmp_path / "deny.txt"
    allow.write_text("\n".join([*ids[10:30], "not known"]) + "\n")
    deny.write_text(f"{ids[12]}\n")
    client = serving(shop.root, read_only=True, allow_file=allow, deny_file=deny)

    def items(**request) -> set[str]:
        answer = client.post("/v1/recommend", json={"k": 60, **request}).json()
        assert answer["source"] == ("model" if request["history"] else "popularity")
        return {each["item"] for each in answer["items"]}

    for history in ([], ids[:3]):
        stock = {*ids[10:12], *ids[13:30]}
        assert items(history=history) == stock
        assert items(history=history, allow=ids[:15]) == {*ids[10:12], *ids[13:15]}
        assert items(history=history, allow=ids[:5]) == set()
        assert items(history=history, deny=ids[20:]) == {*ids[10:12], *ids[13:20]}
        several = [{"history": history, "k": 5}, {"history": history, "k": 5, "allow": ids[9:11]}]
        first, second = client.post("/v1/recommend", json=several).json()
        assert {each["item"] for each in first["items"]} <= stock
        assert [each["item"] for each in second["items"]] == [ids[10]]
    allow.write_text("\n".join(ids[40:42]))
    assert items(history=ids[:3]) == items(history=[]) == set(ids[40:42])
    for broken in (b"", b"\xff\xfe"):
        allow.write_bytes(broken)
        assert items(history=ids[:3]) == set(ids[40:42])  # a file that is just being written empties no shop
    allow.unlink()
    assert items(history=ids[:3]) == set(ids[40:42])


def test_a_file_that_cannot_be_read_is_refused_at_the_start(tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    with pytest.raises(UsageError, match="has no item"):
        StockFiles(tmp_path, allow=empty)
    assert StockFiles(tmp_path, deny=empty).current() == Stock()
    marked = tmp_path / "marked.txt"
    marked.write_text("7\n8\n", encoding="utf-8-sig")  # with a byte order mark, as spreadsheets write it
    assert StockFiles(tmp_path, deny=marked).current().deny == {"7", "8"}
    with pytest.raises(UsageError, match=r"--deny-file .* No such file"):
        StockFiles(tmp_path, deny=tmp_path / "gone")


def test_retired_items_are_gone_with_the_next_answer_and_a_damaged_record_changes_nothing(serving, copy):
    ids = copy.semantic_ids.item_ids
    client = serving(copy.root)

    def items(**request) -> list[str]:
        answer = client.post("/v1/recommend", json={"k": 60, **request}).json()
        return [each["item"] for each in answer["items"]]

    requests = ({"history": ids[:3]}, {"history": []}, {"history": ids[:3], "allow": ids[:20]})
    before = [items(**request) for request in requests]
    gone = [before[0][0], before[1][0]]
    retire(copy, gone)
    after = [items(**request) for request in requests]
    assert after == [[item for item in each if item not in gone] for each in before]
    kept = (copy.root / RETIRED).read_text()
    (copy.root / RETIRED).write_text("{")
    assert [items(**request) for request in requests] == after
    (copy.root / RETIRED).write_text(kept)
    restore(copy, gone)
    assert [items(**request) for request in requests] == before


def test_a_corrected_title_is_in_the_answers_of_a_running_server(serving, copy, tmp_path, monkeypatch):
    monkeypatch.setattr(live, "INTERVAL", 0.02)
    item = copy.semantic_ids.item_ids[0]
    client = serving(copy.root)

    def title() -> str | None:
        request = {"history": [], "k": 1, "allow": [item], "titles": True}
        return client.post("/v1/recommend", json=request).json()["items"][0]["title"]

    assert title() != "New name"
    (tmp_path / "products.csv").write_text(f"item,title\n{item},New name\n")
    data = copy.config.data
    table = ItemTableConfig(path=str(tmp_path / "products.csv"), columns=ItemColumnsConfig(title="title"))
    own = DataConfig(format="csv", path="unused", items=table, on_error=data.on_error)
    with copy.lock():
        preparation.update_items(copy, own, Silent())
    until = time.monotonic() + 60
    while title() != "New name":
        assert time.monotonic() < until, "the title never changed"
        time.sleep(0.01)
