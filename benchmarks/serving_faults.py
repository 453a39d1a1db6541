"""What must not break a server: a kill at any moment, requests from its own description, malformed bodies.

Parts of serving.py. A tiny workspace is enough, since nothing here depends on the model.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from serving_process import ROOT, Client, Server, served, together

from peso.runs.workspace import Workspace

sys.path.append(str(ROOT / "tests"))
from malformed_bodies import malformed

WRITERS = 4  # clients that send events while the server is killed
SEEDS = 20  # of schemathesis, at most


def kills(workspace: Workspace, number: int) -> dict[str, int]:
    """Kill the server while clients send events, again and again, and look at what it has stored.

    A client sends a list again to the next server if it got no answer, as a sender must. Every acknowledged
    event must be stored once, and none twice.
    """
    draw, acknowledged, unanswered = random.Random(0), list[str](), list[list[dict[str, str]]]()
    lock, sent = threading.Lock(), iter(range(10**9))
    begun = _stored(workspace)
    for _ in range(number):
        with served(workspace, ready=False) as server:
            stopping = threading.Event()

            def write(port: int = server.port, stopping: threading.Event = stopping) -> None:
                client = Client(port)
                while not stopping.is_set():
                    with lock:
                        again = unanswered.pop() if unanswered else None
                        size = draw.choice([1, 1, 7, 100])
                    events = again or [{"user": f"killed {next(sent)}", "item": "x"} for _ in range(size)]
                    for event in events:
                        event["key"] = event["user"]
                    try:
                        client.post("/v1/events", events)
                    except (OSError, http.client.HTTPException):
                        with lock:
                            unanswered.append(events)
                        return
                    with lock:
                        acknowledged.extend(event["user"] for event in events)

            def kill(server: Server = server, stopping: threading.Event = stopping) -> None:
                time.sleep(draw.uniform(0, 2))
                server.process.kill()
                server.process.wait()
                stopping.set()

            together([write] * WRITERS + [kill])
    stored = _stored(workspace) - begun
    allowed = {event["user"] for events in unanswered for event in events} | set(acknowledged)
    return {
        "kills": number,
        "acknowledged": len(acknowledged),
        "lost": sum(stored[user] == 0 for user in acknowledged),
        "duplicated": sum(count > 1 for count in stored.values()),
        "unknown": sum(user not in allowed for user in stored),
        "unanswered_lists": len(unanswered),
    }


def _stored(workspace: Workspace) -> Counter[str]:
    """How often each user occurs in the file of received events."""
    if not workspace.events_file.exists():
        return Counter()
    with sqlite3.connect(workspace.events_file) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return Counter(user for (user,) in connection.execute("SELECT user FROM events"))


def generated(workspace: Workspace, number: int) -> dict[str, Any]:
    """At least this number of requests that schemathesis makes from the OpenAPI description."""
    command = shutil.which("schemathesis") or os.environ.get("SCHEMATHESIS")
    if command is None:
        return {"generated": "skipped: `pip install schemathesis`, or its path in SCHEMATHESIS"}
    with served(workspace, "--rate", "0") as server, tempfile.TemporaryDirectory() as place:
        counts, traces, memory = dict[str, int](), 0, 0
        for seed in range(SEEDS):
            har = Path(place) / "requests.har"
            # the queue is for the model, not for a tool that asks without a pause
            subprocess.run(
                [
                    command, "run", f"http://127.0.0.1:{server.port}/openapi.json", "--checks",
                    "not_a_server_error", "--max-examples", "100", "--seed", str(seed), "--no-shrink",
                    "--report", "har", "--report-har-path", str(har), "--output-truncate", "false",
                ],
                capture_output=True,
                cwd=place,
            )  # fmt: skip
            entries = json.loads(har.read_text())["log"]["entries"] if har.exists() else []
            traces += sum("Traceback" in str(e["response"]["content"].get("text", "")) for e in entries)
            memory = memory or server.memory  # after the first of several rounds
            counts = Client(server.port).statuses()  # a connection ends after some idle seconds
            if sum(counts.values()) >= number and seed:
                break
        return {"generated": sum(counts.values()), **_told("generated", server, counts, traces, memory)}


def bodies(workspace: Workspace, number: int) -> dict[str, Any]:
    """Malformed bodies to every path that takes one."""
    paths = ("recommend", "events", "compare", "explain", "promote", "rollback")
    with served(workspace, "--rate", "0") as server:
        client, traces, memory = Client(server.port), 0, 0
        for seed in range(number):
            traces += (
                b"Traceback" in client.send("POST", f"/v1/{paths[seed % len(paths)]}", malformed(seed))[1]
            )
            if seed == number // 5:
                memory = server.memory
        counts = client.statuses()
        return {"malformed": number, **_told("malformed", server, counts, traces, memory)}


def _told(name: str, server: Server, counts: dict[str, int], traces: int, memory: int) -> dict[str, Any]:
    """``memory``: of the server, at an earlier moment."""
    return {
        f"{name}_statuses": dict(sorted(counts.items())),
        f"{name}_5xx": sum(count for status, count in counts.items() if status.startswith("5")),
        f"{name}_stack_traces": traces,
        f"{name}_tracebacks_in_log": server.tracebacks,
        f"{name}_memory_grew_mib": (server.memory - memory) / 2**20,
    }
