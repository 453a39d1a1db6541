"""What all simulated users share: what is on offer and sells, what trends and what follows what."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from peso.events.simulate.catalogue import Catalogue

KINDS = ("stable", "drifting", "dormant", "new")
STABLE, DRIFTING, DORMANT, NEW = range(4)

FAVOURITE_WEIGHTS = (0.5, 0.3, 0.2)  # how often a user turns to each of the three favourite categories


@dataclass(frozen=True)
class Behaviour:
    """Shares and probabilities are from 0 to 1.

    Args:
        kinds: shares of users, in the order of ``KINDS``.
        series: how often the next item is the next number of the last item's series,
        companion: … the last item's companion in the category that follows,
        favourite: … an item of one of the user's favourite categories,
        trend: … an item of a trending category; what is left to 1 is drawn from everything that is out, by
            what sells.
        novelty: how many times better an item sells in the stage it comes out in; half of the surplus is
            left one stage on.
        rewired: share of the categories that another category follows from a later stage on.
        drift: chance that a drifting user has a new first favourite at a later stage.
        trends_kept: chance that a trending category still trends one stage on.
        events_per_user: of the whole log, on average.
        events_per_visitor: in a later stage, on average over the users who come at all.

    Raises:
        ValueError: probabilities of the next item that sum to more than 1, or a negative share.
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
            raise ValueError(f"series, companion, favourite and trend {reasons} are not shares of one whole")
        if min(self.kinds) < 0 or not sum(self.kinds):
            raise ValueError(f"kinds {self.kinds} are not shares of the users")


TREND_SHARE = 0.06  # of the leaves trend at any time
NEAR_SHARE = 0.7  # of the leaves are followed by one of their own department


@dataclass(frozen=True)
class Market:
    """The shelf: items leaf by leaf, within each leaf in the order in which they come out.

    Attributes:
        leaf: int64 (items,) of each item row.
        number: int64 (items,), place of each item row within its leaf.
        shelf: int64 (items,), item rows in order of the shelf.
        first: int64 (leaves,), where each leaf begins on the shelf.
        offered: int64 (stages, leaves), how many items of a leaf are out.
        sales: float64 (stages · (items + 1),), ascending: weights summed along the shelf, stage after stage.
        popularity: float64 (leaves,), sums to 1.
        departments: int64 (leaves,), ascending.
        trending: int64 (stages, trends), leaves.
        followers: int64 (stages, leaves), the leaf whose items are the companions of each leaf's.
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
        """An item row of each leaf, drawn by what sells in each stage."""
        return self._sell(stage, self.first[leaf], self.offered[stage, leaf], rng)

    def sell_any(self, stage: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """An item row for each stage, drawn from the whole shelf by what sells."""
        return self._sell(stage, np.zeros_like(stage), np.full_like(stage, len(self.shelf)), rng)

    def _sell(
        self, stage: np.ndarray, first: np.ndarray, count: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        begin = stage * (len(self.shelf) + 1) + first
        low, high = self.sales[begin], self.sales[begin + count]
        drawn = low + rng.random(len(stage)) * (high - low)
        drawn = np.minimum(drawn, np.nextafter(high, low))  # rounding can put a draw on the upper bound
        # an item not out yet has no width, so nothing is drawn from it
        place = np.searchsorted(self.sales, drawn, side="right") - 1 - begin
        return self.shelf[first + place]

    def next_of_series(self, item: np.ndarray, stage: np.ndarray) -> np.ndarray:
        """The item with the next number of the same leaf; after the newest, the first again."""
        leaf = self.leaf[item]
        return self.shelf[self.first[leaf] + (self.number[item] + 1) % self.offered[stage, leaf]]

    def companion(self, item: np.ndarray, stage: np.ndarray) -> np.ndarray:
        """The item of the same number, wrapped round, in the leaf that follows."""
        leaf = self.followers[stage, self.leaf[item]]
        return self.shelf[self.first[leaf] + self.number[item] % self.offered[stage, leaf]]

    def neighbours(self, leaf: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Another leaf of each leaf's department."""
        return _neighbours(leaf, self.departments, rng)


def make_market(catalogue: Catalogue, stages: int, behaviour: Behaviour, rng: np.random.Generator) -> Market:
    """Draw sales, trends and followers of all stages."""
    leaf, release = catalogue.leaf, catalogue.release
    items, leaves = len(leaf), len(catalogue.paths)
    shelf = np.argsort(leaf, kind="stable")  # rows stand in order of release already
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
