"""The simulated log: what each user takes, event by event, and the stages cut from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from peso.errors import DataError
from peso.events import columns
from peso.events.histories import Stage, cut_stages, require_trainable
from peso.events.simulate.catalogue import Catalogue, make_catalogue
from peso.events.simulate.market import (
    FAVOURITE_WEIGHTS,
    KINDS,
    Behaviour,
    Market,
    Shoppers,
    make_market,
    make_shoppers,
    make_times,
)
from peso.events.stream import write_stream
from peso.runtime.files import write_json

RECENT = 20  # items back, a user seldom takes the same one again
DRAWS = 3  # to find one that is not


@dataclass(frozen=True)
class Simulation:
    """A log by time, and the truth behind it.

    ``users``, ``item_rows``, ``times``: int64 (events,), rows of ``user_names`` and of the item table, and
    unix seconds.
    """

    seed: int
    behaviour: Behaviour
    catalogue: Catalogue
    market: Market
    shoppers: Shoppers
    user_names: list[str]
    users: np.ndarray
    item_rows: np.ndarray
    times: np.ndarray

    @cached_property
    def stages(self) -> list[Stage]:
        """The log, cut by the protocol of the released stream."""
        return cut_stages(self.user_names, self.users, self.item_rows, self.times, self.market.stages)

    @property
    def items(self) -> pa.Table:
        """The item table (``peso.events.columns.ITEMS``)."""
        return self.catalogue.items

    @property
    def events(self) -> pa.Table:
        """The log (``peso.events.columns.EVENTS``)."""
        names = pa.array(self.user_names).take(pa.array(self.users))
        ids = self.items[columns.ITEM_ID].combine_chunks().take(pa.array(self.item_rows))
        return pa.Table.from_arrays([names, ids, pa.array(self.times)], schema=columns.EVENTS)


def simulate(
    users: int = 600, items: int = 400, stages: int = 5, seed: int = 0, behaviour: Behaviour | None = None
) -> Simulation:
    """Simulate a log.

    Args:
        stages: how many, stage 0 included.
        seed: the same seed, sizes and behaviour give the same log, to the last event.

    Raises:
        DataError: too few users or items for the stages asked for.
    """
    for name, value in {"users": users, "items": items, "stages": stages}.items():
        if value < 1:
            raise DataError(f"cannot simulate {value} {name}; give at least one")
    behaviour = behaviour or Behaviour()
    # one generator a part, so that more users do not change the catalogue
    rng = [np.random.default_rng([seed, part]) for part in range(5)]
    catalogue = make_catalogue(items, stages, rng[0])
    market = make_market(catalogue, stages, behaviour, rng[1])
    shoppers = make_shoppers(users, market, behaviour, rng[2])
    who, stage, times = make_times(shoppers, rng[3])
    taken = _choose(who, stage, market, shoppers, behaviour, rng[4])
    by_time = np.argsort(times, kind="stable")
    simulation = Simulation(
        seed,
        behaviour,
        catalogue,
        market,
        shoppers,
        [f"u{number}" for number in range(users)],
        who[by_time],
        taken[by_time],
        times[by_time],
    )
    for part in simulation.stages:
        require_trainable(part, f"{users} simulated users over {stages} stages")
    return simulation


def _choose(
    who: np.ndarray,
    stage: np.ndarray,
    market: Market,
    shoppers: Shoppers,
    behaviour: Behaviour,
    rng: np.random.Generator,
) -> np.ndarray:
    """int64 (events,): item rows. Step k draws the k-th event of every user who has so many."""
    counts = np.bincount(who, minlength=len(shoppers.kinds))
    starts = np.cumsum(counts) - counts
    taken = np.full(len(who), -1, dtype=np.int64)
    for step in range(int(counts.max())):
        event = starts[counts > step] + step
        back = np.arange(1, min(step, RECENT) + 1)
        for _ in range(DRAWS):
            last = taken[event - 1] if step else None
            favourites = shoppers.favourites[who[event], stage[event]]
            taken[event] = _draw(last, stage[event], favourites, market, behaviour, rng)
            repeated = (taken[event[:, None] - back] == taken[event][:, None]).any(axis=1)
            event = event[repeated]
            if not len(event):
                break
    return taken


def _draw(
    last: np.ndarray | None,
    stage: np.ndarray,
    favourites: np.ndarray,
    market: Market,
    behaviour: Behaviour,
    rng: np.random.Generator,
) -> np.ndarray:
    """The next item of n users.

    Args:
        last: int64 (n,), the item before; None for the first.
        stage: int64 (n,).
        favourites: int64 (n, 3), leaves.
    """
    n = len(stage)
    trends = market.trending.shape[1]
    bounds = np.cumsum([behaviour.series, behaviour.companion, behaviour.favourite, behaviour.trend])
    reason = np.searchsorted(bounds, rng.random(n), side="right")
    slot = np.searchsorted(np.cumsum(FAVOURITE_WEIGHTS)[:-1], rng.random(n), side="right")
    trend = market.trending[stage, rng.integers(0, trends, n)]
    of_leaf = market.sell(np.where(reason == 3, trend, favourites[np.arange(n), slot]), stage, rng)
    if last is None:  # then a favourite takes the place of series and companion
        return np.where(reason <= 3, of_leaf, market.sell_any(stage, rng))
    return np.choose(
        np.minimum(reason, 4),
        [
            market.next_of_series(last, stage),
            market.companion(last, stage),
            of_leaf,
            of_leaf,
            market.sell_any(stage, rng),
        ],
    )


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
