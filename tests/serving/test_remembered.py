"""Answers that are kept are those that would be computed now, and are prepared only for who may ask again."""

from __future__ import annotations

import re
import shutil
import time

import pytest
from event_logs import write_log
from test_stages import wait_for

from peso.runs.retired import retire
from peso.runs.served import promote, rollback
from peso.serving import live, remembered
from peso.serving.messages import Request
from peso.serving.remembered import RememberedAnswers, key_of
from peso.serving.stock import Stock

pytestmark = pytest.mark.slow
NOTHING = {"prepared": 0, "used": 0, "repeated": 0}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(live, "INTERVAL", 0.02)


@pytest.fixture
def started(serving):
    """started(root, …): a client of a server that has looked at its workspace, which empties memories."""

    def start(*arguments, **settings):
        client = serving(*arguments, **settings)
        wait_for(lambda: client.service.live._seen is not None)
        return client

    return start


def ask(client, **request) -> dict:
    response = client.post("/v1/recommend", json=request)
    assert response.status_code == 200, response.text
    return response.json()


def send(client, user: str, item: str) -> None:
    assert client.post("/v1/events", json={"user": user, "item": item}).json()["new"] == 1


def counts(client) -> dict[str, int]:
    text = client.get("/metrics").text
    found = re.findall(r'peso_remembered_answers_total\{how="(\w+)"\} (\S+)', text)
    return {how: int(float(number)) for how, number in found}


def prepared(client, number: int) -> None:
    wait_for(lambda: counts(client)["prepared"] == number)


REQUESTS = [
    {},
    {"k": 7, "exclude_seen": False, "titles": True},
    {"k": 4, "allow": [f"i{n}" for n in range(5, 30)], "deny": ["i7", "gone"]},
]


@pytest.mark.parametrize("options", REQUESTS)
def test_a_prepared_answer_is_the_one_that_would_be_computed_on_demand(started, copy, options):
    client = started(copy.root)
    other = started(copy.root, answer_memory=0)
    user, ids = copy.stream.stage(1).users[0], copy.semantic_ids.item_ids
    for turn, item in enumerate(ids[40:43], 1):
        assert ask(client, user=user, **options) == ask(other, user=user, **options)
        send(client, user, item)
        prepared(client, turn)
    assert ask(client, user=user, **options) == ask(other, user=user, **options)
    assert counts(client) == {"prepared": 3, "used": 3, "repeated": 0}
    assert counts(other) == NOTHING


def test_answers_are_prepared_only_for_who_has_asked_and_whose_prompt_is_kept(started, copy):
    client = started(copy.root)
    silent, lost, asker = copy.stream.stage(1).users[:3]
    for user in (lost, asker):
        ask(client, user=user)
    client.service.live.current.prompts.forget(lost)
    events = [{"user": user, "item": "i3"} for user in (silent, lost, asker, "new")]
    assert client.post("/v1/events", json=events).json()["new"] == 4
    prepared(client, 1)
    time.sleep(0.2)
    assert counts(client) == {**NOTHING, "prepared": 1}
    ask(client, user=lost)
    assert counts(client)["used"] == 0
    ask(client, user=asker)
    assert counts(client)["used"] == 1


def test_an_event_that_was_stored_before_prepares_nothing(started, copy):
    client, user = started(copy.root), copy.stream.stage(1).users[0]
    ask(client, user=user)
    event = {"user": user, "item": "i3", "key": "one"}
    client.post("/v1/events", json=event)
    prepared(client, 1)
    ask(client, user=user)
    assert client.post("/v1/events", json=event).json()["duplicates"] == 1
    time.sleep(0.2)
    assert counts(client) == {**NOTHING, "prepared": 1, "used": 1}


@pytest.mark.parametrize("settings", [{"prepare": False}, {"answer_memory": 0}])
def test_preparation_can_be_switched_off(started, copy, settings):
    client, user = started(copy.root, **settings), copy.stream.stage(1).users[0]
    before = ask(client, user=user, exclude_seen=False)
    send(client, user, "i3")
    time.sleep(0.2)
    assert ask(client, user=user, exclude_seen=False) != before
    assert counts(client) == NOTHING


def test_a_repeated_request_gets_the_same_answer_until_anything_differs(started, copy):
    client, ids = started(copy.root, read_only=True), copy.semantic_ids.item_ids
    request = {"history": [*ids[:4], "gone"], "k": 5, "deny": ids[9:11]}
    first = ask(client, **request)
    assert ask(client, **request) == first
    assert counts(client) == {**NOTHING, "repeated": 1}
    titled = ask(client, **request, titles=True)  # titles are not part of what is computed
    assert counts(client)["repeated"] == 2
    assert [each["item"] for each in titled["items"]] == [each["item"] for each in first["items"]]
    assert all(each["title"] for each in titled["items"])
    refused = client.post("/v1/recommend", json={**request, "unknown": "refuse"})
    assert refused.status_code == 422
    for change in (
        {"k": 4},
        {"history": [*ids[:3], ids[4], "gone"]},
        {"history": [ids[1], ids[0], *ids[2:4]]},
        {"deny": ids[9:12]},
        {"allow": ids[5:20]},
        {"exclude_seen": not client.service.live.current.leaves_out_seen},
    ):
        ask(client, **{**request, **change})
        assert counts(client)["repeated"] == 2, change
    user = copy.stream.stage(1).users[0]
    known = client.service.histories.of(user)
    assert ask(client, user=user)["items"] == ask(client, user=user)["items"]
    ask(client, history=known)
    assert counts(client)["repeated"] == 3


