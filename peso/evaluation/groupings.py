"""Ways to split the test cases into groups. Predictions already carry the groups of users and items
(peso/evaluation/segments.py); the others are made here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from peso.evaluation.catalogue import Catalogue
from peso.evaluation.predictions import Predictions
from peso.evaluation.segments import ITEM_SEGMENTS, USER_SEGMENTS

LONG_HISTORY = 10  # half of the usual window
MOST_VALUES = 8  # of a column that get a group of their own
POPULARITY = ("head", "middle", "tail")
HISTORIES = (f"up to {LONG_HISTORY} items", f"more than {LONG_HISTORY}")
ACTIVITY = ("least active quarter", "second", "third", "most active quarter")
OTHER, UNKNOWN = "other", "unknown"


@dataclass(frozen=True)
class Segmentation:
    """``assign(stage, predictions)`` gives the group of each case, a number into ``groups``: int (cases,).

    ``name`` serves as a file name; ``title`` says what is parted.
    """

    name: str
    title: str
    groups: Sequence[str]
    assign: Callable[[int, Predictions], np.ndarray]


def _labelled(name: str, title: str, groups: Sequence[str], column: str) -> Segmentation:
    number = {group: place for place, group in enumerate(groups)}
    return Segmentation(
        name, title, groups, lambda stage, given: np.array([number[g] for g in getattr(given, column)])
    )


def activity_quarters(lengths: np.ndarray) -> np.ndarray:
    """The quarter of each user by the number of items before the target; equal numbers stay together.

    >>> activity_quarters(np.array([1, 1, 1, 5, 7, 9])).tolist()
    [0, 0, 0, 2, 3, 3]
    """
    return np.searchsorted(np.quantile(lengths, [0.25, 0.5, 0.75]), lengths, side="left")


USERS = _labelled("user-segment", "users", USER_SEGMENTS, "user_segment")
ITEMS = _labelled("item-segment", "target items", ITEM_SEGMENTS, "item_segment")
HISTORY = Segmentation(
    "history", "history", HISTORIES, lambda stage, given: (given.history_length > LONG_HISTORY).astype(int)
)
ACTIVE = Segmentation(
    "activity", "activity", ACTIVITY, lambda stage, given: activity_quarters(given.history_length)
)


def by_popularity(catalogue: Catalogue) -> Segmentation:
    """Head, middle and tail of the target items: a third of the events seen before the answer each."""

    def assign(stage: int, given: Predictions) -> np.ndarray:
        return catalogue.popularity_thirds(stage)[[catalogue.rows[target] for target in given.targets]]

    return Segmentation("popularity", "popularity of the target", POPULARITY, assign)


def by_column(catalogue: Catalogue, column: str) -> Segmentation:
    """The most frequent values of a column of the item table (of the target) or of the user table.

    Raises:
        ConfigError: no such column.
    """
    catalogue.require_column(column)
    of_items = column in catalogue.item_columns
    if of_items:
        known = dict(zip(catalogue.item_ids, catalogue.item_columns[column], strict=False))
    else:
        known = dict(catalogue.user_columns[column])
    values = Counter(value for value in known.values() if value is not None)
    groups = [
        value for value, _ in sorted(values.items(), key=lambda pair: (-pair[1], pair[0]))[:MOST_VALUES]
    ]
    number = {group: place for place, group in enumerate(groups)}

    def assign(stage: int, given: Predictions) -> np.ndarray:
        found = [known.get(name) for name in (given.targets if of_items else given.users)]
        return np.array(
            [len(groups) + 1 if value is None else number.get(value, len(groups)) for value in found]
        )

    return Segmentation(f"column-{column}", column, [*groups, OTHER, UNKNOWN], assign)
