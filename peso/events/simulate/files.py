"""A simulated log on disk: the stream, the log it was cut from, and the truth behind it.

Knows files and columns; knows nothing of how the log came about.

    events.parquet   user, item, time: the log
    truth.parquet    user, kind, stage, events (in this stage), favourites (category paths by falling weight)
    truth.json       how users act; per stage what comes out, what trends and what follows what
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from peso.durable import write_json
from peso.events import columns
from peso.events.simulate.behaviour import FAVOURITE_WEIGHTS, KINDS
from peso.events.simulate.simulation import Simulation, simulate
from peso.events.stream import write_stream

EVENTS_FILE = "events.parquet"
TRUTH_FILE = "truth.parquet"
TRUTH_SUMMARY_FILE = "truth.json"
TRUTH = pa.schema(
    [
        (columns.USER, pa.string()),
        ("kind", pa.string()),
        ("stage", pa.int32()),
        ("events", pa.int32()),
        ("favourites", pa.list_(pa.string())),
    ]
)


def write_simulation(
    directory: Path,
    users: int = 600,
    items: int = 400,
    stages: int = 5,
    seed: int = 0,
    manifest: Mapping[str, Any] | None = None,
) -> Simulation:
    """Simulate into an existing, empty directory: log, truth, stream. The manifest comes last.

    Args:
        users, items, stages, seed: see :func:`peso.events.simulate.simulate`; recorded as ``source``.
        manifest: what else to record, see :func:`peso.events.stream.write_stream`.

    Raises:
        DataError: too few users or items for the stages asked for.
    """
    simulation = simulate(users, items, stages, seed)
    pq.write_table(simulation.events, directory / EVENTS_FILE)
    pq.write_table(_truth(simulation), directory / TRUTH_FILE)
    write_json(directory / TRUTH_SUMMARY_FILE, _summary(simulation))
    source = {"format": "simulate", "users": users, "items": items, "stages": stages, "seed": seed}
    write_stream(directory, simulation.items, simulation.stages, {"source": source, **(manifest or {})})
    return simulation


def _truth(simulation: Simulation) -> pa.Table:
    shoppers, paths = simulation.shoppers, pa.array(simulation.catalogue.paths)
    users, stages, favourites = shoppers.favourites.shape
    lists = pa.ListArray.from_arrays(
        pa.array(np.arange(users * stages + 1) * favourites).cast(pa.int32()),
        paths.take(pa.array(shoppers.favourites.ravel())),
    )
    return pa.Table.from_arrays(
        [
            pa.array(np.repeat(simulation.user_names, stages)),
            pa.array(np.repeat(np.array(KINDS)[shoppers.kinds], stages)),
            pa.array(np.tile(np.arange(stages, dtype=np.int32), users)),
            pa.array(shoppers.visits.ravel().astype(np.int32)),
            lists,
        ],
        schema=TRUTH,
    )


def _summary(simulation: Simulation) -> dict[str, Any]:
    paths, market = simulation.catalogue.paths, simulation.market
    kinds = np.bincount(simulation.shoppers.kinds, minlength=len(KINDS)).tolist()
    return {
        "seed": simulation.seed,
        "behaviour": asdict(simulation.behaviour),
        "favourite_weights": list(FAVOURITE_WEIGHTS),
        "users": dict(zip(KINDS, kinds, strict=True)),
        "stages": [
            {
                "stage": stage,
                "new_items": int((simulation.catalogue.release == stage).sum()) if stage else 0,
                "trending": [paths[leaf] for leaf in market.trending[stage]],
                "followers": {
                    paths[leaf]: paths[follower] for leaf, follower in enumerate(market.followers[stage])
                },
            }
            for stage in range(market.stages)
        ],
    }
