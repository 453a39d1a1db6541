"""Ragged arrays of item sequences, the cases that the released protocol cuts from them, and the chronological
protocol: a log cut into stages, what a stage holds, when a stage can be used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from peso.errors import DataError, UntrainableStage

Part = Literal["validation", "test"]
LEFT_OUT: dict[Part, int] = {"validation": 2, "test": 1}  # a user's last items, the first of them the target
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

    def cases(self, part: Part, window: int) -> Cases:
        return self._cases(LEFT_OUT[part], window)

    def validation_cases(self, window: int) -> Cases:
        return self.cases("validation", window)

    def test_cases(self, window: int) -> Cases:
        return self.cases("test", window)

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


BASE_SHARE = 0.6  # of all events, by time; the rest is cut into equal parts


def stage_bounds(events: int, stages: int, base_share: float = BASE_SHARE) -> np.ndarray:
    """int64 (stages,): how many of the events, oldest first, lie before the end of each stage."""
    share = base_share if stages > 1 else 1.0
    return np.rint(np.linspace(share, 1.0, stages) * events).astype(np.int64)


def cut_stages(
    user_names: list[str],
    users: np.ndarray,
    items: np.ndarray,
    times: np.ndarray,
    stages: int,
    base_share: float = BASE_SHARE,
) -> list[Stage]:
    """Cut a log by time: the oldest ``base_share`` of the events, then ``stages - 1`` equal parts.

    Events of one second keep the order of the log. In each stage stand the users who did something in it,
    in the order of ``user_names``, with their whole history before the stage as ``previous``.

    Args:
        user_names: ids of the users.
        users: int (events,), rows of ``user_names``.
        items: int (events,), item numbers.
        times: (events,), anything that sorts.
        stages: how many, stage 0 included.

    Raises:
        DataError: fewer events than stages.
    """
    events = len(users)
    if stages < 1 or events < stages:
        raise DataError(
            f"{events} events cannot be cut into {stages} stages; give more events or fewer stages"
        )
    bounds = stage_bounds(events, stages, base_share)
    by_time = np.argsort(times, kind="stable")
    by_user = by_time[np.argsort(users[by_time], kind="stable")]  # user after user, oldest first within each
    stage_of = np.empty(events, dtype=np.int64)
    stage_of[by_time] = np.searchsorted(bounds, np.arange(events), side="right")
    return slice_stages(user_names, users[by_user], items[by_user], stage_of[by_user], stages)


def slice_stages(
    user_names: list[str], users: np.ndarray, items: np.ndarray, stage_of: np.ndarray, stages: int
) -> list[Stage]:
    """The stages of events that stand user after user, oldest first within each.

    Args:
        user_names: ids of the users.
        users: int (events,), rows of ``user_names``, ascending.
        items: int (events,), item numbers.
        stage_of: int (events,), ascending within each user.
        stages: how many, stage 0 included.
    """
    values = items.astype(np.int32)
    # counts[u, t]: events of user u in stage t. As (user, stage) ascends, its running sums are positions.
    counts = np.bincount(users * stages + stage_of, minlength=len(user_names) * stages)
    ends = np.cumsum(counts).reshape(len(user_names), stages)
    counts = counts.reshape(ends.shape)
    firsts = ends[:, 0] - counts[:, 0]
    result = []
    for number in range(stages):
        present = np.flatnonzero(counts[:, number])
        end = ends[present, number]
        start = end - counts[present, number]
        result.append(
            Stage(
                number,
                [user_names[u] for u in present],
                _slices(values, firsts[present], start),
                _slices(values, start, end),
            )
        )
    return result


def stage_counts(stage: Stage) -> dict[str, int]:
    """What the protocol makes of a stage.

    ``users``: everyone in it; ``left_out``: those with fewer than three items, of whom nothing is learnt
    or tested; ``validation`` and ``test``: one case for each of the others; ``events``: items of the stage.
    """
    lengths = stage.current.lengths
    eligible = lengths[lengths >= MIN_STAGE_ITEMS]
    return {
        "users": len(lengths),
        "events": int(lengths.sum()),
        "training_targets": int((eligible - 2).sum()),
        "validation": len(eligible),
        "test": len(eligible),
        "left_out": len(lengths) - len(eligible),
    }


def require_trainable(stage: Stage, source: str) -> None:
    """Refuse a stage that leaves nothing to learn from.

    Args:
        source: where the stage comes from, for the message.

    Raises:
        UntrainableStage: nobody is in the stage, or nobody has three items in it.
    """
    refuse_untrainable(stage.number, len(stage.users), int(stage.current.lengths.max(initial=0)), source)


def refuse_untrainable(number: int, users: int, most: int, source: str) -> None:
    """As :func:`require_trainable`, for a stage of which only this is known.

    Args:
        users: how many are in it.
        most: the events of the user who has most.
    """
    if not users:
        raise UntrainableStage(
            f"{source}: stage {number} is empty; leave it out and renumber the later ones, "
            "or cut the log into fewer stages"
        )
    if most < MIN_STAGE_ITEMS:
        raise UntrainableStage(
            f"{source}: none of the {users} users of stage {number} has "
            f"{MIN_STAGE_ITEMS} events in it (the most is {most}), so nothing "
            "can be trained on or tested; merge it with a neighbouring stage, or cut fewer stages"
        )


def _slices(values: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> Ragged:
    """``values[start:end]`` for every pair, end to end."""
    lengths = ends - starts
    offsets = np.zeros(len(starts) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return Ragged(values[np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])], offsets)


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
