"""`peso serve --with hybrid`: the answers of `peso recommend --with`, under every rule of the server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving_app import running
from starlette.testclient import TestClient
from test_stages import wait_for

from peso import Recommender
from peso.config.baselines import read_baseline
from peso.errors import ConfigError, WorkspaceError
from peso.runs.baselines import run_baselines
from peso.runs.retired import retire
from peso.runs.served import promote, serving_stage
from peso.runs.workspace import Workspace
from peso.runtime.progress import Silent
from peso.serving import live
from peso.serving.tokens import Tokens

pytestmark = pytest.mark.slow  # a hybrid on top of a whole run

MIXED = {
    "name": "hybrid",
    "candidates": 10,
    "weight": [0.3, 0.4],
    "partners": [{"name": "popularity", "last": 1}, "item-graph"],
}
LABEL = "hybrid candidates=10 weight=0.3+0.4 partners=popularity last=1+item-graph"
TOKEN = {"authorization": "Bearer a-secret-of-the-test"}


@pytest.fixture(scope="module")
def mixed(shop: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """With a hybrid for both stages. Not to be changed."""
    root = tmp_path_factory.mktemp("mixed") / "w"
    shutil.copytree(shop.root, root)
    workspace = Workspace.open(root)
    with workspace.lock():
        run_baselines(workspace, [read_baseline(MIXED)], Silent())
    return workspace


@pytest.fixture
def own(mixed: Workspace, tmp_path: Path) -> Workspace:
    shutil.copytree(mixed.root, tmp_path / "w")
    return Workspace.open(tmp_path / "w")


@pytest.fixture(scope="module")
def client(mixed: Workspace) -> Iterator[TestClient]:
    with running(mixed.root, read_only=True, hybrid="hybrid") as client:
        yield client


def ask(client: TestClient, request: object) -> list[dict]:
    response = client.post("/v1/recommend", json=request)
    assert response.status_code == 200, response.text
    found = response.json()
    return found if isinstance(found, list) else [found]


def items(answer: dict) -> list[str]:
    return [each["item"] for each in answer["items"]]


def rounded(found: list[tuple[str, float]]) -> list[tuple[str, float]]:
    return [(item, round(score, 4)) for item, score in found]


def as_pairs(answer: dict) -> list[tuple[str, float]]:
    return rounded([(each["item"], each["score"]) for each in answer["items"]])


def test_answers_are_those_of_recommend_with_the_hybrid(client, mixed, peso):
    expected = Recommender(mixed, hybrid="hybrid")
    users, ids = mixed.stream.stage(1).users[:4], mixed.semantic_ids.item_ids
    requests = [{"user": user, "k": k} for user in users for k in (3, 15)]
    requests += [{"history": ids[:5], "k": 5}, {"history": ids[:5], "k": 5, "exclude_seen": False}]
    together = ask(client, requests)
    for request, answer in zip(requests, together, strict=True):
        k = request.pop("k")
        given = {"history": None, "exclude_seen": None, **request}
        assert (answer["source"], answer["stage"]) == ("hybrid", 1)
        assert rounded(expected.recommend(given.pop("history"), k=k, **given)) == as_pairs(answer)
        (alone,) = ask(client, {**request, "k": k})
        assert as_pairs(alone) == as_pairs(answer)  # whoever else asks
    assert together[0] != ask(client, {"user": users[1], "k": 3})[0]
    told = client.get("/v1/status").json()
    assert (told["hybrid"], told["model"]) == (LABEL, "ready")
    asked = ("recommend", "-w", mixed.root, "--user", users[0], "-k", "3", "--with", LABEL, "--json")
    status, out, _ = peso(*asked)
    assert status == 0
    assert [each["item"] for each in json.loads(out)["recommendations"]] == items(together[0])


def test_filters_are_part_of_the_search(client, serving, own, tmp_path):
    ids = own.semantic_ids.item_ids
    history = ids[:4]
    (plain,) = ask(client, {"history": history, "k": 10, "exclude_seen": True})
    denied = items(plain)[:7]
    (rest,) = ask(client, {"history": history, "k": 10, "deny": denied, "exclude_seen": True})
    assert len(rest["items"]) == 10
    assert items(rest)[:3] == items(plain)[7:]
    assert not {*denied, *history} & {*items(rest)}
    some = [*denied[:3], ids[50], history[0]]
    filters = {"allow": some, "deny": denied[:1], "exclude_seen": True}
    (allowed,) = ask(client, {"history": history, "k": 10, **filters})
    assert sorted(items(allowed)) == sorted([*denied[1:3], ids[50]])
    (seen,) = ask(client, {"history": history, "k": 10, "allow": some, "exclude_seen": False})
    assert sorted(items(seen)) == sorted(some)
    (nothing,) = ask(client, {"history": history, "allow": ["gone"]})
    assert (nothing["source"], nothing["items"]) == ("hybrid", [])
    (everything,) = ask(client, {"history": history, "k": len(ids), "exclude_seen": False})
    assert {*items(everything)} == {*ids}
    (nobody,) = ask(client, {"user": "nobody"})
    assert (nobody["source"], nobody["reason"]) == ("popularity", "unknown_user")

    stock = tmp_path / "stock.txt"
    stock.write_text("\n".join(denied))
    retire(own, denied[:2])
    stocked = serving(own.root, read_only=True, hybrid=LABEL, allow_file=stock)
    (answer,) = ask(stocked, {"history": history, "k": 10})
    assert items(answer) == denied[2:]


def test_a_received_event_changes_the_next_answer(serving, own):
    user, new = own.stream.stage(1).users[0], own.semantic_ids.item_ids[7]
    client = serving(own.root, hybrid="hybrid", prompt_memory=2**20)
    before = Recommender(own, hybrid="hybrid").history(user)
    (first,) = ask(client, {"user": user, "exclude_seen": False})
    assert client.post("/v1/events", json={"user": user, "item": new}).json()["new"] == 1
    (then,) = ask(client, {"user": user, "exclude_seen": False})
    assert first != then
    recommender = Recommender(own, hybrid="hybrid")
    assert recommender.history(user) == [*before, new]
    assert rounded(recommender.recommend(user=user, exclude_seen=False)) == as_pairs(then)


def test_a_stage_without_the_hybrid_does_not_serve_until_it_has_it(serving, own, peso, monkeypatch):
    monkeypatch.setattr(live, "INTERVAL", 0.02)
    monkeypatch.setattr(live, "AGAIN", 600.0)  # only the new hybrid makes it try again
    promote(own, 0)
    shutil.rmtree(own.root / "baselines" / LABEL / "1")  # as after an update without the hybrid
    client = serving(own.root, Tokens(["a-secret-of-the-test"], "the test"), hybrid="hybrid")
    client.headers.update(TOKEN)
    history = own.semantic_ids.item_ids[:4]
    refused = client.post("/v1/promote", json={"stage": 1, "reason": "a try", "force": True})
    assert refused.status_code == 409
    assert "was not run for stage 1" in refused.json()["detail"]
    assert str(own.root) not in refused.json()["detail"]
    assert serving_stage(own).number == 0

    status, _, err = peso("promote", "-w", own.root, "--stage", "1")
    assert status == 0
    assert f"note: {LABEL} was not run for stage 1" in err
    wait_for(lambda: client.get("/v1/status").json()["problem"] is not None)
    told = client.get("/v1/status").json()
    assert (told["stage"], told["hybrid"]) == (0, LABEL)
    assert "run `peso baseline" in told["problem"]
    (answer,) = ask(client, {"history": history})
    assert (answer["stage"], answer["source"]) == (0, "hybrid")

    with own.lock():
        run_baselines(own, [read_baseline(MIXED)], Silent())
    wait_for(lambda: client.get("/v1/status").json()["stage"] == 1)
    (now,) = ask(client, {"history": history})
    assert (now["stage"], now["source"]) == (1, "hybrid")
    assert rounded(Recommender(own, 1, hybrid=LABEL).recommend(history)) == as_pairs(now)


def test_without_a_promotion_the_newest_stage_with_the_hybrid_serves(serving, own, monkeypatch):
    """`peso update` runs a hybrid after the training; a server may start or look in between."""
    monkeypatch.setattr(live, "INTERVAL", 0.02)
    shutil.rmtree(own.root / "baselines" / LABEL / "1")
    client = serving(own.root, hybrid="hybrid")
    told = client.get("/v1/status").json()
    assert (told["stage"], told["newest_stage"], told["hybrid"]) == (0, 1, LABEL)
    assert f"{LABEL} was not run for stage 1" in told["problem"]
    assert ask(client, {"history": own.semantic_ids.item_ids[:4]})[0]["stage"] == 0
    with own.lock():
        run_baselines(own, [read_baseline(MIXED)], Silent())
    wait_for(lambda: client.get("/v1/status").json()["stage"] == 1)
    assert client.get("/v1/status").json()["problem"] is None


def test_a_hybrids_answer_is_prepared_too(serving, own):
    client, other = serving(own.root, hybrid="hybrid"), serving(own.root, hybrid="hybrid", answer_memory=0)
    user, new = own.stream.stage(1).users[0], own.semantic_ids.item_ids[7]
    wait_for(lambda: client.service.live._seen is not None)  # its first look empties memories
    ask(client, {"user": user, "k": 7})
    assert client.post("/v1/events", json={"user": user, "item": new}).json()["new"] == 1
    prepared = 'peso_remembered_answers_total{how="%s"} 1.0'
    wait_for(lambda: prepared % "prepared" in client.get("/metrics").text)
    assert ask(client, {"user": user, "k": 7}) == ask(other, {"user": user, "k": 7})
    assert prepared % "used" in client.get("/metrics").text


def test_filters_shift_the_scores_of_an_answer_and_keep_its_order(client, mixed):
    """The partners' probabilities are normalized over the items that are allowed."""
    ids = mixed.semantic_ids.item_ids
    every = {"history": ids[:4], "k": len(ids), "exclude_seen": False}
    (whole,), (part,) = ask(client, every), ask(client, {**every, "deny": ids[10:25]})
    left = [item for item in items(whole) if item not in ids[10:25]]
    assert items(part) == left
    before = {each["item"]: each["score"] for each in whole["items"]}
    shifts = [each["score"] - before[each["item"]] for each in part["items"]]
    assert shifts[0] > 0
    assert shifts == pytest.approx([shifts[0]] * len(shifts), abs=1e-4)


