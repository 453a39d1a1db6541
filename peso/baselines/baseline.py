"""The interface of a baseline: it learns stage after stage and scores every item for a user."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from scipy import sparse

from peso.events.histories import Cases, Stage
from peso.runtime.progress import Observer


class Baseline(Protocol):
    """A recommender in its state after some stage.

    ``probabilistic``: whether softmax over the scores is the model's own distribution over the next item. If
    not, a temperature is fitted to the validation cases.
    """

    probabilistic: bool

    def learn(self, stages: Sequence[Stage], observer: Observer) -> dict[str, Any]:
        """Learn the last of these stages, after the others. Returns figures to record."""

    def scores(self, cases: Cases) -> np.ndarray:
        """float32 (n, items): larger is better. Reads users and histories, never targets."""

    def save(self, directory: Path) -> None:
        """Write to an empty directory what cannot be recomputed from the stages in seconds."""

    def restore(self, directory: Path, stages: Sequence[Stage]) -> None:
        """Restore the state saved here, after learning these stages."""


def known_histories(stages: Sequence[Stage]) -> dict[str, np.ndarray]:
    """The items that each user is known to have had after training on the last of these stages, oldest first.

    Of the last stage only what models train on counts: ``current[:-2]`` of the users who take part. All other
    events of it become known with the next stage.
    """
    *past, latest = stages
    known: dict[str, np.ndarray] = {}
    for stage in past:
        for user, previous, current in zip(stage.users, stage.previous, stage.current, strict=True):
            known[user] = np.concatenate([previous, current])
    known.update(zip(latest.users, latest.previous, strict=True))
    known.update({sequence.user: sequence.items for sequence in latest.training_sequences()})
    return {user: items for user, items in known.items() if len(items)}


def repeats_occur(stages: Sequence[Stage]) -> bool:
    """Whether any user is known to have had an item twice, after training on the last of these stages."""
    *past, latest = stages
    for stage in past:
        if _has_repeat([np.concatenate(pair) for pair in zip(stage.previous, stage.current, strict=True)]):
            return True
    return _has_repeat([*latest.previous, *(one.items for one in latest.training_sequences())])


def _has_repeat(sequences: Sequence[np.ndarray]) -> bool:
    """Whether some item is twice in one of the sequences."""
    owners = np.repeat(np.arange(len(sequences)), [len(items) for items in sequences])
    items = np.concatenate([np.empty(0, dtype=np.int64), *sequences])
    keys = owners * (items.max(initial=0) + 1) + items
    return len(np.unique(keys)) < len(keys)


def padded(histories: Sequence[np.ndarray], window: int, padding: int) -> np.ndarray:
    """int64 (n, window): the last ``window`` items of each history, padded on the right."""
    result = np.full((len(histories), window), padding, dtype=np.int64)
    for row, history in zip(result, histories, strict=True):
        last = history[-window:]
        row[: len(last)] = last
    return result


Matrix = Any  # scipy.sparse.csr_array, which has no type stubs


def interactions(histories: Sequence[np.ndarray], items: int) -> Matrix:
    """float64 (n, items): 1 where an item is in a history, however often.

    >>> interactions([np.array([2, 0, 2]), np.array([1])], items=3).toarray().tolist()
    [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    """
    lengths = [len(history) for history in histories]
    rows = np.repeat(np.arange(len(histories)), lengths)
    columns = np.concatenate([np.empty(0, dtype=np.int32), *histories])
    matrix = sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=(len(histories), items))
    matrix.sum_duplicates()
    matrix.data[:] = 1.0
    return matrix
