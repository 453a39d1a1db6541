"""Why an item moved, its nearest items, users by name, and drift: what the explorer asks for."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from peso.decoding import search
from peso.model.item_head import ItemHead
from peso.runs.diagnosis import stream_drift
from peso.serving.explain import ItemTexts, Likelihood, likelihood, near_by_codes, near_by_head, reason

pytestmark = pytest.mark.slow

WITHIN = 60.0  # seconds, on a machine with other work


@pytest.fixture(scope="module")
def compared(client, shop):
    """A client of a server with both models in memory, and a request."""
    asked = {"history": shop.semantic_ids.item_ids[:3]}
    until = time.monotonic() + WITHIN
    while client.post("/v1/compare", json=asked).json()["before_state"] != "ready":
        assert time.monotonic() < until
        time.sleep(0.01)
    return client, asked


def test_an_explanation_adds_up_under_both_stages(compared, shop):
    client, asked = compared
    lists = client.post("/v1/compare", json=asked).json()
    listed = lists["serving"]["items"][0]
    found = client.post("/v1/explain", json=asked | {"item": listed["item"]}).json()
    for view, stage in ((found["serving"], 1), (found["before"], 0)):
        assert view["stage"] == stage
        assert [code["code"] for code in view["codes"]] == shop.semantic_ids.semantic_id(listed["item"])
        total = sum(code["log_probability"] for code in view["codes"])
        assert view["score"] == pytest.approx(total, abs=1e-4)  # this shop has no item head
        model = shop.stage(stage).answering_model()
        rows = [shop.semantic_ids.rows(asked["history"])]
        wanted = search(model, rows, targets=shop.semantic_ids.rows([listed["item"]])).target_scores
        assert view["score"] == pytest.approx(float(wanted[0]), abs=1e-3)
    assert found["serving"]["score"] == pytest.approx(listed["score"], abs=1e-3)
    assert "log-probability" in found["says"]
    stream, row = shop.stream, shop.semantic_ids.row(listed["item"])
    assert found["events"] == {str(n): int(stream.item_counts(n)[row]) for n in range(2)}


def test_nearest_items_have_the_most_similar_texts(compared, shop):
    client, asked = compared
    titles = dict(zip(shop.semantic_ids.item_ids, shop.stream.titles, strict=False))
    for item in shop.semantic_ids.item_ids[:5]:
        found = client.post("/v1/explain", json=asked | {"item": item}).json()
        assert found["nearest_by"] == "texts"
        similar = [near["similarity"] for near in found["nearest"]]
        assert similar == sorted(similar, reverse=True)
        assert all(0 < value <= 1.0001 for value in similar)
        assert item not in [near["item"] for near in found["nearest"]]
        words = set(titles[item].lower().split())
        nearest = set(titles[found["nearest"][0]["item"]].lower().split())
        assert len(words & nearest) >= 2, (titles[item], nearest)


def test_without_texts_the_codes_tell(compared, shop, monkeypatch):
    client, asked = compared
    snapshot, ids = client.service.live.current, shop.semantic_ids
    codes = ids.codes
    for item in ids.item_ids[:5]:
        near = near_by_codes(snapshot, item)
        same = [codes[ids.row(other)] == codes[ids.row(item)] for other, _ in near]
        shared = [[*each, False].index(False) / codes.shape[1] for each in same]
        assert [score for _, score in near] == pytest.approx(shared)
        assert shared == sorted(shared, reverse=True)
    monkeypatch.setattr(ItemTexts, "near", lambda *_: None)
    found = client.post("/v1/explain", json=asked | {"item": ids.item_ids[0]}).json()
    assert found["nearest_by"] == "codes"
    assert near_by_head(snapshot, ids.item_ids[0]) is None


def test_with_an_item_head_its_vectors_tell_and_its_part_is_shown(client, shop, monkeypatch):
    snapshot, ids = client.service.live.current, shop.semantic_ids
    model = shop.stage(1).model()
    model.vocabulary.item_head = head = ItemHead(ids, model.vocabulary.output_rows.shape[1])
    head.initialise(0)
    with_head = replace(snapshot, model=model)
    vectors = head.vectors().detach().numpy()
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for row in (0, 7, 30):
        similar = vectors @ vectors[row]
        similar[row] = -np.inf
        near = near_by_head(with_head, ids.item_ids[row])
        assert near is not None
        assert [item for item, _ in near] == [ids.item_ids[other] for other in np.argsort(-similar)[:5]]
        assert [score for _, score in near] == pytest.approx(np.sort(similar)[::-1][:5].tolist(), abs=1e-5)
    found = likelihood(with_head, ids.item_ids[:3], ids.item_ids[7])
    assert found is not None
    assert found.head is not None
    assert found.score == pytest.approx(sum(found.codes) + found.head)
    assert abs(found.head) > 1e-4
    monkeypatch.setattr(client.service.live, "current", with_head)
    asked = {"history": ids.item_ids[:3], "item": ids.item_ids[7]}
    shown = client.post("/v1/explain", json=asked).json()
    assert shown["serving"]["item_head"] == pytest.approx(found.head, abs=1e-5)
    if shown["before"] is not None:
        assert shown["before"]["item_head"] is None


def test_what_cannot_be_explained_is_refused_or_says_so(compared, shop):
    client, asked = compared
    unknown = client.post("/v1/explain", json=asked | {"item": "nothing"})
    assert (unknown.status_code, "does not know the item 'nothing'" in unknown.text) == (404, True)
    assert client.post("/v1/explain", json={"item": "i1"}).status_code == 422
    assert client.post("/v1/explain", json=asked).status_code == 422
    item = shop.semantic_ids.item_ids[0]
    nobody = client.post("/v1/explain", json={"user": "nobody", "item": item}).json()
    assert (nobody["serving"]["score"], nobody["serving"]["codes"]) == (None, [])
    assert len(nobody["nearest"]) == 5


def test_the_reason_names_what_moved_the_score_most(compared):
    client, _ = compared
    now = client.service.live.current
    item = now.semantic_ids.item_ids[0]
    _, second, third = now.semantic_ids.semantic_id(item)

    def told(after: list[float], former: list[float], extra: float = 0.0) -> str:
        new = Likelihood(sum(after) + extra, after, bool(extra))
        return reason(item, (now, new), (now, Likelihood(sum(former), former, False)), {0: 3, 1: 1200})

    assert f"rose by 1.00 (from -6.00 to -5.00), mostly through the second code {second}" in told(
        [-1, -1, -3], [-1, -2, -3]
    )
    assert f"fell by 1.00 (from -6.00 to -7.00), mostly through the third code {third} (-2.00)" in told(
        [-1, -1, -5], [-2, -1, -3]
    )
    assert "mostly through the item head (+2.00)" in told([-1, -1, -5], [-1, -1, -5], 2.0)
    assert "stayed the same (-3.00)" in told([-1, -1, -1], [-1, -1, -1])
    assert "Events of the item: 3 in stage 0, 1,200 in stage 1." in told([-1, -1, -2], [-1, -1, -1])


def test_users_come_page_by_page_with_those_of_received_events(serving, copy):
    client = serving(copy.root, ready=False)
    events = [{"user": name, "item": "i1", "time": 5} for name in ("ü", "aaa", "zzz")]
    assert client.post("/v1/events", json=events).status_code == 200
    known = {user for n in range(copy.stream.stages) for user in copy.stream.stage(n).users} | {
        "ü",
        "aaa",
        "zzz",
    }
    found, after = [], None
    while True:
        asked = {"limit": 7} | ({} if after is None else {"after": after})
        page = client.get("/v1/users", params=asked).json()
        found += page["users"]
        if (after := page["after"]) is None:
            break
        assert len(page["users"]) == 7
    assert [each["user"] for each in found] == sorted(known, key=lambda name: name.encode())
    for each in found[::10]:
        compared = client.post("/v1/compare", json={"user": each["user"]}).json()
        assert each["items"] == compared["history_length"]
    for prefix in ("u1", "aaa", "ü", "nobody"):
        page = client.get("/v1/users", params={"prefix": prefix, "limit": 100}).json()
        assert {each["user"] for each in page["users"]} == {name for name in known if name.startswith(prefix)}
    assert client.get("/v1/users", params={"limit": 101}).status_code == 422


def test_drift_is_that_of_diagnose_and_computed_once(client, shop, monkeypatch):
    expected = stream_drift(shop)
    found = client.get("/v1/drift").json()
    assert found["high"] is None
    for stage, wanted in zip(found["stages"], expected, strict=True):
        assert stage == {key: wanted[key] for key in stage}
    assert found["stages"][0]["item_divergence"] is None
    assert np.isfinite(found["stages"][1]["item_divergence"])
    monkeypatch.setattr("peso.serving.insight.stream_drift", lambda *_: pytest.fail("computed again"))
    assert client.get("/v1/drift").json() == found
