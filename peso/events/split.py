"""Another way to make stages of a stream: whole users dealt to them, instead of slices of time.

Knows stages and users; knows nothing of times, files or models. Under the natural split a user comes back in
stage after stage, so a model forgets and remembers the same people. Dealt out, every user is in one stage
only and what the stages have in common are the items. This is the user-disjoint split of Table 1 in the PESO
paper (arXiv 2510.25093).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from peso.events.histories import Ragged, Stage


def user_disjoint(stages: Sequence[Stage], seed: int) -> list[Stage]:
    """Deal the users of a stream to as many stages, whole, each at random.

    A user's events all become ``current`` of one stage, in the order they had; ``previous`` holds only what
    came before the stream. Users are shuffled and dealt until a stage has its share of the events, which is
    the share that the stage had before (up to one user's events). Within a stage they keep their order.

    Args:
        stages: of the natural split, all of them, in order.
        seed: fixes the shuffle.
    """
    before: dict[str, np.ndarray] = {}
    events: dict[str, list[np.ndarray]] = {}
    for stage in stages:
        for user, previous, current in zip(stage.users, stage.previous, stage.current, strict=True):
            before.setdefault(user, previous)  # of the first stage with this user: later ones repeat events
            events.setdefault(user, []).append(current)
    users = list(events)
    counts = np.array([sum(map(len, events[user])) for user in users], dtype=np.int64)
    bounds = np.cumsum([stage.current.offsets[-1] for stage in stages])

    order = np.random.default_rng([seed, len(users)]).permutation(len(users))
    ends = np.cumsum(counts[order])
    stage_of = np.empty(len(users), dtype=np.int64)
    # a user belongs where the middle of its events lies
    stage_of[order] = np.searchsorted(bounds, ends - counts[order] / 2, side="right")
    result = []
    for number in range(len(stages)):
        dealt = [users[row] for row in np.flatnonzero(stage_of == number)]
        result.append(
            Stage(
                number,
                dealt,
                Ragged.of(before[user] for user in dealt),
                Ragged.of(np.concatenate(events[user]) for user in dealt),
            )
        )
    return result