def test_the_comparison_is_of_two_hybrids_and_the_explanation_says_what_it_explains(client, mixed):
    asked = {"history": mixed.semantic_ids.item_ids[:4], "k": 5}
    wait_for(lambda: client.post("/v1/compare", json=asked).json()["before_state"] == "ready")
    found = client.post("/v1/compare", json=asked).json()
    for stage, part in ((1, "serving"), (0, "before")):
        assert (found[part]["stage"], found[part]["source"]) == (stage, "hybrid")
        expected = Recommender(mixed, stage, hybrid="hybrid").recommend(asked["history"], k=5)
        assert rounded(expected) == as_pairs(found[part])
    item = found["serving"]["items"][0]["item"]
    explained = client.post("/v1/explain", json={"history": asked["history"], "item": item}).json()
    note = f"The list is that of {LABEL}; these log-probabilities are of its language model."
    assert explained["says"].endswith(note)


def test_a_server_does_not_start_without_its_hybrid(own, peso, shop):
    with (
        pytest.raises(WorkspaceError, match="has no hybrid; run `peso baseline hybrid"),
        running(shop.root, read_only=True, hybrid="hybrid"),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="no hybrid called 'ease'"),
        running(own.root, read_only=True, hybrid="ease"),
    ):
        pass
    promote(own, 1)
    shutil.rmtree(own.root / "baselines" / LABEL / "1")
    status, _, err = peso("serve", "-w", own.root, "--with", "hybrid", "--port", "0")
    assert status == 1
    assert "was not run for stage 1" in err
    promote(own, 0)
    with running(own.root, read_only=True, hybrid="hybrid") as client:
        assert ask(client, {"history": own.semantic_ids.item_ids[:4]})[0]["stage"] == 0
