"""Latencies of users who return to `peso serve` after an event, and what it costs others that their answers
are prepared. Parts `returning` and `preparing` of serving.py."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from serving_process import Client, served

from peso.model.inference import PackedLinear
from peso.runs.workspace import Workspace

BEAMS, ITEMS = 10, 20
PAUSE = 0.5  # seconds between an event and the request of its user
EVENTS, REQUESTS = 1.0, 1.0  # per second, in part `preparing`
USED = 'peso_remembered_answers_total{how="used"}'
SPENT = "process_cpu_seconds_total"


def new_users(workspace: Workspace, number: int) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Names, and ITEMS + 2 events of each."""
    items, draw = workspace.semantic_ids.item_ids, np.random.default_rng(0)
    for user in range(number):
        name = f"benchmark {time.time_ns()} {user}"
        had = draw.choice(len(items), ITEMS + 2, replace=False)
        yield name, [{"user": name, "item": items[row], "time": place} for place, row in enumerate(had)]


def seconds_of(client: Client, request: dict[str, Any]) -> float:
    started = time.perf_counter()
    assert client.post("/v1/recommend", request)["source"] == "model"
    return time.perf_counter() - started


def returning(workspace: Workspace, number: int) -> dict[str, float]:
    """Latencies of the first request of each user, of one right after a new event, and of one PAUSE seconds
    after another event."""
    cold, at_once, later, used = list[float](), list[float](), list[float](), 0.0
    with served(workspace) as server:
        client = Client(server.port)
        for name, events in new_users(workspace, number):
            for part, seconds in ((events[:ITEMS], cold), (events[ITEMS:-1], at_once), (events[-1:], later)):
                before = client.metric(USED)
                client.post("/v1/events", part)
                time.sleep(PAUSE if seconds is later else 0)
                seconds.append(seconds_of(client, {"user": name}))
            used += client.metric(USED) - before
    first, second, third = map(statistics.median, (cold, at_once, later))
    return {
        "returning_ratio": third / first,
        "at_once_ratio": second / first,
        "cold_ms": 1000 * first,
        "returning_ms": 1000 * third,
        "at_once_ms": 1000 * second,
        "prepared_share": used / number,
        **products(workspace, number),
    }


@torch.no_grad()
def products(workspace: Workspace, turns: int) -> dict[str, float]:
    """Milliseconds of the matrix products of the passes of a cold request and of one right after an event:
    the prompt or its new item, then the beams of each further level."""
    from peso.model.inference import for_inference
    from peso.runtime.machine import threads

    model = for_inference(workspace.trained(1).model("cpu"), packed=True)
    decoder, levels = model.causal_lm.get_decoder(), model.semantic_ids.levels
    layers = [module for module in decoder.modules() if isinstance(module, PackedLinear)]
    prompt = len(model.layout.prompt(model.item_token_ids(np.arange(ITEMS))))
    beams = [BEAMS] * (levels - 1)
    sizes = {"cold": [prompt, *beams], "returning": [levels + len(model.layout.separator), *beams]}
    taken: dict[str, list[float]] = {name: [] for name in sizes}
    with threads(model, workspace.config.training.threads):
        inputs = {
            (rows, layer.packed.shape[1]): torch.randn(rows, layer.packed.shape[1])
            for rows in {*sizes["cold"], *sizes["returning"]}
            for layer in layers
        }
        for _ in range(turns):
            for name, passes in sizes.items():
                started = time.perf_counter()
                for rows in passes:
                    for layer in layers:
                        layer(inputs[rows, layer.packed.shape[1]])
                taken[name].append(time.perf_counter() - started)
    cold, again = (statistics.median(taken[name]) for name in sizes)
    if not layers:  # this build of PyTorch, or this processor, has no packed layers
        return {}
    return {
        "products_ratio": again / cold,
        "products_cold_ms": 1000 * cold,
        "products_returning_ms": 1000 * again,
    }


def preparing(workspace: Workspace, seconds: float) -> dict[str, float]:
    """Latencies of one client's requests at random times while other users send events, with preparation and
    without; and the processor time of the server."""
    result: dict[str, float] = {}
    for name, options in (("preparing", []), ("not_preparing", ["--no-prepare"])):
        with served(workspace, *options) as server:
            found = beside_events(workspace, server.port, seconds)
        result |= {f"{name}_{figure}": value for figure, value in found.items()}
    return result


def beside_events(workspace: Workspace, port: int, seconds: float) -> dict[str, float]:
    """Figures of one client that asks for random histories, while users who have asked before send events."""
    client, draw, finished = Client(port), np.random.default_rng(1), threading.Event()
    items = workspace.semantic_ids.item_ids
    users = [user for user, events in new_users(workspace, 16) if client.post("/v1/events", events)]
    for user in users:
        seconds_of(client, {"user": user})
    sent: list[str] = []

    def send() -> None:
        own = Client(port)
        while not finished.wait(1 / EVENTS):
            event = {"user": users[len(sent) % len(users)], "item": items[len(sent) % len(items)]}
            own.post("/v1/events", event)
            sent.append(event["user"])

    spent, sender = client.metric(SPENT), threading.Thread(target=send)
    sender.start()
    latencies, until = list[float](), time.perf_counter() + seconds
    while time.perf_counter() < until:
        time.sleep(draw.exponential(1 / REQUESTS))
        history = [items[row] for row in draw.choice(len(items), ITEMS)]
        latencies.append(seconds_of(client, {"history": history}))
    finished.set()
    sender.join()
    spent = client.metric(SPENT) - spent
    p50, p99 = np.quantile(latencies, [0.5, 0.99])
    return {
        "requests": len(latencies),
        "events": len(sent),
        "p50_ms": 1000 * p50,
        "p99_ms": 1000 * p99,
        "processor_seconds": spent,
    }
