"""Who may call, how much they may send, and that nothing which is sent breaks the server."""

from __future__ import annotations

import hashlib
import json
import logging

import pytest
from malformed_bodies import malformed

from peso.errors import UsageError
from peso.serving.guard import JsonLines, Rates
from peso.serving.server import Settings, guarded, make_service
from peso.serving.tokens import Tokens, read_tokens, require_tokens

pytestmark = pytest.mark.slow

FIRST, SECOND = "a-token-of-the-shop", "another-token-of-it"
LINES = [FIRST, "# of the robot", "sha256:" + hashlib.sha256(SECOND.encode()).hexdigest()]


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    return Tokens(LINES, "the test")


def test_a_call_needs_one_of_the_tokens(serving, shop, tokens):
    client = serving(shop.root, tokens=tokens, host="0.0.0.0", ready=False, read_only=True)
    for path in ("/v1/status", "/metrics", "/openapi.json", "/v1/items/i1", "/nothing"):
        for headers in (
            {},
            bearer(FIRST[:-1]),
            bearer(""),
            bearer("tökén"),
            {"authorization": f"Basic {FIRST}"},
        ):
            refused = client.get(path, headers={k: v.encode("latin-1") for k, v in headers.items()})
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
    for token in (FIRST, SECOND):
        assert client.get("/v1/status", headers=bearer(token)).status_code == 200
    assert client.get("/healthz").status_code == 200
    assert client.post("/v1/recommend", json={"user": "a"}).status_code == 401


def test_head_gets_the_headers_of_get_without_a_body(serving, shop, tokens, caplog):
    client = serving(shop.root, tokens=tokens, host="0.0.0.0", ready=False, read_only=True)
    item = shop.semantic_ids.item_ids[0]
    for path in ("/", "/page/page.js", "/healthz", "/readyz", "/metrics", "/v1/status", f"/v1/items/{item}"):
        got, head = (client.request(method, path, headers=bearer(FIRST)) for method in ("GET", "HEAD"))
        assert (head.status_code, head.content) == (got.status_code, b"")
        assert head.headers["content-type"] == got.headers["content-type"]
        if path != "/metrics":  # counts the requests
            assert head.headers["content-length"] == str(len(got.content))
    assert client.head("/healthz").status_code == 200
    assert client.head("/metrics").status_code == 401
    assert client.head("/nothing", headers=bearer(FIRST)).status_code == 404
    assert client.head("/v1/recommend", headers=bearer(FIRST)).status_code == 405


def test_only_loopback_is_served_without_tokens(shop, tokens):
    with pytest.raises(UsageError, match=r"--token-file.*PESO_TOKENS"):
        guarded(make_service(shop.root, Settings(read_only=True)), Settings(host="0.0.0.0"), None)
    for host in ("127.0.0.1", "::1", "localhost", "127.1.2.3"):
        require_tokens(host, None)
    for host in ("0.0.0.0", "::", "10.0.0.1", "shop.example"):
        require_tokens(host, tokens)
        with pytest.raises(UsageError):
            require_tokens(host, None)


def test_tokens_come_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("PESO_TOKENS", raising=False)
    assert read_tokens(None) is None
    monkeypatch.setenv("PESO_TOKENS", f"{FIRST}, {LINES[2]}")
    assert [read_tokens(None).place(token) for token in (FIRST, SECOND, "x" * 20)] == [0, 1, None]
    file = tmp_path / "tokens"
    file.write_text("\n".join(LINES))
    assert read_tokens(file).place(SECOND) == 1
    file.write_text(f"{FIRST}\n", encoding="utf-8-sig")
    assert read_tokens(file).place(FIRST) == 0
    for text, words in (
        ("", "has no token"),
        ("short", "line 1: a token needs at least 16"),
        (f"{FIRST}\nsha256:abc", "line 2: sha256: must be followed by 64"),
        ("with a space in between", "without spaces"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=words):
            read_tokens(file)
    with pytest.raises(UsageError, match="No such file"):
        read_tokens(tmp_path / "gone")


def test_a_web_page_does_not_reach_a_server_without_tokens(client):
    """Neither under a name of its own, nor with a body that a browser sends without asking."""
    assert client.get("/v1/status", headers={"host": "evil.example:8000"}).status_code == 421
    for host in ("localhost:8000", "127.0.0.1", "[::1]:8000"):
        assert client.get("/v1/status", headers={"host": host}).status_code == 200
    body = json.dumps({"history": ["i1"]})
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        refused = client.post("/v1/recommend", content=body, headers={"content-type": kind})
        assert refused.status_code in (415, 422)
    answer = client.get("/v1/status", headers={"origin": "https://evil.example"})
    assert not any(name.startswith("access-control") for name in answer.headers)
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_caller_that_asks_too_often_is_told_when_to_come_back(serving, shop, tokens):
    client = serving(shop.root, tokens=tokens, rate=0.5, ready=False, read_only=True)
    codes = [client.get("/v1/status", headers=bearer(FIRST)) for _ in range(3)]
    assert [answer.status_code for answer in codes] == [200, 429, 429]
    assert 1 <= int(codes[-1].headers["retry-after"]) <= 2
    assert client.get("/v1/status", headers=bearer(SECOND)).status_code == 200


def test_a_rate_is_kept_in_the_long_run_and_its_table_stays_small():
    rates, allowed = Rates(10), 0
    for step in range(1000):  # 10 seconds, 100 a second
        allowed += rates.wait("a", step / 100) == 0
    assert 100 <= allowed <= 121
    for caller in range(30_000):
        rates.wait(caller, 20.0)
    assert len(rates._left) <= 10_000
    assert Rates(0).wait("a", 0.0) == 0


def test_a_body_that_is_too_long_is_not_read(serving, shop):
    client = serving(shop.root, ready=False, read_only=True, largest_body=1000)

    for content in (b" " * 1001, iter([b" " * 100] * 11)):  # the second names no length
        refused = client.post("/v1/recommend", content=content, headers={"content-type": "application/json"})
        assert refused.status_code == 413
    assert client.post("/v1/recommend", json={"user": "a"}).status_code == 200


@pytest.mark.parametrize("path", ["/v1/recommend", "/v1/events"])
def test_no_malformed_body_makes_the_server_fail(client, path, shop, monkeypatch):
    monkeypatch.setattr(client.service, "received", _Accepting())
    codes = set()
    for seed in range(150):
        answer = client.post(path, content=malformed(seed), headers={"content-type": "application/json"})
        codes.add(answer.status_code)
        assert answer.status_code in (200, 400, 422), (seed, answer.text)
        assert "Traceback" not in answer.text
        assert answer.status_code == 200 or isinstance(answer.json()["detail"], str)
    assert 422 in codes
    assert client.get("/readyz").status_code == 200


class _Accepting:
    def add(self, events):
        return [True] * len(events)


def test_a_defect_shows_the_caller_nothing_and_the_log_all(client, monkeypatch, caplog):
    def broken(questions):
        raise RuntimeError("secret detail")

    monkeypatch.setattr(client.service.engine, "ask", broken)
    with caplog.at_level(logging.INFO, "peso.serving"):
        answer = client.post("/v1/recommend", json={"history": ["i1"]})
    assert answer.status_code == 500
    assert "secret" not in answer.text
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records]
    assert any("secret detail" in line.get("traceback", "") for line in lines)
    request = next(line for line in lines if line["message"] == "request")
    assert (request["route"], request["status"], request["level"]) == ("/v1/recommend", 500, "info")
    assert request["id"] == answer.headers["x-request-id"]
