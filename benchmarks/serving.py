"""The HTTP server under load, beside the same model behind Transformers' `generate`.

    python benchmarks/serving.py [--quick] [--json] [--workspace W] [--seconds S] [--promotions N]

`throughput_ratio`: answers per second of `peso serve` to 32 clients that each send the next request when they
have the answer, over those of `generate` (10 beams, `prefix_allowed_tokens_fn`), called for one request at a
time on the same weights and the same histories in the same run, while the server has nothing to do.
`returning_ratio`: the latency of a user's request after one new event over that of the first request of a
user, 20 items of history each, one client; medians. `promotions`: two stages take turns under the load of 8
clients; an answer is mixed if it is not that of the stage that it names. `events_per_second`: lists of 500.
`ready_seconds`: from the start of the process until the model is loaded.

The workspace has two stages of SmolLM2-135M with 8 layers (`peso pull smollm2-135m`) on `Video_Games`
(PESO_DATA), trained for one step, since nothing that is measured depends on what was learned; it is made in a
temporary directory, or taken from `--workspace`, whose stages are promoted and whose events are added to.
`--quick`: a tiny model on simulated data, and a few seconds of each.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peso.config import load_config
from peso.runs import pipeline
from peso.runs.served import promote
from peso.runs.workspace import Workspace
from peso.runtime.progress import Silent

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))
from transformers_reference import UsualWay  # noqa: E402

BEAMS, ITEMS, CLIENTS, TOGETHER = 10, 20, 32, 500
NEAR = 2e-3  # by which a score may differ between batches
FULL = {
    "backbone": {"name": "smollm2-135m", "layers": 8},
    "training": {"epochs": 1, "max_steps": 1, "validation_cases": 8},
    "evaluation": {"enabled": False},
    "baselines": [],
}
QUICK = {
    **FULL,
    "data": {"simulate": {"users": 200, "items": 300, "stages": 2}},
    "items": {"quantizer": "rq-kmeans", "levels": 3},
    "backbone": "tiny",
}


def make_workspace(root: Path, quick: bool) -> Workspace:
    """Two trained stages."""
    tree: dict[str, Any] = QUICK
    if not quick:
        data = Path(os.environ.get("PESO_DATA", ROOT.parent / "shared" / "data"))
        path = data / "peso_release" / "Video_Games_cl_0.6_0_5_3_0"
        tree = {**FULL, "data": {"format": "peso-release", "path": str(path)}}
    workspace = Workspace.create_or_open(root, load_config(tree))
    with workspace.lock():
        pipeline.ingest(workspace, Silent())
        pipeline.tokenize(workspace, Silent())
        for stage in range(2):
            pipeline.learn(workspace.stage(stage), Silent())
    return workspace


class Client:
    """One connection, which stays open."""

    def __init__(self, port: int) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)

    def post(self, path: str, body: Any) -> Any:
        content = json.dumps(body).encode()
        self.connection.request("POST", path, content, {"content-type": "application/json"})
        response = self.connection.getresponse()
        text = response.read()
        if response.status != 200:
            raise RuntimeError(f"{path}: {response.status} {text[:200]!r}")
        return json.loads(text)

    def get(self, path: str) -> Any:
        self.connection.request("GET", path)
        return json.loads(self.connection.getresponse().read())


@contextmanager
def served(workspace: Workspace, *options: str) -> Iterator[tuple[int, int, float]]:
    """Port and process id of a server whose model is loaded, and the seconds until then."""
    command = [sys.executable, "-m", "peso", "serve", "-w", str(workspace.root), "--port", "0", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = time.perf_counter()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stderr is not None
        for line in server.stderr:
            if address := re.search(r"listening at http://127\.0\.0\.1:(\d+)", line):
                break
        else:
            raise SystemExit("the server did not start")
        threading.Thread(target=server.stderr.read, daemon=True).start()
        port = int(address[1])
        client = Client(port)
        while client.get("/v1/status")["model"] != "ready":
            time.sleep(0.05)
        yield port, server.pid, time.perf_counter() - started
        server.terminate()
        server.wait()


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

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return latencies


def throughput(port: int, histories: list[list[str]], seconds: float) -> dict[str, float]:
    def ask(client: Client, number: int) -> None:
        answer = client.post("/v1/recommend", {"history": histories[number % len(histories)]})
        assert answer["source"] == "model"

    load(port, CLIENTS, 1, ask)  # warms up
    started = time.perf_counter()
    latencies = load(port, CLIENTS, seconds, ask)
    rate = len(latencies) / (time.perf_counter() - started)
    p50, p99 = np.quantile(latencies, [0.5, 0.99])
    return {"answers_per_second": rate, "p50_ms": 1000 * p50, "p99_ms": 1000 * p99}


def by_generate(workspace: Workspace, histories: list[list[str]], seconds: float) -> float:
    """Requests per second, one at a time."""
    model = workspace.trained(1).answering_model("cpu")
    usual = UsualWay(model)
    rows = [model.semantic_ids.rows(history) for history in histories]
    usual.generate([rows[0]], BEAMS)  # warms up
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        usual.generate([rows[done % len(rows)]], BEAMS)
        done += 1
    return done / (time.perf_counter() - started)


def returning(port: int, items: list[str], users: int) -> dict[str, float]:
    """Seconds of the first request of each user, and of the one after a new event."""
    client, draw = Client(port), np.random.default_rng(0)
    cold, again = [], []
    for user in range(users):
        name = f"benchmark {time.time_ns()} {user}"
        had = [items[row] for row in draw.choice(len(items), ITEMS + 1, replace=False)]
        events = [{"user": name, "item": item, "time": place} for place, item in enumerate(had)]
        for part, seconds in ((events[:ITEMS], cold), (events[ITEMS:], again)):
            client.post("/v1/events", part)
            started = time.perf_counter()
            client.post("/v1/recommend", {"user": name})
            seconds.append(time.perf_counter() - started)
    first, second = statistics.median(cold), statistics.median(again)
    return {"returning_ratio": second / first, "cold_ms": 1000 * first, "returning_ms": 1000 * second}


def promotions(port: int, workspace: Workspace, histories: list[list[str]], number: int) -> dict[str, int]:
    """Stages take turns while 8 clients ask."""
    client, expected, counted = Client(port), {}, {"answers": 0, "failed": 0, "mixed": 0}

    def wait_for(stage: int) -> None:
        promote(workspace, stage)
        while client.get("/v1/status")["stage"] != stage:
            time.sleep(0.05)

    for stage in (0, 1):
        wait_for(stage)
        expected[stage] = [client.post("/v1/recommend", {"history": each})["items"] for each in histories]
    finished = threading.Event()

    def ask(number: int) -> None:
        own = Client(port)
        while not finished.is_set():
            place = number = (number + 1) % len(histories)
            try:
                answer = own.post("/v1/recommend", {"history": histories[place]})
            except (OSError, RuntimeError, http.client.HTTPException):
                counted["failed"] += 1
                own = Client(port)
                continue
            wanted = [item["score"] for item in expected[answer["stage"]][place]]
            found = [item["score"] for item in answer["items"]]
            counted["answers"] += 1
            counted["mixed"] += not np.allclose(found, wanted, rtol=0, atol=NEAR)

    threads = [threading.Thread(target=ask, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for change in range(number):
        wait_for(change % 2)
    finished.set()
    for thread in threads:
        thread.join()
    return {"promotions": number, **counted}


def events_per_second(port: int, seconds: float) -> float:
    client, sent, run = Client(port), 0, time.time_ns()
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        part = [{"user": f"u{n}", "item": "x", "key": f"{run} {n}"} for n in range(sent, sent + TOGETHER)]
        assert client.post("/v1/events", part)["new"] == TOGETHER
        sent += TOGETHER
    return sent / (time.perf_counter() - started)


def measured(workspace: Workspace, quick: bool, seconds: float, changes: int) -> dict[str, Any]:
    promote(workspace, 1)
    items, draw = workspace.semantic_ids.item_ids, np.random.default_rng(1)
    histories = [[items[row] for row in draw.choice(len(items), ITEMS)] for _ in range(64)]
    result: dict[str, Any] = {}
    with served(workspace) as (port, pid, ready):
        generated = by_generate(workspace, histories, seconds / 3)
        result |= throughput(port, histories, seconds)
        generated = (generated + by_generate(workspace, histories, seconds / 3)) / 2
        result["generate_per_second"] = generated
        result["throughput_ratio"] = result["answers_per_second"] / generated
        result |= returning(port, items, 10 if quick else 40)
        result["events_per_second"] = events_per_second(port, seconds / 10)
        result |= promotions(port, workspace, histories[:16], changes)
        result["memory_mib"] = resident(pid) / 2**20
    result["ready_seconds"] = ready
    return result


def resident(pid: int) -> int:
    """Bytes of memory of a process."""
    text = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True).stdout
    return int(text) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--workspace", type=Path, help="two trained stages to serve")
    parser.add_argument("--seconds", type=float, help="of the load (60; 3 with --quick)")
    parser.add_argument("--promotions", type=int, help="how many (10; 2 with --quick)")
    arguments = parser.parse_args()
    seconds = arguments.seconds or (3 if arguments.quick else 60)
    changes = arguments.promotions or (2 if arguments.quick else 10)
    with tempfile.TemporaryDirectory() as place:
        if arguments.workspace is not None:
            workspace = Workspace.open(arguments.workspace)
        else:
            workspace = make_workspace(Path(place) / "w", arguments.quick)
        result = measured(workspace, arguments.quick, seconds, changes)
    result["threads"] = torch.get_num_threads()
    result["backbone"] = workspace.config.backbone.name
    if arguments.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:>22} {value:.3g}" if isinstance(value, float) else f"{name:>22} {value}")


if __name__ == "__main__":
    main()
