"""The HTTP server: its speed beside Transformers' `generate`, and what must not break it.

    python benchmarks/serving.py [--quick] [--json] [--part NAME …] [--workspace W]

Parts; without `--part`, all of them:

- `throughput`: `throughput_ratio`, answers per second of `peso serve` to 32 clients that each send the next
  request when they have the answer, over those of `generate` (10 beams, `prefix_allowed_tokens_fn`), called
  for one request at a time on the same weights and the same histories in the same run, while the server has
  nothing to do. The server keeps no answers (`--answer-memory 0`). Also `ready_seconds`, from the start of
  the process until the model is loaded.
- `returning`: `returning_ratio`, the latency of a user's request half a second after one new event over that
  of the first request of a user, 20 items of history each, one client; medians. The server prepares the
  answer in that time; `prepared_share` is the share of these requests that got a prepared answer.
  `at_once_ratio` is the same for a request that follows its event without a pause. `products_ratio` is the
  latter if nothing but the matrix products of the backbone took time, measured one after the other in the
  same run: a lower bound as long as every level of the beam search is one pass.
- `preparing`: what preparation costs others: one event per second of users who have asked, and one client
  that asks for other histories at random times, one per second; latencies and processor time of the server,
  and the same without preparation (`--no-prepare`). See serving_returning.py.
- `events`: `events_per_second`, in lists of 500.
- `promotions`: two stages take turns under the load of 32 clients for `--seconds`; an answer is mixed if it
  is not that of the stage that it names. The server keeps no answers.
- `kills`: the server is killed (SIGKILL) at random moments while 4 clients send events, see
  serving_faults.py.
- `generated`, `malformed`: requests that schemathesis makes from the OpenAPI description, and malformed
  bodies: statuses, stack traces, growth of memory after the first fifth.
- `users`: a server with a million users in its stream: resident memory, seconds to index the histories, and
  the time of a request.

The first five use two stages of SmolLM2-135M with 8 layers (`peso pull smollm2-135m`) on `Video_Games`
(PESO_DATA), trained for one step, since nothing that is measured depends on what was learned; the others a
tiny model on simulated data. Workspaces are made in a temporary directory; `--workspace` names one for the
first five, whose stages are promoted and whose events are added to. `--quick`: the tiny model for all, and a
few seconds or tries of each.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from serving_faults import bodies, generated, kills
from serving_process import ROOT, TINY, Client, load, make_workspace, served, together, video_games
from serving_returning import BEAMS, ITEMS, preparing, returning
from serving_users import users

from peso.runs.served import promote
from peso.runs.workspace import Workspace

sys.path.append(str(ROOT / "tests"))
from transformers_reference import UsualWay

CLIENTS, TOGETHER = 32, 500
NEAR = 2e-3  # by which a score may differ between batches
SPEED = ("throughput", "returning", "preparing", "events", "promotions")
FAULTS = ("kills", "generated", "malformed", "users")
NUMBERS = {"seconds": (60, 3), "promotions": (10, 2), "kills": (50, 2), "generated": (2000, 200),
           "malformed": (5000, 300), "users": (1_000_000, 2000)}  # fmt: skip


def random_histories(workspace: Workspace, number: int) -> list[list[str]]:
    items, draw = workspace.semantic_ids.item_ids, np.random.default_rng(1)
    return [[items[row] for row in draw.choice(len(items), ITEMS)] for _ in range(number)]


def throughput(workspace: Workspace, seconds: float) -> dict[str, float]:
    histories = random_histories(workspace, 64)

    def ask(client: Client, number: int) -> None:
        answer = client.post("/v1/recommend", {"history": histories[number % len(histories)]})
        assert answer["source"] == "model"

    with served(workspace, "--answer-memory", "0") as server:
        generate = by_generate(workspace, histories, seconds / 3)
        load(server.port, CLIENTS, 1, ask)  # warms up
        started = time.perf_counter()
        latencies = load(server.port, CLIENTS, seconds, ask)
        rate = len(latencies) / (time.perf_counter() - started)
        generate = (generate + by_generate(workspace, histories, seconds / 3)) / 2
        p50, p99 = np.quantile(latencies, [0.5, 0.99])
        return {
            "throughput_ratio": rate / generate,
            "answers_per_second": rate,
            "p50_ms": 1000 * p50,
            "p99_ms": 1000 * p99,
            "generate_per_second": generate,
            "memory_mib": server.memory / 2**20,
            "ready_seconds": server.ready or 0.0,
        }


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


def promotions(workspace: Workspace, number: int, seconds: float) -> dict[str, float]:
    """Stages take turns, evenly spread over the time, while clients ask."""
    histories, expected = random_histories(workspace, 16), {}
    counted, changes, latencies = {"answers": 0, "failed": 0, "mixed": 0}, list[float](), list[float]()
    finished = threading.Event()
    promote(workspace, 1)
    with served(workspace, "--answer-memory", "0") as server:

        def wait_for(stage: int) -> None:
            started = time.perf_counter()
            promote(workspace, stage)
            client = Client(server.port)  # a connection ends after some idle seconds
            while client.get("/v1/status")["stage"] != stage:
                time.sleep(0.05)
            changes.append(time.perf_counter() - started)

        for stage in (0, 1):
            wait_for(stage)
            client = Client(server.port)
            expected[stage] = [client.post("/v1/recommend", {"history": each})["items"] for each in histories]

        def ask(number: int) -> None:
            own = Client(server.port)
            while not finished.is_set():
                place = number = (number + 1) % len(histories)
                started = time.perf_counter()
                try:
                    answer = own.post("/v1/recommend", {"history": histories[place]})
                except (OSError, RuntimeError, http.client.HTTPException):
                    counted["failed"] += 1
                    own = Client(server.port)
                    continue
                latencies.append(time.perf_counter() - started)
                wanted = [item["score"] for item in expected[answer["stage"]][place]]
                found = [item["score"] for item in answer["items"]]
                counted["answers"] += 1
                counted["mixed"] += not np.allclose(found, wanted, rtol=0, atol=NEAR)

        def change() -> None:
            started = time.perf_counter()
            changes.clear()
            try:
                for turn in range(number):
                    wait_for(turn % 2)
                    time.sleep(max(0.0, started + (turn + 1) * seconds / number - time.perf_counter()))
            finally:
                finished.set()

        works: list[Callable[[], None]] = [lambda start=start: ask(start) for start in range(CLIENTS)]  # type: ignore[misc]
        together([*works, change])
        return {
            "promotions": number,
            **{f"promotions_{name}": count for name, count in counted.items()},
            "promotions_seconds_of_a_change": statistics.median(changes),
            "promotions_p99_ms": 1000 * float(np.quantile(latencies, 0.99)),
            "promotions_memory_mib": server.memory / 2**20,
        }


def events(workspace: Workspace, seconds: float) -> dict[str, float]:
    with served(workspace, ready=False) as server:
        client, sent, run = Client(server.port), 0, time.time_ns()
        started = time.perf_counter()
        while time.perf_counter() - started < seconds:
            part = [{"user": f"u{n}", "item": "x", "key": f"{run} {n}"} for n in range(sent, sent + TOGETHER)]
            assert client.post("/v1/events", part)["new"] == TOGETHER
            sent += TOGETHER
        return {"events_per_second": sent / (time.perf_counter() - started)}


def measure(part: str, workspace: Workspace, number: dict[str, int], quick: bool) -> dict[str, Any]:
    if part == "promotions":
        return promotions(workspace, number["promotions"], number["seconds"])
    promote(workspace, 1)
    if part == "throughput":
        return throughput(workspace, number["seconds"])
    if part == "returning":
        return returning(workspace, 10 if quick else 40)
    if part == "preparing":
        return preparing(workspace, number["seconds"])
    if part == "events":
        return events(workspace, number["seconds"] / 6)
    run = {"kills": kills, "generated": generated, "malformed": bodies, "users": users}[part]
    return run(workspace, number[part])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--part", choices=[*SPEED, *FAULTS], action="append", help="default: all")
    parser.add_argument("--workspace", type=Path, help="two trained stages to serve")
    for name, (full, short) in NUMBERS.items():
        told = "of the load" if name == "seconds" else "how many"
        parser.add_argument(f"--{name}", type=int, help=f"{told} ({full}; {short} with --quick)")
    arguments = parser.parse_args()
    number = {
        name: getattr(arguments, name) or (short if arguments.quick else full)
        for name, (full, short) in NUMBERS.items()
    }
    parts = arguments.part or [*SPEED, *FAULTS]
    result: dict[str, Any] = {"threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as place:
        made: dict[str, Workspace] = {}
        for part in parts:
            kind = "tiny" if part in FAULTS or arguments.quick else "video_games"
            if kind not in made:
                if kind == "video_games" and arguments.workspace is not None:
                    made[kind] = Workspace.open(arguments.workspace)
                else:
                    tree = TINY if kind == "tiny" else video_games()
                    made[kind] = make_workspace(Path(place) / kind, tree)
            told = measure(part, made[kind], number, arguments.quick)
            result |= told
            if not arguments.json:
                for name, value in told.items():
                    shown = f"{value:.3g}" if isinstance(value, float) else value
                    print(f"{name:>32} {shown}", flush=True)
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
