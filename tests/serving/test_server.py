"""`peso serve` as a process: from its start to its end."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest

from peso.runtime.processes import NATIVE_SECONDS
from peso.serving.server import Settings, _listening

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def process(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """The process, its address, and what it has written to stderr."""
    command = [sys.executable, "-m", "peso", "serve", *map(str, arguments), "--port", "0"]
    lines: list[str] = []
    listening = threading.Event()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:

        def read() -> None:
            for line in server.stderr:
                lines.append(line)
                if "listening at" in line:
                    listening.set()
            listening.set()

        reader = threading.Thread(target=read)
        reader.start()
        try:
            assert listening.wait(120)
            address = re.search(r"http://\S+", "".join(lines))
            assert address, lines
            yield server, address[0], lines
        finally:
            server.kill()
            reader.join()


@pytest.mark.slow
def test_sigterm_ends_a_server_that_answers_what_was_asked(copy):
    with process("-w", copy.root) as (server, address, lines):
        first = httpx2.post(f"{address}/v1/recommend", json={"history": ["i1"]}, timeout=60).json()
        assert first["source"] in ("model", "popularity")
        assert httpx2.post(f"{address}/v1/events", json={"user": "a", "item": "i1"}, timeout=60).json()["new"]
        with socket.create_connection((urlsplit(address).hostname, urlsplit(address).port)) as connection:
            body = json.dumps({"history": ["i1"]}).encode()
            head = f"POST /v1/recommend HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
            connection.sendall(f"{head}content-type: application/json\r\n\r\n".encode() + body[:5])
            time.sleep(0.5)
            server.send_signal(signal.SIGTERM)
            time.sleep(NATIVE_SECONDS + 1)  # after which other commands are ended the hard way
            connection.sendall(body[5:])
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        assert server.wait(60) == 0
    assert copy.events_file.is_file()
    assert not copy.events_file.with_name(f"{copy.events_file.name}-wal").exists()
    logged = [json.loads(line) for line in lines if line.startswith("{")]
    routes = [line["route"] for line in logged if line["message"] == "request"]
    assert routes == ["/v1/recommend", "/v1/events", "/v1/recommend"]
    assert not any("Traceback" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "--token-file"),
        (["--host", "192.0.2.1", "--token-file", "TOKENS"], "cannot listen there"),
        (["--token-file", "gone"], "cannot be read"),
        (["--stage", "7"], "stage 7"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(peso, shop, tmp_path, arguments, words, monkeypatch):
    monkeypatch.delenv("PESO_TOKENS", raising=False)
    (tmp_path / "tokens").write_text("a-token-of-sixteen-or-more")
    arguments = [str(tmp_path / "tokens") if each == "TOKENS" else each for each in arguments]
    before = sorted(shop.root.rglob("*"))
    status, _, err = peso("serve", "-w", shop.root, "--port", "0", *arguments)
    assert status in (1, 2)
    assert words in err
    assert "Traceback" not in err
    assert sorted(shop.root.rglob("*")) == before


def test_a_missing_package_is_named_with_the_command_that_installs_it(peso, shop, monkeypatch):
    from peso.cli import serve

    monkeypatch.setattr(serve, "NEEDED", ("fastapi", "prometheus_client_that_is_not_there"))
    status, _, err = peso("serve", "-w", shop.root)
    assert status == 2
    assert "prometheus-client-that-is-not-there" in err
    assert "pip install 'peso[serve]'" in err


def test_peso_itself_needs_nothing_of_the_server():
    code = (
        "import sys; import peso; import peso.cli.app; "
        "sys.exit(any(n in sys.modules for n in ('fastapi', 'uvicorn', 'prometheus_client', 'peso.serving')))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode
        == 0
    )


def test_no_part_of_an_answer_waits_for_an_acknowledgment():
    """Else every answer takes 40 ms more on a connection that stays open."""

    async def options() -> bool:
        found = asyncio.get_running_loop().create_future()

        def connected(reader, writer):
            connection = writer.get_extra_info("socket")
            found.set_result(bool(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)))
            writer.close()

        with _listening(Settings(port=0)) as listener:
            async with await asyncio.start_server(connected, sock=listener):
                await asyncio.open_connection(*listener.getsockname()[:2])
                return await found

    assert asyncio.run(options())
