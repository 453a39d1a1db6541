"""The simulated market and its users.

The market is what all users share: the items on offer and how well they sell, the trends, and which category
follows which. Users have a kind, a taste in each stage, and times at which they are active.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from peso.errors import DataError
from peso.events.histories import BASE_SHARE, stage_bounds
from peso.events.simulate.catalogue import Catalogue

KINDS = ("stable", "drifting", "dormant", "new")
STABLE, DRIFTING, DORMANT, NEW = range(4)

FAVOURITE_WEIGHTS = (0.5, 0.3, 0.2)  # how often a user chooses each of the three favorite categories


@dataclass(frozen=True)
class Behaviour:
    """How simulated users behave. Shares and probabilities are from 0 to 1.

    Args:
        kinds: the shares of the kinds of users, in the order of ``KINDS``.
        series: the probability that the next item is the next number of the last item's series.
        companion: the probability that it is the last item's companion in the category that follows.
        favourite: the probability that it is from one of the user's favorite categories.
        trend: the probability that it is from a trending category. With the remaining probability, it is
            drawn from all released items by how well they sell.
        novelty: how many times better an item sells in the stage of its release. The surplus halves with
            every later stage.
        rewired: the share of categories that are followed by a different category after each stage.
        drift: the probability that a drifting user has a new first favorite at a later stage.
        trends_kept: the probability that a trending category still trends in the next stage.
        events_per_user: the mean number of events per user in the whole log.
        events_per_visitor: the mean number of events per active user in a later stage.

    Raises:
        ValueError: the probabilities of the next item sum to more than 1, or a share is negative.
    """

    kinds: tuple[float, float, float, float] = (0.35, 0.25, 0.15, 0.25)
    series: float = 0.25
    companion: float = 0.2
    favourite: float = 0.3
    trend: float = 0.15
    novelty: float = 6.0
    rewired: float = 0.2
    drift: float = 0.5
    trends_kept: float = 0.4
    events_per_user: int = 40
    events_per_visitor: float = 7.0

    def __post_init__(self) -> None:
        reasons = (self.series, self.companion, self.favourite, self.trend)
        if min(reasons) < 0 or sum(reasons) > 1:
            raise ValueError(
                f"series, companion, favourite and trend {reasons} must not be negative or sum to more than 1"
            )
        if min(self.kinds) < 0 or not sum(self.kinds):
            raise ValueError(f"kinds {self.kinds} must not be negative or all 0")


TREND_SHARE = 0.06  # the share of leaves that trend at any time
NEAR_SHARE = 0.7  # the share of leaves that are followed by a leaf of the same department


@dataclass(frozen=True)
class Market:
    """The market. On the shelf, items are grouped by leaf and in the order of their release.

    Attributes:
        leaf: int64 (items,), the leaf of each item row.
        number: int64 (items,), the position of each item row within its leaf.
        shelf: int64 (items,), the item rows in the order of the shelf.
        first: int64 (leaves,), where each leaf begins on the shelf.
        offered: int64 (stages, leaves), how many items of a leaf have been released.
        sales: float64 (stages · (items + 1),), the cumulative weights along the shelf, stage after stage.
        popularity: float64 (leaves,), the popularity of each leaf; sums to 1.
        departments: int64 (leaves,), the department of each leaf, ascending.
        trending: int64 (stages, trends), the trending leaves.
        followers: int64 (stages, leaves), the leaf that follows each leaf and has its companions.
    """

    leaf: np.ndarray
    number: np.ndarray
    shelf: np.ndarray
    first: np.ndarray
    offered: np.ndarray
    sales: np.ndarray
    popularity: np.ndarray
    departments: np.ndarray
    trending: np.ndarray
    followers: np.ndarray

    @property
    def stages(self) -> int:
        return len(self.offered)

    def sell(self, leaf: np.ndarray, stage: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draw an item row from each leaf, by how well items sell in each stage."""
        return self._sell(stage, self.first[leaf], self.offered[stage, leaf], rng)

    def sell_any(self, stage: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draw an item row for each stage from the whole shelf, by how well items sell."""
        return self._sell(stage, np.zeros_like(stage), np.full_like(stage, len(self.shelf)), rng)

    def _sell(
        self, stage: np.ndarray, first: np.ndarray, count: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        begin = stage * (len(self.shelf) + 1) + first
        low, high = self.sales[begin], self.sales[begin + count]
        drawn = low + rng.random(len(stage)) * (high - low)
        drawn = np.minimum(drawn, np.nextafter(high, low))  # rounding can put a draw on the upper bound
        # items that are not released yet have weight 0, so they are never drawn
        place = np.searchsorted(self.sales, drawn, side="right") - 1 - begin
        return self.shelf[first + place]

    def next_of_series(self, item: np.ndarray, stage: np.ndarray) -> np.ndarray:
        """The item with the next number in the same leaf. The newest item is followed by the first one."""
        leaf = self.leaf[item]
        return self.shelf[self.first[leaf] + (self.number[item] + 1) % self.offered[stage, leaf]]

    def companion(self, item: np.ndarray, stage: np.ndarray) -> np.ndarray:
        """The item with the same number (modulo the size of the leaf) in the leaf that follows."""
        leaf = self.followers[stage, self.leaf[item]]
        return self.shelf[self.first[leaf] + self.number[item] % self.offered[stage, leaf]]

    def neighbours(self, leaf: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A random other leaf of each leaf's department."""
        return _neighbours(leaf, self.departments, rng)


def make_market(catalogue: Catalogue, stages: int, behaviour: Behaviour, rng: np.random.Generator) -> Market:
    """Draw the sales, trends and followers of all stages."""
    leaf, release = catalogue.leaf, catalogue.release
    items, leaves = len(leaf), len(catalogue.paths)
    shelf = np.argsort(leaf, kind="stable")  # rows are already in the order of release
    first = np.searchsorted(leaf[shelf], np.arange(leaves))
    number = np.empty(items, dtype=np.int64)
    number[shelf] = np.arange(items) - first[leaf[shelf]]

    age = np.arange(stages)[:, None] - release[shelf]  # (stages, items), negative before the release
    surplus = np.where(release[shelf] > 0, (behaviour.novelty - 1) * 0.5 ** np.maximum(age, 0), 0)
    popularity = rng.lognormal(0, 0.6, leaves)
    appeal = rng.lognormal(0, 0.5, items)[shelf] * popularity[leaf[shelf]]
    weights = np.where(age >= 0, appeal * (1 + surplus), 0)
    return Market(
        leaf=leaf,
        number=number,
        shelf=shelf,
        first=first,
        offered=np.stack([np.bincount(leaf[release <= t], minlength=leaves) for t in range(stages)]),
        sales=np.cumsum(np.pad(weights, ((0, 0), (1, 0)))),
        popularity=popularity / popularity.sum(),
        departments=catalogue.departments,
        trending=_trends(leaves, stages, behaviour, rng),
        followers=_followers(catalogue.departments, stages, behaviour, rng),
    )


def _trends(leaves: int, stages: int, behaviour: Behaviour, rng: np.random.Generator) -> np.ndarray:
    trends = max(2, round(TREND_SHARE * leaves))
    result = [rng.choice(leaves, trends, replace=False)]
    for _ in range(1, stages):
        kept = result[-1][rng.random(trends) < behaviour.trends_kept]
        others = np.setdiff1d(np.arange(leaves), result[-1])
        result.append(np.concatenate([kept, rng.choice(others, trends - len(kept), replace=False)]))
    return np.stack(result)


def _followers(
    departments: np.ndarray, stages: int, behaviour: Behaviour, rng: np.random.Generator
) -> np.ndarray:
    leaves = len(departments)

    def draw() -> np.ndarray:
        near = _neighbours(np.arange(leaves), departments, rng)
        far = (np.arange(leaves) + rng.integers(1, leaves, leaves)) % leaves
        return np.where(rng.random(leaves) < NEAR_SHARE, near, far)

    result = [draw()]
    for _ in range(1, stages):
        result.append(np.where(rng.random(leaves) < behaviour.rewired, draw(), result[-1]))
    return np.stack(result)


def _neighbours(leaf: np.ndarray, departments: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    sizes = np.bincount(departments)
    size = sizes[departments[leaf]]
    start = (np.cumsum(sizes) - sizes)[departments[leaf]]
    return start + (leaf - start + rng.integers(1, size)) % size


EPOCH = 1_640_995_200  # the log begins on 2022-01-01
STAGE_SECONDS = 30 * 86_400  # the length of a later stage; that of stage 0 depends on its share of events
SITTING_SECONDS = 86_400  # the maximum length of a sitting


@dataclass(frozen=True)
class Shoppers:
    """The simulated users.

    Attributes:
        kinds: int64 (users,), the kind of each user as an index into ``KINDS``.
        favourites: int64 (users, stages, 3), favorite leaf categories by decreasing weight.
        visits: int64 (users, stages), the number of events.
    """

    kinds: np.ndarray
    favourites: np.ndarray
    visits: np.ndarray


def make_shoppers(users: int, market: Market, behaviour: Behaviour, rng: np.random.Generator) -> Shoppers:
    """Draw users at random. With a single stage nothing can change, so all users are stable.

    Raises:
        DataError: there are so few users that a stage is empty.
    """
    stages = market.stages
    kinds = np.zeros(users, dtype=np.int64)
    if stages > 1:
        ends = np.rint(np.cumsum(behaviour.kinds) / sum(behaviour.kinds) * users).astype(np.int64)
        kinds = rng.permutation(np.repeat(np.arange(4), np.diff(ends, prepend=0)))
    # the stage in which a new user arrives or a dormant one returns; 0 for users there from the start.
    # Dormant users are away for at least one whole stage, if there are enough stages.
    arrival = np.where(kinds == NEW, rng.integers(1, max(stages, 2), users), 0)
    comeback = np.where(kinds == DORMANT, rng.integers(min(2, stages - 1), max(stages, 2), users), 0)
    return Shoppers(
        kinds,
        _favourites(kinds, arrival, market, behaviour, rng),
        _visits(arrival, comeback, stages, behaviour, rng),
    )


def make_times(shoppers: Shoppers, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The users, stages and Unix times of all events (int64 each), grouped by user, with strictly ascending
    times.

    Events come in sittings of about four. Dormant users are away for the last third of stage 0.
    """
    users, stages = shoppers.visits.shape
    cell = np.repeat(np.arange(users * stages), shoppers.visits.ravel())  # (events,) user · stages + stage
    who, stage = cell // stages, cell % stages
    place = np.arange(len(cell)) - np.searchsorted(cell, cell)  # within the user's stage
    base = round(STAGE_SECONDS * BASE_SHARE / (1 - BASE_SHARE) * max(stages - 1, 1))
    begin = EPOCH + np.where(stage == 0, 0, base + (stage - 1) * STAGE_SECONDS)
    length = np.where(stage == 0, base, STAGE_SECONDS)
    length = np.where((stage == 0) & (shoppers.kinds[who] == DORMANT), base * 2 // 3, length)
    opens = (place == 0) | (rng.random(len(cell)) < 0.25)
    sitting = np.cumsum(opens) - 1
    # a sitting opens early enough to be over when the next stage begins
    opened = rng.random(len(cell))[np.flatnonzero(opens)][sitting] * (length - SITTING_SECONDS)
    since = np.minimum(rng.exponential(900, len(cell)), SITTING_SECONDS / 2)
    elapsed = (opened + since).astype(np.int64)
    ascending = elapsed[np.lexsort((elapsed, cell))]
    return who, stage, begin + ascending + place  # `place` seconds keep two events of a user apart


def _favourites(
    kinds: np.ndarray, arrival: np.ndarray, market: Market, behaviour: Behaviour, rng: np.random.Generator
) -> np.ndarray:
    """(users, stages, 3). The other favorites are from the department of the first one."""
    users = len(kinds)

    def draw(stage: np.ndarray, trendy: np.ndarray) -> np.ndarray:
        trend = market.trending[stage, rng.integers(0, market.trending.shape[1], users)]
        popular = rng.choice(len(market.popularity), users, p=market.popularity)
        return np.where(rng.random(users) < trendy, trend, popular)

    first = draw(arrival, np.where(arrival > 0, 0.6, 0.0))
    others = [market.neighbours(first, rng) for _ in FAVOURITE_WEIGHTS[1:]]
    taste = np.stack([first, *others], axis=1)
    result = np.empty((users, market.stages, len(FAVOURITE_WEIGHTS)), dtype=np.int64)
    result[:, 0] = taste
    for stage in range(1, market.stages):
        moves = (kinds == DRIFTING) & (rng.random(users) < behaviour.drift)
        new = draw(np.full(users, stage), np.full(users, 0.5))
        taste = np.where(moves[:, None], np.column_stack([new, taste[:, :-1]]), taste)
        result[:, stage] = taste
    return result


def _visits(
    arrival: np.ndarray, comeback: np.ndarray, stages: int, behaviour: Behaviour, rng: np.random.Generator
) -> np.ndarray:
    """(users, stages). Each stage has its exact share of the events, so the protocol cuts at these places."""
    users = len(arrival)
    quotas = np.diff(stage_bounds(users * behaviour.events_per_user, stages), prepend=0)
    since = np.maximum(arrival, comeback)
    keenness = rng.gamma(2.0, size=users)
    result = np.zeros((users, stages), dtype=np.int64)
    for stage, quota in enumerate(quotas):
        if stage == 0:
            present = np.flatnonzero(arrival == 0)
        else:
            # users who arrive or return now are active, and as many others as there are events for
            order = np.where(since == stage, -1.0, rng.random(users))
            wanted = max(1, round(quota / behaviour.events_per_visitor))
            able = np.flatnonzero(since <= stage)
            present = able[np.argsort(order[able], kind="stable")[:wanted]]
        if len(present) == 0:
            raise DataError(
                f"{users} users are too few for {stages} stages: stage {stage} has no users; "
                "simulate more users or fewer stages"
            )
        least = min(1, quota // len(present))
        share = keenness[present] / keenness[present].sum()
        result[present, stage] = least + rng.multinomial(quota - least * len(present), share)
    return result
