"""A server whose stream has a million users: its memory, and the time to look one of them up.

A part of serving.py. The model is tiny, so that the memory of the process is that of everything beside a
model, Python and PyTorch included.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
from serving_process import TINY, Client, make_workspace, served

from peso.runs.workspace import Workspace

ITEMS = 20_000
LOOKUPS = 500


def users(_: Workspace, number: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        log, items = Path(place) / "log.parquet", Path(place) / "items.parquet"
        with duckdb.connect() as connection:
            connection.execute(
                f"COPY (SELECT 'user-' || u AS user, 'item-' || hash(u, e) % {ITEMS} AS item, "
                f"1600000000 + (hash(u) % 10000000) + 3600 * e AS time "
                f"FROM range({number}) users(u), range(40) events(e) WHERE e < 3 + hash(u, 'length') % 37) "
                f"TO '{log}' (FORMAT parquet)"
            )
            connection.execute(
                f"COPY (SELECT 'item-' || i AS item, 'title ' || i % 500 || ' of ' || i AS title "
                f"FROM range({ITEMS}) items(i)) TO '{items}' (FORMAT parquet)"
            )
        data = {
            "format": "parquet",
            "path": str(log),
            "items": {"path": str(items), "columns": {"title": "title"}},
            "stages": {"fractions": [0.8, 0.2]},
        }
        started = time.perf_counter()
        workspace = make_workspace(Path(place) / "w", {**TINY, "data": data})
        made = time.perf_counter() - started
        counts = workspace.stream.counts
        draw = np.random.default_rng(0)
        with served(workspace) as server:
            client, started, seconds = Client(server.port), time.perf_counter(), []
            client.post("/v1/recommend", {"user": "user-0"})  # waits for the index
            index = time.perf_counter() - started
            for user in draw.integers(0, number, LOOKUPS):
                begun = time.perf_counter()
                answer = client.post("/v1/recommend", {"user": f"user-{user}"})
                seconds.append(time.perf_counter() - begun)
                assert answer["source"] == "model", answer
            return {
                "users": number,
                "users_events": sum(stage["events"] for stage in counts),
                "users_workspace_seconds": made,
                "users_index_seconds": index,
                "users_index_mib": workspace.histories_file.stat().st_size / 2**20,
                "users_request_ms": 1000 * statistics.median(seconds),
                "users_memory_mib": server.memory / 2**20,
            }
