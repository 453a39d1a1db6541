"""Item sequences as ragged arrays, stages and their test cases, and the chronological protocol that cuts a
log into stages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from peso.errors import DataError, UntrainableStage

Part = Literal["validation", "test"]
TargetUsers = Literal["tested", "all"]  # whose events are training targets
LEFT_OUT: dict[Part, int] = {"validation": 2, "test": 1}  # a user's last items, the first of them the target
MIN_STAGE_ITEMS = 3  # one training target, one validation item and one test item


@dataclass(frozen=True)
class Ragged:
    """Sequences of item numbers with different lengths, stored one after another.

    ``values`` is int32 (total,), ``offsets`` is int64 (n + 1,). ``ragged[i]`` is a view, not a copy.
    """

    values: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, rows: Iterable[Iterable[int]]) -> Ragged:
        """The sequences ``rows``."""
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
        """int64 (n,): the length of each sequence."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class TargetSequence:
    """One user's items up to the last training target. ``items[first_target:]`` are the targets."""

    user: str
    items: np.ndarray  # int32, oldest first
    first_target: int

    @property
    def targets(self) -> int:
        return len(self.items) - self.first_target


@dataclass(frozen=True)
class Cases:
    """Prediction cases. Each has a user, the history before the target (oldest first) and the target.

    ``before`` has all items that each user had before the target; the history is the last ``window`` of them.
    It is None if the histories are complete.
    """

    users: list[str]
    histories: list[np.ndarray]  # int32 each, at most `window` long
    targets: np.ndarray  # int32 (n,)
    before: list[np.ndarray] | None = None  # int32 each

    def __len__(self) -> int:
        return len(self.users)

    @property
    def seen(self) -> list[np.ndarray]:
        """For each case, the distinct items that the user had before the target, in ascending order."""
        return [np.unique(items) for items in (self.histories if self.before is None else self.before)]

    def take(self, rows: np.ndarray) -> Cases:
        before = None if self.before is None else [self.before[i] for i in rows]
        histories = [self.histories[i] for i in rows]
        return Cases([self.users[i] for i in rows], histories, self.targets[rows], before)

    def spread(self, most: int) -> Cases:
        """All cases, or ``most`` of them, evenly spaced, if there are more."""
        return self.take(np.linspace(0, len(self) - 1, min(len(self), most)).astype(np.int64))


@dataclass(frozen=True)
class Stage:
    """One chronological slice of the log: each user's items before the stage and in the stage.

    This follows the protocol of the released code. The training targets are ``current[:-2]``, the validation
    target is ``current[-2]`` and the test target is ``current[-1]``; the history of a target is everything
    before it in previous + current. Users with fewer than three items in the stage have no validation and no
    test target, and their events are part of later histories. With ``target_users="tested"``, as in the
    released code, they have no training targets either; with ``"all"``, all their items in the stage are
    training targets.
    """

    number: int
    users: list[str]
    previous: Ragged
    current: Ragged
    target_users: TargetUsers = "tested"

    def eligible(self) -> np.ndarray:
        """Rows of the users with at least three items in the stage, in stored order. These are tested."""
        return np.flatnonzero(self.current.lengths >= MIN_STAGE_ITEMS)

    def trained(self) -> Iterator[tuple[int, np.ndarray]]:
        """The row of each user with training targets, in stored order, and these targets (int32)."""
        for row, length in enumerate(self.current.lengths):
            if length >= MIN_STAGE_ITEMS:
                yield row, self.current[row][:-2]
            elif length and self.target_users == "all":
                yield row, self.current[row]

    def training_sequences(self) -> list[TargetSequence]:
        """The items and training targets of each user who has training targets."""
        return [
            TargetSequence(
                self.users[row], np.concatenate([self.previous[row], targets]), len(self.previous[row])
            )
            for row, targets in self.trained()
        ]

    def cases(self, part: Part, window: int) -> Cases:
        """The validation or test cases, one for each eligible user, with the last ``window`` items before the
        target."""
        rows, from_end = self.eligible(), LEFT_OUT[part]
        full = [np.concatenate([self.previous[i], self.current[i]]) for i in rows]
        before = [f[: len(f) - from_end] for f in full]
        return Cases(
            [self.users[i] for i in rows],
            [items[-window:] for items in before],
            np.array([f[-from_end] for f in full], dtype=np.int32),
            before,
        )

    def validation_cases(self, window: int) -> Cases:
        return self.cases("validation", window)

    def test_cases(self, window: int) -> Cases:
        return self.cases("test", window)

    def histories(self, window: int = 0) -> tuple[list[str], list[np.ndarray]]:
        """The histories from which the stage's model serves: all items of each user, including the last ones.

        Args:
            window: if positive, only the last ``window`` items of each user.

        Returns:
            The users and their histories.
        """
        full = [np.concatenate([p, c])[-window:] for p, c in zip(self.previous, self.current, strict=True)]
        return self.users, full


BASE_SHARE = 0.6  # the share of the events in stage 0; the rest is cut into equal parts


