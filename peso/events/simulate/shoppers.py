"""Who the simulated users are: their kind, their taste in each stage, and when they come."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from peso.errors import DataError
from peso.events.protocol import BASE_SHARE, stage_bounds
from peso.events.simulate.market import DORMANT, DRIFTING, FAVOURITE_WEIGHTS, NEW, Behaviour, Market

EPOCH = 1_640_995_200  # 2022-01-01, where the log begins
STAGE_SECONDS = 30 * 86_400  # a later stage is a month; stage 0 as long as its share of the events
SITTING_SECONDS = 86_400  # no sitting lasts longer


@dataclass(frozen=True)
class Shoppers:
    """``kinds``: int64 (users,), into ``KINDS``; ``favourites``: int64 (users, stages, 3), leaf categories
    by falling weight; ``visits``: int64 (users, stages), how many events."""

    kinds: np.ndarray
    favourites: np.ndarray
    visits: np.ndarray


def make_shoppers(users: int, market: Market, behaviour: Behaviour, rng: np.random.Generator) -> Shoppers:
    """Draw users. With one stage nothing can change, and all of them are stable.

    Raises:
        DataError: so few users that a stage stays empty.
    """
    stages = market.stages
    kinds = np.zeros(users, dtype=np.int64)
    if stages > 1:
        ends = np.rint(np.cumsum(behaviour.kinds) / sum(behaviour.kinds) * users).astype(np.int64)
        kinds = rng.permutation(np.repeat(np.arange(4), np.diff(ends, prepend=0)))
    # a new user comes for the first time, a dormant one comes back, in this stage; 0: there from the start.
    # A dormant user is away for a whole stage at least, where there is room for one.
    arrival = np.where(kinds == NEW, rng.integers(1, max(stages, 2), users), 0)
    comeback = np.where(kinds == DORMANT, rng.integers(min(2, stages - 1), max(stages, 2), users), 0)
    return Shoppers(
        kinds,
        _favourites(kinds, arrival, market, behaviour, rng),
        _visits(arrival, comeback, stages, behaviour, rng),
    )


def make_times(shoppers: Shoppers, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Users, stages and unix seconds of all events (int64 each), user after user, times ascending strictly.

    Events come in sittings of about four; dormant users are gone for the last third of stage 0.
    """
    users, stages = shoppers.visits.shape
    cell = np.repeat(np.arange(users * stages), shoppers.visits.ravel())  # (events,) user and stage in one
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
    """(users, stages, 3). A first favourite comes with neighbours of its department."""
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
    """(users, stages); the events of a stage sum to its exact share, so that the protocol cuts just there."""
    users = len(arrival)
    quotas = np.diff(stage_bounds(users * behaviour.events_per_user, stages), prepend=0)
    since = np.maximum(arrival, comeback)
    keenness = rng.gamma(2.0, size=users)
    result = np.zeros((users, stages), dtype=np.int64)
    for stage, quota in enumerate(quotas):
        if stage == 0:
            present = np.flatnonzero(arrival == 0)
        else:
            # whoever arrives or comes back now is there; of the others as many as the events go round for
            order = np.where(since == stage, -1.0, rng.random(users))
            wanted = max(1, round(quota / behaviour.events_per_visitor))
            able = np.flatnonzero(since <= stage)
            present = able[np.argsort(order[able], kind="stable")[:wanted]]
        if len(present) == 0:
            raise DataError(
                f"{users} users are too few for {stages} stages: nobody is there in stage {stage}; "
                "simulate more users or fewer stages"
            )
        least = min(1, quota // len(present))
        share = keenness[present] / keenness[present].sum()
        result[present, stage] = least + rng.multinomial(quota - least * len(present), share)
    return result
