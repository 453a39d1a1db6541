"""An acknowledged event is on the disk, once, and counts for the next recommendation."""

from __future__ import annotations

import shutil
import sqlite3
from datetime import UTC, datetime, timedelta

import pytest
from serving_app import running

from peso.events.received import ReceivedEvents
from peso.runs.recommender import Recommender
from peso.runs.workspace import Workspace

pytestmark = pytest.mark.slow


@pytest.fixture
def client(serving, copy):
    return serving(copy.root)


@pytest.fixture(scope="module")
def unchanged(shop, tmp_path_factory):
    """A client of a server that is sent nothing to store, and its workspace."""
    root = tmp_path_factory.mktemp("unchanged") / "w"
    shutil.copytree(shop.root, root)
    with running(root, ready=False) as client:
        yield client, Workspace.open(root)


def stored(workspace, user: str) -> list[tuple[str, int]]:
    with ReceivedEvents(workspace.events_file) as received:
        return [(event.item, event.time) for event in received.of_user(user)]


def test_a_recommendation_sees_every_event_that_was_acknowledged_before(serving, copy):
    client = serving(copy.root, prompt_memory=0)
    ids, recommender = copy.semantic_ids.item_ids, Recommender(copy)
    user = next(iter(recommender.histories))
    for name, known in ((user, recommender.history(user)), ("new", [])):
        for item in ids[:3]:
            assert client.post("/v1/events", json={"user": name, "item": item}).json()["new"] == 1
            known = [*known, item]
            answer = client.post("/v1/recommend", json={"user": name}).json()
            expected = recommender.recommend(history=known)
            assert [each["item"] for each in answer["items"]] == [item for item, _ in expected]
            assert answer["source"] == "model"


def test_the_prompt_of_a_returning_user_is_continued(serving, copy):
    """As many tokens as the new item has, and the answer of the whole history."""
    client = serving(copy.root, prepare=False)  # so that the request computes them
    ids, recommender = copy.semantic_ids.item_ids, Recommender(copy)

    def computed() -> float:
        lines = client.get("/metrics").text.splitlines()
        found = [line.split()[1] for line in lines if line.startswith('peso_prompt_tokens{how="computed"}')]
        return float(found[0])

    for count in range(1, 6):
        client.post("/v1/events", json={"user": "new", "item": ids[count], "time": count})
        before = computed() if count > 1 else 0.0
        answer = client.post("/v1/recommend", json={"user": "new"}).json()
        expected = recommender.recommend(history=ids[1 : count + 1])
        assert [each["item"] for each in answer["items"]] == [item for item, _ in expected]
        if count > 1:
            assert computed() - before == copy.semantic_ids.levels


def test_events_of_one_key_are_stored_once(client, copy):
    day = "2026-03-01T12:00:00Z"
    event = {"user": "a", "item": "i1", "time": day}
    assert client.post("/v1/events", json=event).json() == {"new": 1, "duplicates": 0, "unknown_items": []}
    again = [event, {**event, "time": 1772366400}, {**event, "time": "2026-03-01T13:00:00+01:00"}]
    assert client.post("/v1/events", json=again).json()["duplicates"] == 3
    keyed = [{"user": "a", "item": "i2", "key": "order 5"}, {"user": "a", "item": "i3", "key": "order 5"}]
    assert client.post("/v1/events", json=keyed).json()["new"] == 1
    assert [item for item, _ in stored(copy, "a")] == ["i1", "i2"]
    assert stored(copy, "a")[0][1] == 1_772_366_400_000_000


def test_an_event_with_an_item_that_the_stage_does_not_know_is_kept_and_named(client, copy):
    events = [{"user": "a", "item": "brand new"}, {"user": "a", "item": "i1"}]
    assert client.post("/v1/events", json=events).json()["unknown_items"] == ["brand new"]
    assert len(stored(copy, "a")) == 2
    answer = client.post("/v1/recommend", json={"user": "a", "unknown": "refuse"}).json()
    assert (answer["source"], answer["unknown_items"]) == ("model", ["brand new"])


@pytest.mark.parametrize(
    ("event", "words"),
    [
        ({"time": (datetime.now(UTC) + timedelta(days=3)).isoformat()}, "in the future"),
        ({"time": 1e18}, "in the future"),
        ({"time": -1}, "before 1970"),
        ({"time": "yesterday"}, "is not a time"),
        ({"time": True}, "time"),
        ({"item": ""}, "item"),
        ({"key": ""}, "key"),
        ({"rating": 5}, "rating"),
    ],
)
def test_of_a_list_with_a_wrong_event_nothing_is_stored(unchanged, event, words):
    client, workspace = unchanged
    good = {"user": "a", "item": "i1"}
    refused = client.post("/v1/events", json=[good, {**good, **event}])
    assert refused.status_code == 422
    assert words in refused.json()["detail"]
    with ReceivedEvents(workspace.events_file) as received:
        assert received.count() == 0


def test_a_full_disk_refuses_events_and_recommendations_go_on(client, copy):
    assert client.post("/v1/events", json={"user": "a", "item": "i1"}).status_code == 200
    pages = sqlite3.connect(copy.events_file).execute("PRAGMA page_count").fetchone()[0]
    client.service.received._writer.execute(f"PRAGMA max_page_count = {pages}")  # SQLite then says it is full
    events = [{"user": "a", "item": "i2", "key": f"{number}"} for number in range(1000)]
    refused = client.post("/v1/events", json=events)
    assert refused.status_code == 507
    assert "nothing was stored" in refused.json()["detail"]
    answer = client.post("/v1/recommend", json={"user": "a"})
    assert answer.json()["source"] == "model"
    assert len(stored(copy, "a")) == 1
    client.service.received._writer.execute("PRAGMA max_page_count = 100000")
    assert client.post("/v1/events", json=events).json()["new"] == 1000


def test_two_servers_share_one_event_file(serving, copy):
    first, second = serving(copy.root, ready=False), serving(copy.root, ready=False)
    reader = serving(copy.root, ready=False, read_only=True)
    event = {"user": "a", "item": "i1", "time": 5}
    assert first.post("/v1/events", json=event).json()["new"] == 1
    assert second.post("/v1/events", json=event).json()["duplicates"] == 1
    for server in (first, second, reader):
        assert server.post("/v1/recommend", json={"user": "a"}).json()["reason"] == "loading"  # known
    refused = reader.post("/v1/events", json=event)
    assert refused.status_code == 403
    assert "--read-only" in refused.json()["detail"]
