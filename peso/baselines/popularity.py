"""Popularity recommends the items with the most events, the same list for every user.

At stage t, the counted events are all events of earlier stages and the training targets of stage t. With
``last`` = n, only stages t - n + 1 … t are counted. Events in ``previous`` lists are counted only for the
first given stage, because later ``previous`` lists repeat the events of earlier stages.
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
    """The items with the most events.

    For smoothing, the count of every semantic ID is increased by one, which its items share equally.
    """

    name = "popularity"
    probabilistic, continues = True, False

    class Options(Baseline.Options):
        last: int | None = Field(
            None, ge=1, description="number of newest stages that are counted; default: all"
        )

    options: Options

    def __init__(self, setting: Setting, **options: Any) -> None:
        super().__init__(setting, **options)
        leaf_of = setting.trie.leaf_of
        self.smoothing = (1 / np.bincount(leaf_of))[leaf_of]
        self.weights = self.smoothing

    def learn(self, stages: Sequence[Stage], observer: Observer) -> dict[str, Any]:
        counts = item_counts(stages, len(self.smoothing), self.options.last)
        self.weights = counts + self.smoothing
        return {"events": int(counts.sum())}

    def scores(self, cases: Cases) -> np.ndarray:
        return np.tile(np.log(self.weights).astype(np.float32), (len(cases), 1))


def item_counts(stages: Sequence[Stage], items: int, last: int | None = None) -> np.ndarray:
    """The number of events of each item that may be used when training on the last of these stages.

    Args:
        stages: consecutive stages.
        items: the number of items of the catalog.
        last: the number of newest stages to count; None for all.

    Returns:
        int64 (items,).
    """
    *past, latest = stages
    seen = [sequence.items[sequence.first_target :] for sequence in latest.training_sequences()]
    if last is None:
        seen += [stages[0].previous.values, *(stage.current.values for stage in past)]
    elif last > 1:
        seen += [stage.current.values for stage in past[-(last - 1) :]]
    return np.bincount(np.concatenate([np.empty(0, dtype=np.int32), *seen]), minlength=items)
