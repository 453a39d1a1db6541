"""What is not in stock is never recommended, whoever asks and whatever answers."""

from __future__ import annotations

import pytest

from peso.errors import UsageError
from peso.serving.stock import Stock, StockFiles


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
        StockFiles(allow=empty)
    assert StockFiles(deny=empty).current() == Stock()
    with pytest.raises(UsageError, match=r"--deny-file .* No such file"):
        StockFiles(deny=tmp_path / "gone")
