"""Popularity: the same list for every user, the items with the most events.

A list made at stage t counts every event of the stages before t and, of stage t, the part that models train
on: the items of ``current[:-2]`` of users with at least three items in the stage. Events that stage t holds
back for validation and test are not counted, nor are those of users whom the protocol leaves out. With
``last`` = n, only stages t - n + 1 … t count: a recent window, or stage t alone with 1.

An event that only a ``previous`` list reports counts for the first stage given only, because later
``previous`` lists repeat what earlier stages hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field

from peso.baselines.baseline import Baseline, Setting
from peso.events.histories import Cases, Stage
from peso.runtime.progress import Observer


class Popularity(Baseline):
    """The items that most events were about.

    Smoothing adds one to the count of every semantic ID, shared evenly by the items that have it.
    """

    name = "popularity"
    probabilistic, continues = True, False

    class Options(Baseline.Options):
        last: int | None = Field(
            None, ge=1, description="count the newest so many stages only; none given: everything so far"
        )

    options: Options

    def __init__(self, setting: Setting, **options: Any) -> None:
        super().__init__(setting, **options)
        leaf_of = setting.trie.leaf_of
        self.added = (1 / np.bincount(leaf_of))[leaf_of]
        self.weights = self.added

    def learn(self, stages: Sequence[Stage], observer: Observer) -> dict[str, Any]:
        counts = item_counts(stages, len(self.added), self.options.last)
        self.weights = counts + self.added
        return {"events": int(counts.sum())}

    def scores(self, cases: Cases) -> np.ndarray:
        return np.tile(np.log(self.weights).astype(np.float32), (len(cases), 1))


def item_counts(stages: Sequence[Stage], items: int, last: int | None = None) -> np.ndarray:
    """How many events each item is known to have had after training on the last of these stages.

    Args:
        stages: consecutive; the list is made at the last one.
        items: size of the catalog.
        last: count only the newest ``last`` stages; None: all.

    Returns: int64 (items,).
    """
    *past, latest = stages
    seen = [sequence.items[sequence.first_target :] for sequence in latest.training_sequences()]
    if last is None:
        seen += [stages[0].previous.values, *(stage.current.values for stage in past)]
    elif last > 1:
        seen += [stage.current.values for stage in past[-(last - 1) :]]
    return np.bincount(np.concatenate([np.empty(0, dtype=np.int32), *seen]), minlength=items)