def stage_bounds(events: int, stages: int, base_share: float = BASE_SHARE) -> np.ndarray:
    """int64 (stages,): the number of events before the end of each stage, oldest first."""
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

    Events with the same time keep the order of the log. Each stage has the users with events in it, in the
    order of ``user_names``, with their complete history before the stage as ``previous``.

    Args:
        user_names: the ids of the users.
        users: int (events,), the user of each event as an index into ``user_names``.
        items: int (events,), the item number of each event.
        times: (events,), the time of each event, in any sortable type.
        stages: the number of stages, including stage 0.
        base_share: the share of the events in stage 0.

    Raises:
        DataError: there are fewer events than stages.
    """
    events = len(users)
    if stages < 1 or events < stages:
        raise DataError(
            f"{events} events cannot be cut into {stages} stages; give more events or fewer stages"
        )
    bounds = stage_bounds(events, stages, base_share)
    by_time = np.argsort(times, kind="stable")
    by_user = by_time[np.argsort(users[by_time], kind="stable")]  # grouped by user, oldest first
    stage_of = np.empty(events, dtype=np.int64)
    stage_of[by_time] = np.searchsorted(bounds, np.arange(events), side="right")
    stage = stage_slicer(user_names, users[by_user], items[by_user], stage_of[by_user], stages)
    return list(map(stage, range(stages)))


def stage_slicer(
    user_names: list[str], users: np.ndarray, items: np.ndarray, stage_of: np.ndarray, stages: int
) -> Callable[[int], Stage]:
    """A function that returns a stage by its number, so that not all need to be in memory together.

    Args:
        user_names: the ids of the users.
        users: int (events,), the user of each event as an index into ``user_names``, ascending.
        items: int (events,), the item number of each event.
        stage_of: int (events,), the stage of each event, ascending for each user.
        stages: the number of stages, including stage 0.
    """
    values = items.astype(np.int32, copy=False)
    # counts[u, t]: events of user u in stage t. Because (user, stage) ascends, cumulative sums are positions.
    counts = np.bincount(users * stages + stage_of, minlength=len(user_names) * stages)
    ends = np.cumsum(counts).reshape(len(user_names), stages)
    counts = counts.reshape(ends.shape)
    firsts = ends[:, 0] - counts[:, 0]

    def stage(number: int) -> Stage:
        present = np.flatnonzero(counts[:, number])
        end = ends[present, number]
        start = end - counts[present, number]
        return Stage(
            number,
            [user_names[u] for u in present],
            _slices(values, firsts[present], start),
            _slices(values, start, end),
        )

    return stage


def stage_counts(stage: Stage) -> dict[str, int]:
    """The counts of a stage under the protocol.

    ``users`` counts all users of the stage and ``events`` all their items. ``left_out`` counts the users with
    fewer than three items, who are not tested. ``training_targets``, ``validation`` and ``test`` count the
    targets of the others, whatever ``target_users`` (see :func:`trained_counts`).
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


def trained_counts(counts: Mapping[str, int], target_users: TargetUsers) -> dict[str, int]:
    """The counts of a stage (:func:`stage_counts`), with the training targets of these users.

    >>> counts = {"events": 12, "training_targets": 3, "validation": 2, "test": 2}
    >>> trained_counts(counts, "all")["training_targets"]
    8
    """
    if target_users == "tested":
        return dict(counts)
    return {**counts, "training_targets": counts["events"] - counts["validation"] - counts["test"]}


def require_trainable(stage: Stage, source: str) -> None:
    """Check that a stage has training targets.

    Args:
        source: where the stage comes from, for the message.

    Raises:
        UntrainableStage: the stage has no users, or no user has three items in it.
    """
    refuse_untrainable(stage.number, len(stage.users), int(stage.current.lengths.max(initial=0)), source)


def refuse_untrainable(number: int, users: int, most: int, source: str) -> None:
    """The check of :func:`require_trainable` for a stage of which only counts are known.

    Args:
        users: the number of users in the stage.
        most: the largest number of events of a user in the stage.
        source: where the stage comes from, for the message.
    """
    if not users:
        raise UntrainableStage(
            f"{source}: stage {number} is empty; leave it out and renumber the later stages, "
            "or cut the log into fewer stages"
        )
    if most < MIN_STAGE_ITEMS:
        raise UntrainableStage(
            f"{source}: none of the {users} users of stage {number} has "
            f"{MIN_STAGE_ITEMS} events in it (the most is {most}), so nothing can be validated or "
            "tested; merge it with a neighboring stage, or cut the log into fewer stages"
        )


def _slices(values: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> Ragged:
    """The sequences ``values[start:end]`` for every pair of start and end."""
    lengths = ends - starts
    offsets = np.zeros(len(starts) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return Ragged(values[np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])], offsets)


def user_disjoint(stages: Sequence[Stage], seed: int) -> list[Stage]:
    """Assign each user of a stream to one stage at random, with all of the user's events.

    The events become ``current`` of that stage, in their order; ``previous`` has only the items from before
    the stream. Users are shuffled and assigned until a stage has as many events as before (up to one user's
    events). Users of a stage keep their order.

    Args:
        stages: all stages of the natural split, in order.
        seed: the seed of the shuffle.

    Returns:
        As many stages as before.
    """
    before: dict[str, np.ndarray] = {}
    events: dict[str, list[np.ndarray]] = {}
    for stage in stages:
        for user, previous, current in zip(stage.users, stage.previous, stage.current, strict=True):
            before.setdefault(user, previous)  # from the user's first stage; later ones repeat the events
            events.setdefault(user, []).append(current)
    users = list(events)
    counts = np.array([sum(map(len, events[user])) for user in users], dtype=np.int64)
    bounds = np.cumsum([stage.current.offsets[-1] for stage in stages])

    order = np.random.default_rng([seed, len(users)]).permutation(len(users))
    ends = np.cumsum(counts[order])
    stage_of = np.empty(len(users), dtype=np.int64)
    # a user belongs to the stage that contains the middle of the user's events
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