def test_lists_of_popular_items_are_not_kept(serving, copy):
    client = serving(copy.root, ready=False)
    for _ in range(2):
        ask(client, user="who")
        ask(client, history=[])
        ask(client, history=["i1"])  # while the model is loading
    assert counts(client) == NOTHING
    client.service.live.refresh()
    assert ask(client, history=["i1"])["source"] == "model"


def test_items_that_are_retired_or_out_of_stock_are_in_no_prepared_answer(started, copy, tmp_path):
    stock = tmp_path / "out.txt"
    stock.write_text("")
    client, user = started(copy.root, deny_file=stock), copy.stream.stage(1).users[0]
    ask(client, user=user)
    send(client, user, "i3")
    prepared(client, 1)
    snapshot = client.service.live.current
    (kept,) = (each.ranked for each in snapshot.answers._answers.values() if each.prepared)
    retire(copy, [kept[0][0]])
    stock.write_text(kept[1][0])
    items = [each["item"] for each in ask(client, user=user)["items"]]
    assert not {kept[0][0], kept[1][0]} & {*items}
    assert items[:5] == [item for item, _ in kept[2:7]]
    assert counts(client) == {**NOTHING, "prepared": 1}


def test_a_prepared_answer_goes_with_its_stage(started, copy):
    promote(copy, 0)
    client, user = started(copy.root), copy.stream.stage(1).users[0]
    ask(client, user=user)
    send(client, user, "i3")
    prepared(client, 1)
    for change, stage in ((promote, 1), (rollback, 0)):
        change(copy, *([1] if change is promote else []))
        wait_for(lambda stage=stage: client.get("/v1/status").json()["stage"] == stage)
        alone = started(copy.root, answer_memory=0)
        assert ask(client, user=user) == ask(alone, user=user)
    assert counts(client) == {**NOTHING, "prepared": 1}


def test_answers_and_requests_are_dropped_when_the_stream_changes_or_the_user_is_gone(started, copy):
    client = started(copy.root)
    user, first = copy.stream.stage(1).users[0], client.service.live.current
    ask(client, user=user)
    assert user in first.answers
    manifest = copy.root / "stream" / "manifest.json"
    shutil.copy2(manifest, copy.root / "other")
    (copy.root / "other").rename(manifest)
    wait_for(lambda: client.service.live.current is not first)
    now = client.service.live.current.answers
    assert user not in now
    ask(client, user=user)
    assert user in now
    assert counts(client) == NOTHING
    now._usual["gone"] = now._usual[user]
    ask(client, user="gone")
    assert [*now._usual] == [user]


def test_new_items_of_an_append_are_in_an_answer_that_was_kept_before(started, copy, tmp_path, peso):
    client, (user, *_) = started(copy.root), copy.stream.stage(1).users
    request = {"user": user, "allow": ["i1", "brand-new"], "exclude_seen": False, "k": 2}
    assert len(ask(client, **request)["items"]) == 1
    known, last = copy.semantic_ids.item_ids[:3], int(copy.stream.manifest["time"]["last"]) // 1_000_000
    new = write_log(tmp_path / "new.csv", [(user, item, last + 60) for item in (*known, "brand-new")])
    assert peso("ingest", new, "--append", "--set", "data.format=csv", "-w", copy.root)[0] == 0
    assert peso("tokenize", "--append", "-w", copy.root)[0] == 0
    wait_for(lambda: client.get("/v1/items/brand-new").status_code == 200)
    assert len(ask(client, **request)["items"]) == 2


# -- the memory itself ---------------------------------------------------------------------------------

RANKED = [(f"i{n}", -1.0 * n) for n in range(10)]


def test_the_memory_keeps_what_was_used_last_within_its_size():
    memory = RememberedAnswers(8_000)  # a quarter is for requests, the rest for 4 answers of 1,500 bytes
    keys = [key_of(Request(user=f"u{n}"), ["i1"], False, Stock()) for n in range(5)]
    for key in keys[:4]:
        memory.keep(key, RANKED, False)
    assert memory.find(keys[0], False) == RANKED
    memory.keep(keys[4], RANKED, False)
    assert [memory.find(key, False) is not None for key in keys] == [True, False, True, True, True]
    memory.keep(keys[1], RANKED * 10, False)  # larger than the memory
    assert memory.find(keys[1], False) is None
    for number in range(5):
        memory.asked(Request(user=f"u{number}"))
    assert [f"u{number}" in memory for number in range(5)] == [False, False, False, True, True]
    memory.asked(Request(user="u4", deny=["x" * 250] * 10))  # too large, so the earlier one is not usual
    assert memory.usual("u4") is None


def test_a_request_is_usual_for_half_an_hour(monkeypatch):
    memory, now = RememberedAnswers(2**20), [100.0]
    monkeypatch.setattr(remembered.time, "monotonic", lambda: now[0])
    request = Request(user="u", k=3)
    memory.asked(Request(user="u", k=5))
    memory.asked(request)
    now[0] += remembered.RECENT
    assert memory.usual("u") is request
    now[0] += 1
    assert memory.usual("u") is None


def test_only_a_prepared_answer_counts_as_used_and_once():
    counted: list[str] = []
    memory = RememberedAnswers(2**20, counted.append)
    key = key_of(Request(user="u"), ["i1"], False, Stock())
    memory.keep(key, RANKED, True)
    assert memory.find(key, True) == RANKED  # prepared again: nothing is counted
    for _ in range(2):
        assert memory.find(key, False) == RANKED
    assert counted == ["prepared", "used", "repeated"]
