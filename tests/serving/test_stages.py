"""Another stage takes over while requests arrive: none fails, one stage answers each, the old model goes."""

from __future__ import annotations

import gc
import shutil
import threading
import time
import weakref
from collections.abc import Callable

import pytest
from event_logs import write_log

from peso.errors import WorkspaceError
from peso.runs import pipeline
from peso.runs.forget import forget
from peso.runs.recommender import Recommender
from peso.runs.served import promote, rollback
from peso.runs.user_histories import UserHistories
from peso.runtime.progress import Silent
from peso.serving import live

pytestmark = pytest.mark.slow

WITHIN = 60.0  # seconds, on a machine with other work


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + WITHIN
    while not condition():
        assert time.monotonic() < until, "it never became true"
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(live, "INTERVAL", 0.02)


def test_no_request_fails_and_none_is_mixed_while_stages_change(serving, copy):
    ids = copy.semantic_ids.item_ids
    histories = [ids[start : start + 4] for start in range(6)]
    expected = {
        stage: [Recommender(copy, stage).recommend(history=each) for each in histories] for stage in (0, 1)
    }
    assert expected[0] != expected[1]
    promote(copy, 0)
    client = serving(copy.root)
    old = weakref.ref(client.service.live.current.model)
    status = client.get("/v1/status").json()
    assert (status["stage"], status["promotion"]["by"], status["newest_stage"]) == (0, "promote", 1)
    stop, seen, failures = threading.Event(), set(), []

    def ask() -> None:
        while not stop.is_set():
            response = client.post("/v1/recommend", json=[{"history": each} for each in histories])
            if response.status_code != 200:
                failures.append(response.text)
                continue
            answers = response.json()
            stages = {answer["stage"] for answer in answers}
            seen.update(stages)
            for answer, wanted in zip(answers, expected[answers[0]["stage"]], strict=True):
                found = [(each["item"], pytest.approx(each["score"], abs=1e-3)) for each in answer["items"]]
                if len(stages) > 1 or answer["source"] != "model" or wanted != found:
                    failures.append(answer)

    askers = [threading.Thread(target=ask) for _ in range(4)]
    for thread in askers:
        thread.start()
    try:
        for change, stage in ((promote, 1), (rollback, 0), (promote, 1)):
            change(copy, *([stage] if change is promote else []))
            wait_for(lambda stage=stage: client.get("/v1/status").json()["stage"] == stage)
            time.sleep(0.05)
    finally:
        stop.set()
        for thread in askers:
            thread.join()
    assert failures == []
    assert seen == {0, 1}
    gc.collect()
    assert old() is None
    assert "peso_stage_changes_total 4.0" in client.get("/metrics").text


def test_a_workspace_that_is_being_updated_is_served_as_before(serving, copy):
    """The server is started, answers, takes events and changes the stage meanwhile."""
    promote(copy, 0)
    shutil.rmtree(copy.root / "stages" / "1")
    history, stop, seen = {"history": copy.semantic_ids.item_ids[:4]}, threading.Event(), []

    def ask() -> None:
        while not stop.is_set():
            answer = client.post("/v1/recommend", json=history)
            seen.append((answer.status_code, answer.json().get("source"), answer.json().get("stage")))

    with copy.lock():  # nobody else may write the workspace
        client = serving(copy.root)
        assert client.post("/v1/events", json={"user": "a", "item": "i1", "time": 5}).json()["new"] == 1
        assert client.post("/v1/recommend", json={"user": "a"}).json()["source"] == "model"
        asking = threading.Thread(target=ask)
        asking.start()
        pipeline.learn(copy.stage(1), Silent())
        stop.set()
        asking.join()
        assert set(seen) == {(200, "model", 0)}
        assert client.get("/v1/status").json()["newest_stage"] == 1
        assert promote(copy, 1)
        wait_for(lambda: client.post("/v1/recommend", json=history).json()["stage"] == 1)


def test_a_stage_that_cannot_be_loaded_leaves_the_one_before(serving, copy):
    promote(copy, 0)
    client = serving(copy.root)
    ids = copy.semantic_ids.item_ids
    weights = next((copy.root / "stages" / "1").glob("*.safetensors"))
    whole = weights.read_bytes()
    client.service.live.stop()  # so that the test alone looks
    promote(copy, 1)
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(WorkspaceError, match="damaged"):
        client.service.live.refresh()
    assert client.post("/v1/recommend", json={"history": ids[:3]}).json()["stage"] == 0
    weights.write_bytes(whole)
    client.service.live.refresh()
    assert client.post("/v1/recommend", json={"history": ids[:3]}).json()["stage"] == 1


