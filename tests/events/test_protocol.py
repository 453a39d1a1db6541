"""Cutting a log into stages."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peso.errors import DataError
from peso.events.histories import Ragged, Stage, cut_stages, require_trainable, stage_bounds


def test_a_worked_example() -> None:
    #   time  0  1  2 | 3 | 4
    users = np.array([1, 0, 1, 1, 0])
    items = np.array([7, 8, 9, 5, 6])
    base, first, second = cut_stages(["a", "b"], users, items, np.arange(5), 3)
    assert (base.users, first.users, second.users) == (["a", "b"], ["b"], ["a"])
    assert [row.tolist() for row in base.current] == [[8], [7, 9]]
    assert [row.tolist() for row in first.previous] == [[7, 9]]
    assert [row.tolist() for row in first.current] == [[5]]
    assert [row.tolist() for row in second.previous] == [[8]]
    assert [row.tolist() for row in second.current] == [[6]]


LOGS = st.integers(1, 6).flatmap(
    lambda stages: st.tuples(
        st.just(stages),
        st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), min_size=stages, max_size=80),
    )
)


@given(LOGS)
def test_stages_hold_every_event_once_and_in_order_of_time(
    log: tuple[int, list[tuple[int, int]]],
) -> None:
    stages, rows = log
    users, times = (np.array(column) for column in zip(*rows, strict=True))
    items = np.arange(len(rows))  # an event is its own item, so that each can be followed
    cut = cut_stages([f"u{u}" for u in range(5)], users, items, times, stages)

    by_time = np.argsort(times, kind="stable")
    bounds = stage_bounds(len(rows), stages)
    for stage, start, end in zip(cut, [0, *bounds[:-1]], bounds, strict=True):
        assert sorted(stage.current.values) == sorted(by_time[start:end])
        assert (stage.current.lengths > 0).all()
        for user, previous, current in zip(stage.users, stage.previous, stage.current, strict=True):
            own = [event for event in by_time if f"u{users[event]}" == user]
            before = [event for event in by_time[:start] if f"u{users[event]}" == user]
            assert previous.tolist() == before
            assert [*previous, *current] == own[: len(previous) + len(current)]


@given(st.integers(1, 10_000), st.integers(1, 20))
def test_later_stages_are_equal_parts_of_forty_per_cent(events: int, stages: int) -> None:
    bounds = stage_bounds(events, stages)
    assert bounds[-1] == events
    if stages > 1:
        assert abs(bounds[0] - 0.6 * events) <= 0.5
        parts = np.diff(bounds)
        assert parts.max() - parts.min() <= 1


def test_fewer_events_than_stages_are_refused() -> None:
    with pytest.raises(DataError, match="2 events cannot be cut into 3 stages"):
        cut_stages(["a"], np.zeros(2, int), np.zeros(2, int), np.arange(2), 3)


@pytest.mark.parametrize(
    ("current", "message"),
    [([], "stage 4 is empty"), ([[1, 2], [3]], r"none of the 2 users of stage 4 .*the most is 2")],
)
def test_a_stage_that_leaves_nothing_to_learn_is_refused(current: list, message: str) -> None:
    stage = Stage(4, ["u"] * len(current), Ragged.of([[]] * len(current)), Ragged.of(current))
    with pytest.raises(DataError, match=rf"^somewhere: .*{message}"):
        require_trainable(stage, "somewhere")
    require_trainable(Stage(4, ["u"], Ragged.of([[]]), Ragged.of([[1, 2, 3]])), "somewhere")
