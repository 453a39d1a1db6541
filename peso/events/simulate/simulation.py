"""The simulated log: the items that each user chooses, event by event, and the stages cut from it."""

from __future__ import annotations

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
from peso.runtime.files import write_json

RECENT = 20  # users rarely choose an item that is among their last 20
DRAWS = 3  # how often to draw to find another item


@dataclass(frozen=True)
class Simulation:
    """A log in the order of time, and the truth behind it.

    ``users``, ``item_rows`` and ``times`` are int64 (events,): indices into ``user_names``, rows of the item
    table, and Unix times.
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
        """The log, cut into stages by the protocol of the released stream."""
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
        items: the number of items.
        stages: the number of stages, including stage 0.
        seed: the same seed, sizes and behavior give exactly the same log.

    Raises:
        DataError: there are too few users or items for the number of stages.
    """
    for name, value in {"users": users, "items": items, "stages": stages}.items():
        if value < 1:
            raise DataError(f"cannot simulate {value} {name}; give at least one")
    behaviour = behaviour or Behaviour()
    # one generator for each part, so that a different number of users does not change the catalog
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
    """int64 (events,): the item row of each event. Step k draws the k-th event of every user who has one."""
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
    """Draw the next item of n users.

    Args:
        last: int64 (n,), the previous item of each user; None for the first event.
        stage: int64 (n,), the stage of each event.
        favourites: int64 (n, 3), the favorite leaves of each user.
    """
    n = len(stage)
    trends = market.trending.shape[1]
    bounds = np.cumsum([behaviour.series, behaviour.companion, behaviour.favourite, behaviour.trend])
    reason = np.searchsorted(bounds, rng.random(n), side="right")
    slot = np.searchsorted(np.cumsum(FAVOURITE_WEIGHTS)[:-1], rng.random(n), side="right")
    trend = market.trending[stage, rng.integers(0, trends, n)]
    of_leaf = market.sell(np.where(reason == 3, trend, favourites[np.arange(n), slot]), stage, rng)
    if last is None:  # series and companion need a previous item; choose a favorite instead
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


def write_simulation(simulation: Simulation, directory: Path) -> None:
    """Write the log of a simulation and the truth behind it to an existing directory."""
    pq.write_table(simulation.events, directory / EVENTS_FILE)
    pq.write_table(_truth(simulation), directory / TRUTH_FILE)
    write_json(directory / TRUTH_SUMMARY_FILE, _summary(simulation))


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
