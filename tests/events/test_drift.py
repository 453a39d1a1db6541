"""Drift of a stream equals its definitions, computed user by user and item by item."""

from __future__ import annotations

import doctest
import json
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from peso.events import drift as module
from peso.events.drift import drift, jensen_shannon
from peso.events.histories import Ragged, Stage, cut_stages, stage_counts
from peso.events.stream import FORMAT, Stream, stage_file, stage_table
from peso.runtime.manifest import write_manifest

ITEMS, USERS = 9, 6


@st.composite
def streams(draw: st.DrawFn) -> list[Stage]:
    events = draw(
        st.lists(st.tuples(st.integers(0, USERS - 1), st.integers(0, ITEMS - 1)), min_size=8, max_size=80)
    )
    users, items = np.array(events).T
    names = [f"u{k}" for k in range(USERS)]
    return cut_stages(names, users, items, np.arange(len(events)), draw(st.integers(1, 4)))


def stream_of(stages: list[Stage], directory: Path) -> Stream:
    """A stream with these stages on disk, whether or not they could be trained."""
    for stage in stages:
        (directory / stage_file(stage.number)).parent.mkdir()
        pq.write_table(stage_table(stage), directory / stage_file(stage.number))
    write_manifest(directory, FORMAT, {"stages": [stage_counts(stage) for stage in stages]})
    return Stream.open(directory)


def check_figures(stages: list[Stage], engine: str = "duckdb") -> None:
    codes = np.arange(ITEMS) % 3
    with TemporaryDirectory() as directory:
        told = drift(stream_of(stages, Path(directory)), codes, engine)
    current = [
        [(user, item) for user, row in zip(s.users, s.current, strict=True) for item in row.tolist()]
        for s in stages
    ]
    for t, (stage, figures) in enumerate(zip(stages, told, strict=True)):
        for place, name in ((0, "users"), (1, "items")):
            here = {event[place] for event in current[t]}
            before = {event[place] for event in current[t - 1]} if t else set()
            ever = {event[place] for past in current[:t] for event in past}
            assert figures[name] == len(here)
            assert figures[f"new_{name}"] == len(here - ever)
            assert figures[f"continuing_{name}"] == len(here & before)
            assert figures[f"returning_{name}"] == len((here & ever) - before)
            assert figures[f"dormant_{name}"] == len(ever - here)
        assert figures["events"] == len(current[t])
        if not (t and current[t - 1] and current[t]):
            assert figures["item_divergence"] is figures["code_divergence"] is None
        else:
            for key, of in (("item_divergence", lambda i: i), ("code_divergence", lambda i: i % 3)):
                shares = [Counter(of(i) for _, i in part) for part in (current[t - 1], current[t])]
                vectors = [[count[k] for k in range(ITEMS)] for count in shares]
                assert figures[key] == pytest.approx(jensenshannon(*vectors, base=2) ** 2, abs=1e-9)
        known = {item for past in current[:t] for _, item in past}
        targets = [
            i
            for user, items in zip(stage.users, stage.current, strict=True)
            if len(items) >= 3
            for i in items
        ]
        new = np.mean([i not in known for i in targets]) if targets else None
        assert figures["new_item_targets"] == (None if new is None else pytest.approx(new))
        lengths = [sum(u == user for past in current[:t] for u, _ in past) for user in stage.users]
        assert figures["history_lengths"]["mean"] == (pytest.approx(np.mean(lengths)) if lengths else None)
        assert figures["history_lengths"]["p50"] == (pytest.approx(np.median(lengths)) if lengths else None)
    json.dumps(told, allow_nan=False)


@settings(max_examples=10, deadline=None)
@given(streams())
def test_every_figure_equals_its_definition(stages: list[Stage]) -> None:
    check_figures(stages)


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_a_stage_without_events_has_no_divergence(empty: int) -> None:
    """`peso forget` may leave one."""
    stages = [Stage(n, [f"u{n}"], Ragged.of([[]]), Ragged.of([[n, n + 1, n + 2]])) for n in range(3)]
    left = Stage(empty, [], Ragged.of([]), Ragged.of([]))
    check_figures([left if stage.number == empty else stage for stage in stages])


def test_what_only_a_history_tells_of_is_not_new(tmp_path: Path) -> None:
    stages = [
        Stage(0, ["a"], Ragged.of([[]]), Ragged.of([[0, 1, 2]])),
        Stage(1, ["b"], Ragged.of([[3]]), Ragged.of([[3, 4, 0]])),
    ]
    figures = drift(stream_of(stages, tmp_path))[1]
    assert (figures["new_users"], figures["returning_users"]) == (0, 1)
    assert (figures["new_items"], figures["returning_items"], figures["continuing_items"]) == (1, 1, 1)
    assert figures["new_item_targets"] == pytest.approx(1 / 3)


def test_the_divergence_is_symmetric_and_bounded() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        one, other = rng.integers(0, 5, 30) + np.eye(30, dtype=int)[0], rng.integers(0, 5, 30)
        other[1] += 1
        assert jensen_shannon(one, other) == pytest.approx(jensen_shannon(other, one))
        assert 0 <= jensen_shannon(one, other) <= 1


def test_the_examples_of_the_docstrings_hold() -> None:
    assert doctest.testmod(module).failed == 0
