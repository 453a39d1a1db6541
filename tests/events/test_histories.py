"""The cases that the released protocol cuts from a stage: none sees its target, all see the same past."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from peso.events.histories import Ragged, Stage, stage_counts, trained_counts
from peso.events.release import read_release

ROWS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=12)
WINDOWS = st.integers(1, 25)


def numbered(lengths: list[tuple[int, int]]) -> Stage:
    """A stage in which every event is an item of its own, so that positions can be told from items."""
    at, previous, current = 0, [], []
    for before, now in lengths:
        previous.append(range(at, at + before))
        current.append(range(at + before, at + before + now))
        at += before + now
    return Stage(3, [f"u{i}" for i in range(len(lengths))], Ragged.of(previous), Ragged.of(current))


def test_a_worked_example() -> None:
    stage = Stage(1, ["a", "b"], Ragged.of([[1, 2], []]), Ragged.of([[3, 4, 5, 6], [7, 8]]))
    (sequence,) = stage.training_sequences()
    assert sequence.user == "a"
    assert sequence.items.tolist() == [1, 2, 3, 4]
    assert sequence.items[sequence.first_target :].tolist() == [3, 4]
    validation, test = stage.validation_cases(3), stage.test_cases(3)
    assert (validation.targets.tolist(), validation.histories[0].tolist()) == ([5], [2, 3, 4])
    assert (test.targets.tolist(), test.histories[0].tolist()) == ([6], [3, 4, 5])
    users, histories = stage.histories(3)
    assert users == ["a", "b"]
    assert [history.tolist() for history in histories] == [[4, 5, 6], [7, 8]]


@given(ROWS)
def test_validation_and_test_items_are_in_no_training_sequence(lengths: list[tuple[int, int]]) -> None:
    stage = numbered(lengths)
    trained = {item for sequence in stage.training_sequences() for item in sequence.items.tolist()}
    held_out = {*stage.validation_cases(20).targets.tolist(), *stage.test_cases(20).targets.tolist()}
    assert not trained & held_out


@given(ROWS, WINDOWS)
def test_a_history_is_the_window_right_before_its_target(lengths: list[tuple[int, int]], window: int) -> None:
    stage = numbered(lengths)
    starts = {user: int(row[0]) for user, row in full_sequences(stage).items()}
    for cases in (stage.validation_cases(window), stage.test_cases(window)):
        for user, history, target in zip(cases.users, cases.histories, cases.targets, strict=True):
            # events are numbered in a row: nothing is skipped, nothing at or after the target is seen
            assert history.tolist() == list(range(max(starts[user], target - window), target))


@given(ROWS)
def test_each_item_of_the_stage_is_used_once_by_users_with_three(lengths: list[tuple[int, int]]) -> None:
    stage = numbered(lengths)
    targets = [item for s in stage.training_sequences() for item in s.items[s.first_target :].tolist()]
    used = [*targets, *stage.validation_cases(1).targets.tolist(), *stage.test_cases(1).targets.tolist()]
    expected = [item for row in stage.current if len(row) >= 3 for item in row.tolist()]
    assert sorted(used) == expected


@given(ROWS)
def test_with_all_users_every_item_of_the_others_is_a_target(lengths: list[tuple[int, int]]) -> None:
    tested = numbered(lengths)
    stage = replace(tested, target_users="all")
    targets = {s.user: s.items[s.first_target :].tolist() for s in stage.training_sequences()}
    expected = {
        user: (row[:-2] if len(row) >= 3 else row).tolist()
        for user, row in zip(stage.users, stage.current, strict=True)
        if len(row)
    }
    assert targets == expected
    before = dict(zip(stage.users, stage.previous, strict=True))
    for sequence in stage.training_sequences():
        assert sequence.items[: sequence.first_target].tolist() == before[sequence.user].tolist()
    # the tests do not change, and none of their targets is trained on
    for part in ("validation", "test"):
        cases, same = stage.cases(part, 20), tested.cases(part, 20)
        assert cases.users == same.users
        assert cases.targets.tolist() == same.targets.tolist()
        trained = {item for sequence in stage.training_sequences() for item in sequence.items.tolist()}
        assert not trained & set(cases.targets.tolist())


@given(ROWS)
def test_counts_are_those_of_the_cases(lengths: list[tuple[int, int]]) -> None:
    stage = numbered(lengths)
    counts = stage_counts(stage)
    sequences = stage.training_sequences()
    assert counts["users"] == len(lengths)
    assert counts["events"] == len(stage.current.values)
    assert counts["training_targets"] == sum(sequence.targets for sequence in sequences)
    assert counts["validation"] == len(stage.validation_cases(5)) == len(sequences)
    assert counts["test"] == len(stage.test_cases(5)) == counts["users"] - counts["left_out"]
    assert trained_counts(counts, "tested") == counts
    # counts are of the protocol for a stage of all users, too
    everyone = replace(stage, target_users="all")
    assert stage_counts(everyone) == counts
    targets = sum(sequence.targets for sequence in everyone.training_sequences())
    assert trained_counts(counts, "all") == {**counts, "training_targets": targets}


@given(ROWS, WINDOWS)
def test_training_validation_and_test_name_the_same_users_in_the_same_order(
    lengths: list[tuple[int, int]], window: int
) -> None:
    stage = numbered(lengths)
    users = [sequence.user for sequence in stage.training_sequences()]
    assert users == stage.validation_cases(window).users == stage.test_cases(window).users


@given(ROWS, WINDOWS)
def test_serving_starts_from_the_last_items_of_everyone(lengths: list[tuple[int, int]], window: int) -> None:
    stage = numbered(lengths)
    users, histories = stage.histories(window)
    assert users == stage.users
    for history, previous, current in zip(histories, stage.previous, stage.current, strict=True):
        assert history.tolist() == [*previous, *current][-window:]


def full_sequences(stage: Stage) -> dict[str, np.ndarray]:
    rows = (np.concatenate(pair) for pair in zip(stage.previous, stage.current, strict=True))
    return {user: row for user, row in zip(stage.users, rows, strict=True) if len(row)}


@given(st.lists(st.lists(st.integers(0, 99), max_size=9)))
def test_ragged_gives_back_its_rows(rows: list[list[int]]) -> None:
    ragged = Ragged.of(rows)
    assert [row.tolist() for row in ragged] == rows
    assert len(ragged) == len(rows)
    assert ragged.lengths.tolist() == [len(row) for row in rows]
    assert ragged.values.dtype == np.int32


def test_taking_cases_keeps_users_histories_and_targets_together() -> None:
    cases = numbered([(2, 3), (0, 2), (1, 4), (0, 5)]).test_cases(3)
    taken = cases.take(np.array([2, 0]))
    assert taken.users == ["u3", "u0"]
    assert taken.targets.tolist() == [cases.targets[2], cases.targets[0]]
    assert [h.tolist() for h in taken.histories] == [cases.histories[2].tolist(), cases.histories[0].tolist()]
    assert len(taken) == 2


def test_an_empty_stage_gives_empty_cases() -> None:
    cases = numbered([]).test_cases(20)
    assert len(cases) == 0
    assert cases.targets.dtype == np.int32


def test_on_released_data_previous_is_all_that_was_seen_of_the_user(release_dir: Path) -> None:
    _, stages, _ = read_release(release_dir)
    seen: dict[str, list[int]] = {}
    returned = 0
    for stage in stages:
        for user, previous, current in zip(stage.users, stage.previous, stage.current, strict=True):
            assert previous.tolist() == seen.get(user, [])
            returned += user in seen
            seen[user] = [*previous.tolist(), *current.tolist()]
    assert returned == 1013


@given(st.integers(0, 40), st.integers(1, 50))
def test_some_cases_are_evenly_spaced_and_none_comes_twice(users: int, most: int) -> None:
    cases = numbered([(0, 3)] * users).test_cases(5)
    taken = [int(user[1:]) for user in cases.spread(most).users]
    assert len(taken) == len(set(taken)) == min(users, most)
    assert taken == sorted(taken)
    if min(users, most) > 1:
        assert (taken[0], taken[-1]) == (0, users - 1)
        assert np.ptp(np.diff(taken)) <= 1
