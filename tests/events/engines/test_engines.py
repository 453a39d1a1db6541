"""What the rest of ingestion relies on: positions in a total order, and all events of a user together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peso.events import stage_writer
from peso.events.database import WORK
from peso.events.engines.engine import Engine, arg_min, open_engine
from peso.events.stage_writer import by_user

pytestmark = pytest.mark.slow


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    (tmp_path / WORK).mkdir()
    with duckdb.connect() as connection, open_engine("duckdb", connection, tmp_path) as opened:
        yield opened


def events_table(engine: Engine, users: list[int]) -> tuple[pa.Table, object]:
    rows = np.random.default_rng(0).permutation(len(users))
    table = pa.table(
        {
            "u": pa.array(np.array(users, np.int32)[rows]),
            "i": pa.array(rows.astype(np.int32)),
            "place": pa.array(rows.astype(np.int64)),
        }
    )
    return table, engine.given(engine.new_name("events"), table)


def test_rows_are_numbered_in_their_order(engine: Engine) -> None:
    _, events = events_table(engine, [0] * 10_000)
    ordered = engine.numbered("ordered", events.order_by("place").select("i"), "n")
    assert engine.rows(ordered.filter(ordered.i != ordered.n)) == []
    assert engine.row(ordered.aggregate(n=ordered.n.max())) == (9_999,)


def test_rows_are_read_in_parts_while_others_are_computed(engine: Engine) -> None:
    _, events = events_table(engine, [0] * 5_000)
    read = []
    for batch in engine.batches(events.order_by("place"), 1_000):
        assert engine.count(events) == 5_000
        read += batch["place"].to_pylist()
    assert read == list(range(5_000))


def test_tables_that_rows_were_computed_from_are_dropped_before_the_first_rows_are_read(
    engine: Engine,
) -> None:
    _, events = events_table(engine, [0] * 3_000)
    ordered = engine.numbered("ordered", events.order_by("place").select("i"), "n")
    kept = engine.keep("kept", events.select("i"))
    joined = ordered.join(kept, "i").order_by("n").select("n")
    batches = engine.batches(joined, 1_000, last_use=[ordered, kept])
    read = next(batches)["n"].to_pylist()
    left = "SELECT count(*) FROM (FROM duckdb_tables() SELECT table_name UNION ALL FROM duckdb_views() "
    left += "SELECT view_name WHERE NOT internal) WHERE table_name LIKE 'ordered%' OR table_name LIKE 'kept%'"
    assert engine.connection.execute(left).fetchall() == [(0,)]
    for batch in batches:
        read += batch["n"].to_pylist()
    assert read == list(range(3_000))


def test_arg_min_is_the_value_at_the_smallest(engine: Engine) -> None:
    table = pa.table({"u": [1, 1, 2], "row": [7, 8, 9], "time": [5, 4, 6]})
    rows = engine.given("rows", table)
    least = rows.group_by("u").aggregate(row=arg_min(rows.row, rows.time))
    assert sorted(engine.rows(least)) == [(1, 8), (2, 9)]


@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=12), size=st.integers(1, 12))
def test_all_events_of_a_user_are_in_one_slice(counts: list[int], size: int) -> None:
    users = np.repeat(np.arange(len(counts)), counts).tolist()
    with pytest.MonkeyPatch.context() as patch, duckdb.connect() as connection:
        from peso.events.engines.duckdb import DuckDB

        patch.setattr(stage_writer, "SLICE", size)
        engine = DuckDB(connection, Path())
        table, events = events_table(engine, users)
        names = pa.table(
            {"n": pa.array(range(len(counts)), pa.int32()), "name": [f"u{n}" for n in range(len(counts))]}
        )
        found, largest = [], 0
        for slice_names, part in by_user(engine, events, engine.given("users", names), ["place"]):
            for n, name in enumerate(slice_names):
                found.append((name, part["place"][part["u"] == n].tolist()))
            assert len(part["u"]) == sum(len(places) for _, places in found[len(found) - len(slice_names) :])
            largest = max(largest, len(part["u"]))
    by_hand = zip(table["u"].to_pylist(), table["place"].to_pylist(), strict=True)
    places: dict[str, list[int]] = {f"u{n}": [] for n in range(len(counts))}
    for user, place in sorted(by_hand):
        places[f"u{user}"].append(place)
    assert found == list(places.items())
    assert largest <= 2 * size + max(counts)
