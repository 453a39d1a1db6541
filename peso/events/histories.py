"""Ragged arrays of item sequences, and the cases that the released protocol cuts from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

MIN_STAGE_ITEMS = 3  # fewer leave no training target beside the validation and the test item


@dataclass(frozen=True)
class Ragged:
    """Sequences of item numbers of different length, stored end to end.

    ``values``: int32 (total,); ``offsets``: int64 (n + 1,). ``ragged[i]`` is a view, no copy.
    """

    values: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, rows: Iterable[Iterable[int]]) -> Ragged:
        arrays = [np.asarray(list(row), dtype=np.int32) for row in rows]
        offsets = np.zeros(len(arrays) + 1, dtype=np.int64)
        np.cumsum([len(a) for a in arrays], out=offsets[1:])
        values = np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int32)
        return cls(values, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


@dataclass(frozen=True)
class TargetSequence:
    """One user's items up to the last training target; ``items[first_target:]`` are the targets."""

    user: str
    items: np.ndarray  # int32, oldest first
    first_target: int

    @property
    def targets(self) -> int:
        return len(self.items) - self.first_target


@dataclass(frozen=True)
class Cases:
    """Prediction cases: for each a user, the history before the target (oldest first) and the target.

    ``before``: all items that the user had before the target, of which the history is the last ``window``.
    None: the histories are whole.
    """

    users: list[str]
    histories: list[np.ndarray]  # int32 each, at most `window` long
    targets: np.ndarray  # int32 (n,)
    before: list[np.ndarray] | None = None  # int32 each

    def __len__(self) -> int:
        return len(self.users)

    @property
    def seen(self) -> list[np.ndarray]:
        """Per case the distinct items that the user had before the target, in ascending order."""
        return [np.unique(items) for items in (self.histories if self.before is None else self.before)]

    def take(self, rows: np.ndarray) -> Cases:
        before = None if self.before is None else [self.before[i] for i in rows]
        histories = [self.histories[i] for i in rows]
        return Cases([self.users[i] for i in rows], histories, self.targets[rows], before)


@dataclass(frozen=True)
class Stage:
    """One chronological slice: per user what came before it and what the user did in it.

    The protocol of the released code: with full = previous + current, the training targets are the
    positions of ``current[:-2]``, validation is ``current[-2]``, test is ``current[-1]``; users with fewer
    than three items in the stage are left out of all three (their events still are history later).
    """

    number: int
    users: list[str]
    previous: Ragged
    current: Ragged

    def eligible(self) -> np.ndarray:
        """Rows of the users with at least three items in the stage, in stored order."""
        return np.flatnonzero(self.current.lengths >= MIN_STAGE_ITEMS)

    def training_sequences(self) -> list[TargetSequence]:
        return [
            TargetSequence(
                self.users[i],
                np.concatenate([self.previous[i], self.current[i][:-2]]),
                len(self.previous[i]),
            )
            for i in self.eligible()
        ]

    def validation_cases(self, window: int) -> Cases:
        return self._cases(2, window)

    def test_cases(self, window: int) -> Cases:
        return self._cases(1, window)

    def histories(self, window: int = 0) -> tuple[list[str], list[np.ndarray]]:
        """Everything known of each user of the stage, its last items included: what serving starts from.
        ``window``: only the last so many; 0: all."""
        full = [np.concatenate([p, c])[-window:] for p, c in zip(self.previous, self.current, strict=True)]
        return self.users, full

    def _cases(self, from_end: int, window: int) -> Cases:
        rows = self.eligible()
        full = [np.concatenate([self.previous[i], self.current[i]]) for i in rows]
        before = [f[: len(f) - from_end] for f in full]
        return Cases(
            [self.users[i] for i in rows],
            [items[-window:] for items in before],
            np.array([f[-from_end] for f in full], dtype=np.int32),
            before,
        )
