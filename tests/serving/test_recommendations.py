"""Answers over HTTP are those of the stage, and say what they rest on."""

from __future__ import annotations

import pytest

from peso.runs.recommender import Recommender
from peso.serving import messages


@pytest.fixture(scope="module")
def recommender(shop) -> Recommender:
    return Recommender(shop)


def ask(client, **request):
    return client.post("/v1/recommend", json=request)


def pairs(answer: dict) -> list[tuple[str, float]]:
    return [(each["item"], pytest.approx(each["score"], abs=1e-4)) for each in answer["items"]]


def scores(answer: dict) -> list[tuple[str, float]]:
    return [(each["item"], each["score"]) for each in answer["items"]]


@pytest.mark.slow
def test_an_answer_is_what_the_recommender_says(client, recommender):
    ids = recommender.semantic_ids.item_ids
    answer = ask(client, history=ids[:5], k=7, titles=True).json()
    assert recommender.recommend(history=ids[:5], k=7) == pairs(answer)
    assert (answer["stage"], answer["source"], answer.get("reason")) == (1, "model", None)
    assert [each["title"] for each in answer["items"]] == [
        recommender.title(each["item"]) for each in answer["items"]
    ]
    user = next(iter(recommender.histories))
    assert recommender.recommend(user=user) == pairs(ask(client, user=user).json())


def test_several_requests_get_the_answers_of_each_alone(client, recommender):
    ids = recommender.semantic_ids.item_ids
    requests = [
        {"history": ids[:3]},
        {"history": ids[5:9], "k": 25},
        {"history": ids[5:9], "allow": ids[20:30], "k": 4},
        {"history": ids[7:8], "exclude_seen": True},
        {"history": ids[7:8], "exclude_seen": False},
        {"history": []},
    ]
    together = client.post("/v1/recommend", json=requests).json()
    for request, answer in zip(requests, together, strict=True):
        assert pairs(answer) == [
            (each["item"], each["score"]) for each in ask(client, **request).json()["items"]
        ]
        assert len(answer["items"]) == request.get("k", 10)


def test_filters_leave_as_many_items_as_there_are(client, recommender):
    """They are part of the search: what it finds is not thinned out afterwards."""
    ids = recommender.semantic_ids.item_ids
    allow = ids[30:42]
    items = [each["item"] for each in ask(client, history=ids[:4], allow=allow, k=12).json()["items"]]
    assert sorted(items) == sorted(allow)
    best = [each["item"] for each in ask(client, history=ids[:4], k=10).json()["items"]]
    others = [each["item"] for each in ask(client, history=ids[:4], k=10, deny=best).json()["items"]]
    assert len(others) == 10
    assert not set(others) & set(best)
    both = ask(client, history=ids[:4], allow=allow, deny=allow[:2], k=12).json()["items"]
    assert {each["item"] for each in both} == set(allow[2:])
    nothing = ask(client, history=ids[:4], allow=["gone", "lost"]).json()
    assert (nothing["source"], nothing["items"], nothing["unknown_items"]) == ("model", [], ["gone", "lost"])
    none_left = ask(client, history=ids[:4], allow=allow, deny=allow).json()
    assert (none_left["source"], none_left["items"]) == ("model", [])
    seen = ask(client, history=ids, exclude_seen=True).json()
    assert (seen["source"], seen["items"]) == ("model", [])


def test_unknown_items_are_skipped_and_named_or_refused(client, recommender):
    ids = recommender.semantic_ids.item_ids
    answer = ask(
        client, history=["gone", *ids[:3], "gone"], allow=["lost", *ids[9:20]], deny=["never"]
    ).json()
    assert answer["unknown_items"] == ["gone", "lost", "never"]
    assert pairs(answer) == [
        (each["item"], each["score"])
        for each in ask(client, history=ids[:3], allow=ids[9:20]).json()["items"]
    ]
    refused = ask(client, history=["gone", *ids[:3]], unknown="refuse")
    assert refused.status_code == 422
    assert "'gone'" in refused.json()["detail"]
    nothing = ask(client, history=ids[:3], allow=["lost"]).json()
    assert (nothing["items"], nothing["unknown_items"]) == ([], ["lost"])


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        ({"history": []}, "empty_history"),
        ({"history": ["gone"]}, "empty_history"),
        ({"user": "who"}, "unknown_user"),
    ],
)
def test_who_has_no_history_gets_popular_items_and_is_told(client, shop, recommender, request_, reason):
    answer = ask(client, **request_).json()
    assert (answer["source"], answer["reason"], answer["stage"]) == ("popularity", reason, 1)
    ids, events = recommender.semantic_ids.item_ids, shop.stream.stage(1).current.values.tolist()
    counts = [events.count(ids.index(each["item"])) for each in answer["items"]]
    assert counts == sorted((events.count(row) for row in range(len(ids))), reverse=True)[:10]
    best = answer["items"][0]["item"]
    filtered = ask(client, **request_, deny=[best]).json()["items"]
    assert filtered[0] == answer["items"][1]
    assert [each["item"] for each in ask(client, **request_, allow=[best]).json()["items"]] == [best]