def test_the_watch_goes_on_after_a_failure_and_the_status_tells_it(serving, copy, monkeypatch):
    monkeypatch.setattr(live, "AGAIN", 0.02)
    client = serving(copy.root)
    served = copy.root / "served.json"
    served.write_text("{}")
    wait_for(lambda: client.get("/v1/status").json()["problem"] is not None)
    assert "served.json is damaged" in client.get("/v1/status").json()["problem"]
    served.unlink()
    promote(copy, 0)
    wait_for(lambda: client.get("/v1/status").json()["stage"] == 0)
    assert client.get("/v1/status").json()["problem"] is None


def test_without_a_promotion_the_newest_trained_stage_serves(serving, copy):
    stage = copy.root / "stages" / "1"
    shutil.move(stage, copy.root / "aside")
    client = serving(copy.root)
    assert client.get("/v1/status").json()["stage"] == 0
    shutil.move(copy.root / "aside", stage)
    wait_for(lambda: client.get("/v1/status").json()["stage"] == 1)


def test_a_pinned_stage_stays(serving, copy):
    client = serving(copy.root, stage=1)
    promote(copy, 0)
    time.sleep(0.2)
    client.service.live.refresh()
    status = client.get("/v1/status").json()
    assert (status["stage"], status["pinned"]) == (1, True)


def test_items_that_come_with_an_append_are_known_while_requests_go_on(serving, copy, tmp_path, peso):
    """The stage that serves stays the same, as where a gate refuses the next one."""
    client, (user, *_) = serving(copy.root), copy.stream.stage(1).users
    known, last = copy.semantic_ids.item_ids[:3], int(copy.stream.manifest["time"]["last"]) // 1_000_000
    new = write_log(tmp_path / "new.csv", [(user, item, last + 60) for item in (*known, "brand-new")])
    stop, codes = threading.Event(), []

    def ask() -> None:
        while not stop.is_set():
            codes.append(client.post("/v1/recommend", json={"user": user}).status_code)

    asker = threading.Thread(target=ask)
    asker.start()
    try:
        assert client.get("/v1/items/brand-new").status_code == 404
        appended = peso("ingest", new, "--append", "--set", "data.format=csv", "-w", copy.root)
        assert appended[0] == 0, appended
        tokenized = peso("tokenize", "--append", "-w", copy.root)
        assert tokenized[0] == 0, tokenized
        wait_for(lambda: client.get("/v1/items/brand-new").status_code == 200)
    finally:
        stop.set()
        asker.join()
    assert set(codes) == {200}
    answer = client.post("/v1/recommend", json={"user": user, "allow": ["brand-new"], "exclude_seen": False})
    assert [each["item"] for each in answer.json()["items"]] == ["brand-new"]
    assert answer.json()["stage"] == 1


def test_the_status_says_whether_the_promoted_stage_is_pinned(serving, copy):
    for pinned in (False, True):
        promote(copy, 0, pinned=pinned)
        status = serving(copy.root).get("/v1/status").json()
        assert (status["promotion"]["pinned"], status["pinned"]) == (pinned, False)  # no --stage
        promote(copy, 1)


def test_prompts_of_users_are_dropped_when_the_stream_changes_or_the_user_is_gone(serving, copy):
    client = serving(copy.root)
    user, prompts = copy.stream.stage(1).users[0], client.service.live.current.prompts
    client.post("/v1/recommend", json={"user": user})
    assert len(prompts) == 1
    manifest = copy.root / "stream" / "manifest.json"
    shutil.copy2(manifest, copy.root / "other")
    (copy.root / "other").rename(manifest)
    wait_for(lambda: client.service.live.current.prompts is not prompts)
    prompts = client.service.live.current.prompts
    assert (len(prompts), prompts.used) == (0, 0)
    client.post("/v1/recommend", json={"user": user})
    assert client.service.live.current.prompts is prompts
    prompts._kept["gone"] = prompts._kept[user]
    prompts.used *= 2
    client.post("/v1/recommend", json={"user": "gone"})
    assert list(prompts._kept) == [user]


def test_the_first_answer_after_an_erasure_does_not_know_the_user(serving, copy):
    user, other = list(UserHistories(copy))[:2]
    client = serving(copy.root)
    wait_for(lambda: client.service.live.is_ready)
    for each in (user, other, user):
        assert client.post("/v1/recommend", json={"user": each}).json()["source"] == "model"
    before = client.service.live.current
    assert len(before.prompts) == 2
    counted = before.prompts.computed

    with copy.lock():
        forget(copy, user, Silent())
    wait_for(lambda: client.service.live.current is not before)  # no request meanwhile

    after = client.service.live.current
    assert (len(after.prompts), after.prompts.computed) == (0, counted)
    assert client.get("/v1/users", params={"prefix": user}).json()["users"] == []
    answer = client.post("/v1/recommend", json={"user": user}).json()
    assert (answer["source"], answer["reason"]) == ("popularity", "unknown_user")
    assert client.post("/v1/recommend", json={"user": other}).json()["source"] == "model"
