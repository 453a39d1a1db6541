"""The simulated log: what each user takes, event by event, and the stages cut from it.

Knows users, items, stages and times; knows nothing of files.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from peso.errors import DataError
from peso.events import columns
from peso.events.histories import Stage
from peso.events.protocol import cut_stages, require_trainable
from peso.events.simulate.behaviour import FAVOURITE_WEIGHTS, Behaviour
from peso.events.simulate.catalogue import Catalogue, make_catalogue
from peso.events.simulate.market import Market, make_market
from peso.events.simulate.shoppers import Shoppers, make_shoppers, make_times

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