@pytest.mark.slow
def test_a_model_that_is_loading_is_stood_in_for(serving, shop, recommender):
    client = serving(shop.root, ready=False, read_only=True)
    ids = recommender.semantic_ids.item_ids
    answer = ask(client, history=ids[:3]).json()
    assert (answer["source"], answer["reason"], answer["stage"]) == ("popularity", "loading", 1)
    assert not recommender.leaves_out_seen or not {each["item"] for each in answer["items"]} & set(ids[:3])
    assert client.get("/readyz").status_code == 503
    assert client.get("/v1/status").json()["model"] == "loading"
    client.service.live.refresh()
    assert ask(client, history=ids[:3]).json()["source"] == "model"
    assert client.get("/readyz").status_code == 200


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"history": ["i1"], "k": 61}, "60 items of the catalog"),
        ({"history": ["i1"], "k": 0}, "k: "),
        ({"history": ["i1"], "k": messages.MOST_K + 1}, "k: "),
        ({"history": ["i1"], "allow": []}, "allow: "),
        ({"history": ["i1"] * (messages.MOST_ITEMS + 1)}, "history: "),
        ({"history": ["i1"], "deny": ["i2"] * (messages.MOST_LISTED + 1)}, "deny: "),
        ([{"history": []}] * (messages.MOST_REQUESTS + 1), "at most 64"),
        ([], "at least 1"),
        ([{"history": ["i1"]}, {"history": ["i1"], "k": 61}], "request 1: k = 61"),
        ({"history": ["i" * (messages.ID_LENGTH + 1)]}, "history.0: "),
        ({"history": [""]}, "history.0: "),
        ({"history": ["a\0b"]}, "null character"),
        ({"history": [25]}, "history.0: "),
        ({"user": "u1", "history": []}, "either user or history"),
        ({}, "either user or history"),
        ({"history": None}, "either user or history"),
        ({"user": None}, "either user or history"),
        ({"history": ["i1"], "allow": 5}, "allow: "),
        ({"user": "u1", "top": 5}, "top: "),
        ("u1", "must be a JSON object"),
        ([["u1"]], "0: must be a JSON object"),
        (None, "a body of JSON, with the header Content-Type"),
    ],
)
def test_an_impossible_request_is_refused_with_the_reason(client, body, words):
    refused = client.post("/v1/recommend", json=body)
    assert refused.status_code == 422
    assert words in refused.json()["detail"]


@pytest.mark.parametrize(
    ("kind", "content", "status", "words"),
    [
        ("application/json", b'{"history": ["i1"]', 400, "the body is not JSON: Expecting"),
        ("application/json", b"\xff", 400, "error parsing the body"),
        ("application/x-www-form-urlencoded", b'{"history": ["i1"]}', 422, "Content-Type: application/json"),
        ("text/plain", b"", 422, "Content-Type: application/json"),
    ],
)
def test_a_body_that_is_not_json_is_refused_with_the_reason(client, kind, content, status, words):
    refused = client.post("/v1/recommend", content=content, headers={"content-type": kind})
    assert refused.status_code == status, refused.text
    assert words in refused.json()["detail"]


def test_an_item_is_described(client, recommender):
    item = recommender.semantic_ids.item_ids[7]
    assert client.get(f"/v1/items/{item}").json() == {
        "stage": 1,
        "item": item,
        "title": recommender.title(item),
        "semantic_id": recommender.semantic_id(item),
    }
    for unknown in ("gone", "..%2F..%2Fconfig.yaml", "%00", "a/b"):
        assert client.get(f"/v1/items/{unknown}").status_code in (404, 422)


def test_the_status_says_who_answers(client):
    status = client.get("/v1/status").json()
    assert status["stage"] == status["newest_stage"] == 1
    assert (status["model"], status["pinned"], status["items"]) == ("ready", False, 60)
    assert client.get("/healthz").text == "ok\n"


@pytest.mark.slow
def test_a_pinned_stage_answers(serving, shop):
    client = serving(shop.root, stage=0, read_only=True)
    ids = shop.semantic_ids.item_ids
    answer = ask(client, history=ids[:3]).json()
    assert answer["stage"] == 0
    assert Recommender(shop, 0).recommend(history=ids[:3]) == pairs(answer)
    assert client.get("/v1/status").json()["pinned"]


def test_the_metrics_count_requests_answers_and_batches(client, shop):
    def counted() -> dict[str, float]:
        lines = client.get("/metrics").text.splitlines()
        return {
            name: float(count)
            for name, _, count in (line.rpartition(" ") for line in lines if line[0] != "#")
        }

    before, ids = counted(), shop.semantic_ids.item_ids
    ask(client, history=ids[:3])
    ask(client, history=[])
    ask(client, history=[], k=0)
    after = counted()
    for name, more in {
        'peso_requests_total{route="/v1/recommend",status="200"}': 2,
        'peso_requests_total{route="/v1/recommend",status="422"}': 1,
        'peso_answers_total{reason="",source="model"}': 1,
        'peso_answers_total{reason="empty_history",source="popularity"}': 1,
        "peso_batch_questions_count": 2,
    }.items():
        assert after[name] - before.get(name, 0) == more
    assert after["peso_stage"] == 1
