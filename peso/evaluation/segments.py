"""The groups of users and target items of a test case, by what was seen before its stage."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np

from peso.events.histories import Stage

DORMANT = "dormant"  # seen in an earlier stage, but not in the last one
CONTINUING = "continuing"  # seen in the last stage
NEW = "new"  # never seen before
KNOWN = "known"  # of items: seen before

USER_SEGMENTS = (DORMANT, CONTINUING, NEW)
ITEM_SEGMENTS = (KNOWN, NEW)


@dataclass(frozen=True)
class CaseLabels:
    """Per test case, in the order of ``Stage.test_cases``: the groups that it belongs to.

    ``history_length``: int32 (n,), the user's items before the target, not cut at the window.
    """

    users: list[str]
    user_segment: list[str]
    item_segment: list[str]
    history_length: np.ndarray


def user_segments(users: Sequence[str], last: AbstractSet[str], earlier: AbstractSet[str]) -> list[str]:
    """Each user's group.

    Args:
        last: users seen in the stage right before.
        earlier: users seen in any stage before that one (whether seen in the last or not).

    >>> user_segments(["ann", "bo", "cy"], last={"ann"}, earlier={"ann", "bo"})
    ['continuing', 'dormant', 'new']
    """
    return [CONTINUING if user in last else DORMANT if user in earlier else NEW for user in users]


def item_segments(targets: Iterable[int], known: AbstractSet[int]) -> list[str]:
    """``known`` for the targets that some user had before the stage, else ``new``.

    >>> item_segments([3, 4], known={3})
    ['known', 'new']
    """
    return [KNOWN if int(target) in known else NEW for target in targets]


def label_cases(earlier: Iterable[Stage], stage: Stage) -> CaseLabels:
    """Label the test cases of a stage by what was seen before it began.

    A user is seen in a stage with one event or more, even where the protocol leaves the user out for having
    fewer than three. An event that only a user's ``previous`` list tells of counts as earlier. In the first
    stage every user and every item is new.

    Args:
        earlier: all stages before this one, in order.
    """
    seen_before_last: set[str] = set()
    last: set[str] = set()
    known: set[int] = set()
    for past in earlier:
        seen_before_last |= last
        last = {past.users[i] for i in np.flatnonzero(past.current.lengths)}
        seen_before_last |= _with_history(past)
        known.update(np.unique(past.previous.values).tolist(), np.unique(past.current.values).tolist())
    seen_before_last |= _with_history(stage)
    known.update(np.unique(stage.previous.values).tolist())

    cases = stage.test_cases(window=1)
    lengths = (stage.previous.lengths + stage.current.lengths - 1)[stage.eligible()]
    return CaseLabels(
        users=cases.users,
        user_segment=user_segments(cases.users, last, seen_before_last),
        item_segment=item_segments(cases.targets, known),
        history_length=lengths.astype(np.int32),
    )


def _with_history(stage: Stage) -> set[str]:
    return {stage.users[i] for i in np.flatnonzero(stage.previous.lengths)}
