"""A running server takes renamed items and merged users up: requests may have any name."""

from __future__ import annotations

import time

from peso.runs.merge_users import merge
from peso.runs.names import item_names
from peso.runs.place import NAMES
from peso.runs.rename import rename
from peso.runs.retired import retire
from peso.runtime.progress import Silent
from peso.serving import live


def wait_for(what, message: str) -> None:
    until = time.monotonic() + 60
    while not what():
        assert time.monotonic() < until, message
        time.sleep(0.01)


def test_answers_have_new_names_and_requests_may_have_any(serving, copy, tmp_path, monkeypatch):
    monkeypatch.setattr(live, "INTERVAL", 0.02)
    ids = copy.semantic_ids.item_ids
    deny = tmp_path / "deny.txt"
    deny.write_text(f"{ids[9]}\n")
    client = serving(copy.root, deny_file=deny)
    model = client.service.live.current.model

    def answer(**request) -> dict:
        return client.post("/v1/recommend", json={"k": 40, "unknown": "refuse", **request}).json()

    def items(told: dict) -> list[tuple[str, float]]:
        return [(each["item"], each["score"]) for each in told["items"]]

    by_history, by_popularity = {"history": ids[:3], "exclude_seen": False}, {"history": []}
    before = [answer(**by_history), answer(**by_popularity)]
    assert "renamed_items" not in before[0]
    event = {"user": "someone", "item": ids[0], "time": 1_700_000_000}
    client.post("/v1/events", json=[event, {"user": "someone", "item": "later", "time": 1_700_000_001}])
    to = {
        item: f"new {item}" for item in (ids[0], before[0]["items"][0]["item"], before[1]["items"][0]["item"])
    }
    to |= {ids[9]: "denied", ids[5]: "later"}
    retire(copy, [ids[20]])
    rename(copy, [*to.items(), (ids[20], "retired")])
    wait_for(lambda: client.get(f"/v1/items/{ids[0]}").json()["item"] == to[ids[0]], "the name never changed")
    assert client.service.live.current.model is model  # nothing is loaded again

    def renamed(told: dict) -> list[tuple[str, float]]:
        return [(to.get(item, item), score) for item, score in items(told) if item != ids[20]]

    new = [to.get(item, item) for item in ids[:3]]
    assert items(answer(**by_history))[:39] == renamed(before[0])[:39]
    assert items(answer(history=new, exclude_seen=False)) == items(answer(**by_history))
    assert items(answer(**by_popularity))[:39] == renamed(before[1])[:39]
    assert answer(**by_history)["renamed_items"] == {item: to[item] for item in ids[:3] if item in to}
    assert "renamed_items" not in answer(history=new)
    only = answer(history=[], allow=[ids[0], "later", ids[9], ids[20]], k=5)
    assert {each["item"] for each in only["items"]} == {to[ids[0]], "later"}  # not denied, not retired
    assert answer(history=[], allow=[ids[0]], deny=[to[ids[0]]], k=5)["items"] == []

    def compared() -> dict:
        return client.post("/v1/compare", json={"user": "someone", "k": 3}).json()

    def history() -> list[str]:
        return [each["item"] for each in compared()["history"]]

    wait_for(lambda: history() == [to[ids[0]], "later"], "the histories never had the new names")
    shown = compared()
    of_user = answer(user="someone", exclude_seen=True, k=50)
    assert of_user["unknown_items"] == []
    assert not {each["item"] for each in of_user["items"]} & {
        to[ids[0]],
        "later",
    }  # both events are understood
    assert shown["history"][0]["title"] == client.get(f"/v1/items/{to[ids[0]]}").json()["title"]
    explained = client.post("/v1/explain", json={"history": ids[:2], "item": ids[0]}).json()
    assert explained["item"] == to[ids[0]]
    (copy.root / NAMES).write_text("{")  # the last known names stay
    wait_for(lambda: client.get("/v1/status").json()["problem"] is not None, "the damage was never noticed")
    assert items(answer(**by_history))[:39] == renamed(before[0])[:39]
    again = answer(user="someone", exclude_seen=True, k=50)  # now from a cached prompt
    assert {item for item, _ in items(again)} == {item for item, _ in items(of_user)}


def test_the_previous_stage_has_the_new_names_too(serving, copy, monkeypatch):
    monkeypatch.setattr(live, "INTERVAL", 0.02)
    ids = copy.semantic_ids.item_ids
    client = serving(copy.root)

    def compared() -> dict:
        return client.post("/v1/compare", json={"history": ids[:3], "k": 40, "exclude_seen": False}).json()

    wait_for(lambda: compared()["before_state"] == "ready", "the previous stage was never loaded")
    first = compared()["before"]["items"][0]["item"]
    rename(copy, [(first, "better")])
    names = item_names(copy.root)
    wait_for(lambda: client.service.live.current.semantic_ids.names == names, "the names were never read")
    after = compared()["before"]["items"][0]
    assert (after["item"], after["semantic_id"]) == ("better", copy.semantic_ids.semantic_id(first))


def test_a_merged_user_is_the_other_one_in_a_running_server(serving, copy, monkeypatch):
    monkeypatch.setattr(live, "INTERVAL", 0.02)
    client = serving(copy.root)
    users = [each["user"] for each in client.get("/v1/users?limit=5").json()["users"]]
    one, other = users[1], users[3]
    client.post("/v1/events", json={"user": one, "item": copy.semantic_ids.item_ids[7]})

    def history(user: str) -> list[str]:
        told = client.post("/v1/compare", json={"user": user, "k": 1}).json()
        return [each["item"] for each in told["history"]]

    before = [history(one), history(other)]
    with copy.lock():
        merge(copy, [(one, other)], Silent())
    wait_for(lambda: history(one) == history(other), "the histories never became one")
    assert sorted(history(one)) == sorted([*before[0], *before[1]])
    assert history(one)[-1] == copy.semantic_ids.item_ids[7]
    asked = [{"user": user, "k": 5} for user in (one, other)]
    first, second = client.post("/v1/recommend", json=asked).json()
    assert first["items"] == second["items"]
    left = [each["user"] for each in client.get("/v1/users?limit=5").json()["users"]]
    assert left[:4] == [user for user in users if user != one]
