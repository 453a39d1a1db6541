"""The explorer: its files, its headers, what it shows, and who may change the stage that serves."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from importlib.resources import files

import pytest
from html_page import Page

from peso.runs.served import promote, served
from peso.serving import before as before_module
from peso.serving.explorer import PAGE
from peso.serving.tokens import Tokens

pytestmark = pytest.mark.slow

TOKEN = "a-token-of-the-shop"
BEARER = {"authorization": f"Bearer {TOKEN}"}
WITHIN = 60.0  # seconds, on a machine with other work


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + WITHIN
    while not condition():
        assert time.monotonic() < until, "it never became true"
        time.sleep(0.01)


@pytest.fixture
def tokens() -> Tokens:
    return Tokens([TOKEN], "the test")


def test_the_page_needs_no_token_and_allows_only_files_of_its_server(serving, shop, tokens):
    client = serving(shop.root, tokens=tokens, host="0.0.0.0", ready=False, read_only=True)
    for path, (_, kind) in PAGE.items():
        answer = client.get(path)
        assert (answer.status_code, answer.headers["content-type"]) == (200, kind)
        policy = answer.headers["content-security-policy"].split("; ")
        assert {"default-src 'self'", "frame-ancestors 'none'", "form-action 'none'"} <= set(policy)
        assert "unsafe" not in " ".join(policy)
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
    assert client.get("/page/..%2findex.html").status_code == 401
    assert client.get("/v1/stages").status_code == 401
    assert client.post("/v1/compare", json={"user": "a"}).status_code == 401


def test_every_file_of_the_page_is_served_and_nothing_comes_from_elsewhere(client):
    folder = files("peso.serving") / "page"
    assert {name for name, _ in PAGE.values()} == {file.name for file in folder.iterdir()}
    html = client.get("/").text
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    assert page.references <= set(page.ids)
    for address in page.addresses:
        assert address.startswith("#") or f"/{address}" in PAGE
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=", html)  # nothing inline
    for path in PAGE:
        text = client.get(path).text.replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|@import|url\(", text), path
        # text of the data never becomes markup
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", text), path
    scripts = "".join(client.get(path).text for path in PAGE if path.endswith(".js"))
    assert set(re.findall(r'\bat\("([\w-]+)"\)', scripts)) <= set(page.ids)


def test_two_stages_answer_the_same_history(serving, shop):
    client, ids = serving(shop.root, read_only=True), shop.semantic_ids.item_ids
    asked = {"history": [ids[0], ids[1], "nothing"], "k": 5}
    first = client.post("/v1/compare", json=asked).json()
    assert first["before_stage"] == 0
    if first["before_state"] == "loading":
        assert first["before"] is None
    wait_for(lambda: client.post("/v1/compare", json=asked).json()["before_state"] == "ready")
    found = client.post("/v1/compare", json=asked).json()
    assert [each["item"] for each in found["history"]] == asked["history"]
    assert found["history"][2]["semantic_id"] is None
    assert found["history"][0]["semantic_id"] == shop.semantic_ids.semantic_id(ids[0])
    assert (found["serving"]["stage"], found["before"]["stage"]) == (1, 0)
    alone = client.post("/v1/recommend", json=asked | {"titles": True}).json()
    for shown, item in zip(found["serving"]["items"], alone["items"], strict=True):
        assert (shown["item"], shown["title"]) == (item["item"], item["title"])
        assert shown["score"] == pytest.approx(item["score"], abs=1e-3)
    assert found["before"]["items"] != found["serving"]["items"]
    with serving_stage_0(client) as other:
        wanted = other.post("/v1/recommend", json=asked).json()["items"]
    assert [each["item"] for each in found["before"]["items"]] == [each["item"] for each in wanted]


def serving_stage_0(client):
    from serving_app import running

    return running(client.service.live.root, stage=0, read_only=True)


def test_the_model_of_the_stage_before_is_freed_when_nobody_asks(serving, shop, monkeypatch):
    client = serving(shop.root, read_only=True)
    before = client.service.before
    wait_for(lambda: before.find().state == "ready")
    thread = before._thread
    with before._changed:
        before._kept = 0.0
        before._changed.notify_all()
    thread.join(WITHIN)
    assert before._held is None
    assert before.find().state == "loading"


def test_a_stage_that_cannot_be_loaded_is_not_tried_at_every_request(serving, shop, monkeypatch):
    client = serving(shop.root, read_only=True)
    tried = []

    def broken(stage):
        tried.append(stage)
        raise OSError("gone")

    monkeypatch.setattr(client.service.live, "another", broken)
    wait_for(lambda: client.service.before.find().state == "failed")
    answer = client.post("/v1/compare", json={"history": shop.semantic_ids.item_ids[:2]}).json()
    assert (answer["before_state"], answer["before"], len(tried)) == ("failed", None, 1)
    monkeypatch.setattr(before_module, "AGAIN", 0.0)
    wait_for(lambda: client.service.before.find() and len(tried) > 1)


def test_the_lineage_tells_who_serves_and_names_no_place(client, shop):
    found = client.get("/v1/stages")
    assert str(shop.root) not in found.text
    lineage = found.json()
    assert [(each["stage"], each["parent"], each["serves"]) for each in lineage["stages"]] == [
        (0, None, False),
        (1, 0, True),
    ]
    assert "--read-only" in lineage["refusal"]


def test_promotion_and_rollback_need_a_token_and_are_recorded(serving, copy, tokens):
    client = serving(copy.root, tokens=tokens)
    body = {"stage": 0, "reason": "<b>calmer</b>"}
    assert client.post("/v1/promote", json=body).status_code == 401
    assert client.post("/v1/rollback", json={"reason": "no"}).status_code == 401
    assert client.post("/v1/rollback", json={"reason": "no"}, headers=BEARER).status_code == 409
    assert served(copy).latest is None
    done = client.post("/v1/promote", json=body, headers=BEARER)
    assert done.json() == {"stage": 0, "changed": True, "reason": "<b>calmer</b> (token 1 over HTTP)"}
    wait_for(lambda: client.get("/v1/status", headers=BEARER).json()["stage"] == 0)
    assert client.post("/v1/promote", json=body, headers=BEARER).json()["changed"] is False
    latest = served(copy).latest
    assert (latest.stage, latest.by, latest.reason) == (0, "promote", "<b>calmer</b> (token 1 over HTTP)")
    assert client.get("/v1/stages", headers=BEARER).json()["previous"] == 1
    wrong = client.post("/v1/rollback", json={"reason": "back", "stage": 0}, headers=BEARER)
    assert (wrong.status_code, "stage 1" in wrong.json()["detail"]) == (409, True)
    back = client.post("/v1/rollback", json={"reason": "back", "stage": 1}, headers=BEARER)
    assert (back.status_code, served(copy).latest.by, served(copy).current) == (200, "rollback", 1)
    for refused, code in (
        ({"stage": 9}, 404),
        ({"stage": 0, "reason": "two\nlines"}, 422),
        ({"stage": -1}, 422),
    ):
        answer = client.post("/v1/promote", json={"reason": "x"} | refused, headers=BEARER)
        assert answer.status_code == code
    assert client.post("/v1/promote", json={"stage": 0}, headers=BEARER).status_code == 422  # no reason
    assert len(served(copy).changes) == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [({}, "--token-file"), ({"read_only": True}, "--read-only"), ({"stage": 1}, "--stage 1")],
)
def test_a_server_that_changes_no_stage_says_why(serving, copy, tokens, settings, words):
    client = serving(copy.root, tokens=tokens if settings else None, ready=False, **settings)
    headers = BEARER if settings else {}
    for path, body in (("promote", {"stage": 0, "reason": "x"}), ("rollback", {"reason": "x"})):
        refused = client.post(f"/v1/{path}", json=body, headers=headers)
        assert (refused.status_code, words in refused.json()["detail"]) == (403, True)
    assert words in client.get("/v1/stages", headers=headers).json()["refusal"]
    assert served(copy).latest is None


def test_a_stage_that_its_gate_refused_needs_force(serving, copy, tokens, monkeypatch):
    from peso.runs.stage import RunStage

    verdict = {"decision": "refused", "says": "worse by 0.1", "champion": 1, "time": "now"}
    monkeypatch.setattr(RunStage, "verdict", property(lambda stage: verdict if stage.number == 0 else None))
    promote(copy, 1)
    client = serving(copy.root, tokens=tokens, ready=False)
    body = {"stage": 0, "reason": "all the same"}
    refused = client.post("/v1/promote", json=body, headers=BEARER)
    assert (refused.status_code, "worse by 0.1" in refused.json()["detail"]) == (409, True)
    assert served(copy).current == 1
    assert client.post("/v1/promote", json=body | {"force": True}, headers=BEARER).status_code == 200
    assert (served(copy).current, served(copy).latest.forced) == (0, True)
