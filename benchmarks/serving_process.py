"""`peso serve` as a process of its own on a workspace with two stages, and clients of it.

Used by serving.py and its parts; this file measures nothing itself.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peso.config import load_config
from peso.runs import pipeline, preparation
from peso.runs.workspace import Workspace
from peso.runtime.progress import Silent

ROOT = Path(__file__).resolve().parent.parent
FULL = {
    "backbone": {"name": "smollm2-135m", "layers": 8},
    "training": {"epochs": 1, "max_steps": 1, "validation_cases": 8},
    "evaluation": {"enabled": False},
    "baselines": [],
}
TINY = {
    **FULL,
    "data": {"simulate": {"users": 200, "items": 300, "stages": 2}},
    "items": {"quantizer": "rq-kmeans", "levels": 3},
    "backbone": "tiny",
}


def make_workspace(root: Path, tree: dict[str, Any]) -> Workspace:
    """Two trained stages."""
    workspace = Workspace.create_or_open(root, load_config(tree))
    with workspace.lock():
        preparation.ingest(workspace, Silent())
        preparation.tokenize(workspace, Silent())
        for stage in range(2):
            pipeline.learn(workspace.stage(stage), Silent())
    return workspace


def video_games() -> dict[str, Any]:
    data = Path(os.environ.get("PESO_DATA", ROOT.parent / "shared" / "data"))
    path = data / "peso_release" / "Video_Games_cl_0.6_0_5_3_0"
    return {**FULL, "data": {"format": "peso-release", "path": str(path)}}


class Client:
    """One connection, which stays open."""

    def __init__(self, port: int) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)

    def send(self, method: str, path: str, content: bytes | None = None) -> tuple[int, bytes]:
        self.connection.request(method, path, content, {"content-type": "application/json"})
        response = self.connection.getresponse()
        return response.status, response.read()

    def post(self, path: str, body: Any) -> Any:
        status, text = self.send("POST", path, json.dumps(body).encode())
        if status != 200:
            raise RuntimeError(f"{path}: {status} {text[:200]!r}")
        return json.loads(text)

    def get(self, path: str) -> Any:
        return json.loads(self.send("GET", path)[1])

    def metric(self, name: str) -> float:
        """A value of /metrics; ``name`` with its labels."""
        lines = self.send("GET", "/metrics")[1].decode().splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))

    def statuses(self) -> dict[str, int]:
        """How many requests the server has answered with each status."""
        lines = self.send("GET", "/metrics")[1].decode().splitlines()
        counts: dict[str, int] = {}
        for line in lines:
            if found := re.match(r'peso_requests_total\{.*status="(\d+)".*\} (\S+)', line):
                counts[found[1]] = counts.get(found[1], 0) + int(float(found[2]))
        return counts


@dataclass
class Server:
    """A running server.

    Attributes:
        ready: seconds from the start of the process until the model was loaded; None if that was not waited
            for.
        log: lines of its standard error, which grow.
    """

    port: int
    process: subprocess.Popen[str]
    log: list[str]
    ready: float | None = None

    @property
    def memory(self) -> int:
        """Bytes of resident memory."""
        command = ["ps", "-o", "rss=", "-p", str(self.process.pid)]
        return int(subprocess.run(command, capture_output=True, text=True).stdout) * 1024

    @property
    def tracebacks(self) -> int:
        return sum("Traceback" in line for line in self.log)


@contextmanager
def served(workspace: Workspace, *options: str, ready: bool = True) -> Iterator[Server]:
    """A server; with ``ready``, one whose model is loaded."""
    command = [sys.executable, "-m", "peso", "serve", "-w", str(workspace.root), "--port", "0", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = time.perf_counter()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        stream, log = process.stderr, list[str]()
        for line in stream:
            log.append(line)
            if address := re.search(r"listening at http://127\.0\.0\.1:(\d+)", line):
                break
        else:
            raise SystemExit(f"the server did not start: {''.join(log)}")
        threading.Thread(target=lambda: log.extend(stream), daemon=True).start()
        server = Server(int(address[1]), process, log)
        try:
            if ready:
                client = Client(server.port)
                while client.get("/v1/status")["model"] != "ready":
                    time.sleep(0.05)
                server.ready = time.perf_counter() - started
            yield server
        finally:
            process.terminate()
            process.wait()


def load(port: int, clients: int, seconds: float, ask: Callable[[Client, int], None]) -> list[float]:
    """Latencies of what many clients ask, each one thing after the other; ``ask`` gets a number."""
    latencies: list[float] = []
    until = time.perf_counter() + seconds

    def work(number: int) -> None:
        client = Client(port)
        while (started := time.perf_counter()) < until:
            ask(client, number)
            latencies.append(time.perf_counter() - started)
            number += clients

    together([lambda number=number: work(number) for number in range(clients)])  # type: ignore[misc]
    return latencies


def together(works: list[Callable[[], None]]) -> None:
    """Run functions in threads of their own until all have ended."""
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
