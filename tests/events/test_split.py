"""The user-disjoint split: every user in one stage, every event kept, whatever the stream."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from event_logs import appended, ingested, write_log
from hypothesis import given
from hypothesis import strategies as st

from peso.errors import DataError
from peso.events.histories import Ragged, Stage, cut_stages, user_disjoint
from peso.events.release import read_release

T = 1_600_000_000
EVENTS = [(f"u{k * 7 % 23}", f"i{k * k % 11}", T + k * 3600) for k in range(300)]


@st.composite
def streams(draw: st.DrawFn) -> list[Stage]:
    stages = draw(st.integers(1, 5))
    rows = draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 99)), min_size=stages, max_size=100))
    users, times = (np.array(column) for column in zip(*rows, strict=True))
    # an event is its own item, so that each can be followed
    return cut_stages([f"u{u}" for u in range(10)], users, np.arange(len(rows)), times, stages)


def sequences(stages: list[Stage]) -> dict[str, list[int]]:
    """Each user's events of all stages, in order."""
    result: dict[str, list[int]] = {}
    for stage in stages:
        for user, current in zip(stage.users, stage.current, strict=True):
            result.setdefault(user, []).extend(current.tolist())
    return result


@given(streams(), st.integers(0, 5))
def test_every_user_is_in_one_stage_with_all_events_in_order(natural: list[Stage], seed: int) -> None:
    dealt = user_disjoint(natural, seed)
    assert [stage.number for stage in dealt] == list(range(len(natural)))
    assert max(Counter(user for stage in dealt for user in stage.users).values()) == 1
    assert sequences(dealt) == sequences(natural)
    assert not any(len(stage.previous.values) for stage in dealt)


@given(streams(), st.integers(0, 5))
def test_stages_keep_their_size_up_to_one_user(natural: list[Stage], seed: int) -> None:
    dealt = user_disjoint(natural, seed)
    most = max(map(len, sequences(natural).values()))
    before, after = (np.cumsum([len(s.current.values) for s in stages]) for stages in (natural, dealt))
    assert (np.abs(before - after) <= most / 2).all()


def test_what_came_before_the_stream_stays_history() -> None:
    natural = [
        Stage(0, ["a"], Ragged.of([[9, 8]]), Ragged.of([[1, 2]])),
        Stage(1, ["a", "b"], Ragged.of([[9, 8, 1, 2], [7]]), Ragged.of([[3], [4, 5]])),
    ]
    found = {
        user: (previous.tolist(), current.tolist())
        for stage in user_disjoint(natural, seed=0)
        for user, previous, current in zip(stage.users, stage.previous, stage.current, strict=True)
    }
    assert found == {"a": ([9, 8], [1, 2, 3]), "b": ([7], [4, 5])}


def test_the_seed_decides_who_is_where(tmp_path: Path) -> None:
    path = write_log(tmp_path / "log.csv", EVENTS)
    natural = ingested(tmp_path / "natural", format="csv", path=str(path), stages=3)
    stages = [natural.stage(number) for number in range(3)]
    assert user_disjoint(stages, 1)[1].users == user_disjoint(stages, 1)[1].users
    assert user_disjoint(stages, 1)[1].users != user_disjoint(stages, 2)[1].users


def test_a_log_is_ingested_with_its_users_dealt_out(tmp_path: Path) -> None:
    path = write_log(tmp_path / "log.csv", EVENTS)
    natural = ingested(tmp_path / "natural", format="csv", path=str(path), stages=3)
    dealt = ingested(tmp_path / "dealt", format="csv", path=str(path), stages=3, split="user-disjoint")
    assert dealt.item_ids == natural.item_ids
    assert dealt.manifest["split"] == "user-disjoint"
    assert "split" not in natural.manifest
    stages = [dealt.stage(number) for number in range(3)]  # read back: the checksums are those of the files
    assert sequences(stages) == sequences([natural.stage(number) for number in range(3)])
    targets = [c["training_targets"] + c["validation"] + c["test"] for c in dealt.counts]
    kept = [int(stage.current.lengths[stage.eligible()].sum()) for stage in stages]
    assert targets == kept
    assert sum(c["events"] for c in dealt.counts) == len(EVENTS)


def test_a_split_that_leaves_a_stage_empty_is_refused(tmp_path: Path) -> None:
    events = [(u, f"i{k}", T + k * 60) for k, u in enumerate("aab" * 10)]
    path = write_log(tmp_path / "log.csv", events)
    with pytest.raises(DataError, match=r"user-disjoint: stage \d is empty"):
        ingested(tmp_path / "dealt", format="csv", path=str(path), stages=3, split="user-disjoint")


def test_nothing_is_appended_to_a_stream_out_of_time(tmp_path: Path) -> None:
    path = write_log(tmp_path / "log.csv", EVENTS)
    dealt = ingested(tmp_path / "dealt", format="csv", path=str(path), stages=3, split="user-disjoint")
    with pytest.raises(DataError, match="user-disjoint"):
        appended(tmp_path / "longer", dealt, format="csv", path=str(path))


@pytest.mark.slow
def test_the_release_is_dealt_out_too(tmp_path: Path, release_dir: Path) -> None:
    dealt = ingested(tmp_path / "s", format="peso-release", path=str(release_dir), split="user-disjoint")
    natural = read_release(release_dir)[1]
    stages = [dealt.stage(number) for number in range(dealt.stages)]
    assert sequences(stages) == sequences(natural)
    users = [user for stage in stages for user in stage.users]
    assert len(users) == len(set(users))
