"""From a raw log to stages: cleaning, cutting and histories equal their definitions."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from event_logs import core, data_config, expected_histories, histories, ingested, write_log
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peso.config import DataConfig
from peso.errors import DataError
from peso.events import columns
from peso.events.cleaning import calendar
from peso.events.ingest import ingest
from peso.events.release import read_release
from peso.events.simulate import simulate
from peso.events.stream import Stream
from peso.events.times import iso

DAY = 86_400
EVENTS = [
    (f"u{k % 7}", f"i{k * k % 11}", 1_600_000_000 + (k * 7919 % 200) * 3600) for k in range(140)
]  # several hours hold two events


def test_movietweetings_five_core_has_the_published_counts(movietweetings_dir: Path, tmp_path: Path) -> None:
    stream = ingested(
        tmp_path / "s", format="movietweetings", path=str(movietweetings_dir), min_user=5, min_item=5
    )
    last = stream.manifest["funnel"][-1]
    assert (last["events"], last["users"], last["items"]) == (68055, 4333, 2414)
    assert stream.manifest["funnel"][0]["events"] == 100_000
    assert sum(stage["events"] for stage in stream.counts) == 68055
    assert stream.manifest["time"]["recognised"] == "seconds"
    assert stream.manifest["time"]["from"].startswith("2013-02-28")
    assert stream.manifest["time"]["until"].startswith("2013-09-01")
    row = stream.item_ids.index("0118799")
    assert stream.titles[row] == "La vita è bella (1997)"
    assert stream.items[columns.CATEGORY][row].as_py() == "Comedy, Drama, Romance, War"
    known = set(stream.stage(0).users)
    for number in range(1, 5):
        stage = stream.stage(number)
        assert sum(user in known for user in stage.users) > 1000
        known |= set(stage.users)


@pytest.mark.slow
def test_the_release_written_out_as_a_log_ingests_back_to_the_same_cases(
    release_dir: Path, tmp_path: Path
) -> None:
    items, stages, _ = read_release(release_dir)
    ids = items[columns.ITEM_ID].to_pylist()
    lines = ["user,item,time"]
    for stage in stages:
        for user, current in zip(stage.users, stage.current, strict=True):
            lines += [
                f"{user},{ids[item]},{stage.number * 1_000_000 + place}" for place, item in enumerate(current)
            ]
    shuffled = np.random.default_rng(0).permutation(lines[1:]).tolist()
    (tmp_path / "log.csv").write_text("\n".join([lines[0], *shuffled]))
    stream = ingested(
        tmp_path / "s",
        format="csv",
        path=str(tmp_path / "log.csv"),
        stages={"boundaries": [number * 1_000_000 for number in range(1, len(stages))]},
    )
    assert stream.stages == len(stages)
    back = stream.item_ids
    for stage in stages:
        again = stream.stage(stage.number)
        for window in (20,):
            for cases, others in (
                (stage.validation_cases(window), again.validation_cases(window)),
                (stage.test_cases(window), again.test_cases(window)),
            ):
                one = {
                    u: ([ids[i] for i in h], ids[t])
                    for u, h, t in zip(cases.users, cases.histories, cases.targets, strict=True)
                }
                other = {
                    u: ([back[i] for i in h], back[t])
                    for u, h, t in zip(others.users, others.histories, others.targets, strict=True)
                }
                assert one == other
        first = {s.user: ([ids[i] for i in s.items], s.first_target) for s in stage.training_sequences()}
        second = {s.user: ([back[i] for i in s.items], s.first_target) for s in again.training_sequences()}
        assert first == second


@pytest.mark.slow
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    log=st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 8)), min_size=12, max_size=60
    ),
    min_user=st.integers(1, 4),
    min_item=st.integers(1, 4),
    repeats=st.sampled_from(["keep", "drop"]),
)
def test_cleaning_and_histories_equal_their_definitions(
    tmp_path_factory: pytest.TempPathFactory,
    log: list[tuple[int, int, int]],
    min_user: int,
    min_item: int,
    repeats: str,
) -> None:
    events = [(f"u{u}", f"i{i}", t) for u, i, t in log]
    # so that something is left
    events += [(user, item, 4) for user in "abcd" for item in ("one", "two", "three", "four")]
    expected = list(dict.fromkeys(events))
    if repeats == "drop":
        expected.sort(key=lambda event: event[2])
        seen: set[tuple[str, str]] = set()
        expected = [e for e in expected if e[:2] not in seen and not seen.add(e[:2])]  # type: ignore[func-returns-value]
    expected = core(expected, min_user, min_item)
    directory = tmp_path_factory.mktemp("log")
    write_log(directory / "log.csv", events)
    stream = ingested(
        directory / "s",
        format="csv",
        path=str(directory / "log.csv"),
        repeats=repeats,
        min_user=min_user,
        min_item=min_item,
        stages=1,
    )
    assert histories(stream) == expected_histories(expected, [len(expected)])
    assert stream.manifest["funnel"][-1]["events"] == len(expected)


def test_stages_by_share_cut_in_order_of_time_and_see_nothing_of_later_ones(tmp_path: Path) -> None:
    path = write_log(tmp_path / "log.csv", EVENTS)
    stream = ingested(tmp_path / "s", format="csv", path=str(path), stages=3)
    ends = np.rint(np.cumsum([0.6, 0.2, 0.2]) * len(EVENTS)).astype(int).tolist()
    assert histories(stream) == expected_histories(list(EVENTS), ends)


@pytest.mark.parametrize("share", [[1.0], [0.5, 0.5], [0.25, 0.35, 0.4]])
def test_any_shares_are_those_of_the_events(tmp_path: Path, share: list[float]) -> None:
    path = write_log(tmp_path / "log.csv", EVENTS)
    stream = ingested(tmp_path / "s", format="csv", path=str(path), stages={"fractions": share})
    ends = np.rint(np.cumsum(share) * len(EVENTS)).astype(int).tolist()
    assert [stage["events"] for stage in stream.counts] == np.diff([0, *ends]).tolist()


def test_stages_by_calendar_equal_those_cut_at_the_same_moments(tmp_path: Path) -> None:
    path = write_log(tmp_path / "log.csv", EVENTS)
    start = 1_600_000_000 + 2 * DAY
    by_calendar = ingested(
        tmp_path / "c", format="csv", path=str(path), stages={"every": "2 days", "from": start}
    )
    by_moments = ingested(
        tmp_path / "m",
        format="csv",
        path=str(path),
        stages={"boundaries": [iso((start + k * 2 * DAY) * 1_000_000) for k in range(4)]},
    )
    expected = [sum(t < start + k * 2 * DAY for _, _, t in EVENTS) for k in range(4)] + [len(EVENTS)]
    assert histories(by_calendar) == histories(by_moments) == expected_histories(list(EVENTS), expected)
    assert by_calendar.manifest["boundaries"] == by_moments.manifest["boundaries"]


def test_an_event_at_the_very_boundary_is_of_the_later_stage(tmp_path: Path) -> None:
    log = [("a", "x", 1), ("a", "y", 2), ("a", "z", 3), ("a", "x", 10), ("a", "y", 10), ("a", "z", 11)]
    path = write_log(tmp_path / "log.csv", log)
    stream = ingested(tmp_path / "s", format="csv", path=str(path), stages={"boundaries": [10]})
    assert histories(stream) == [{"a": ([], ["x", "y", "z"])}, {"a": (["x", "y", "z"], ["x", "y", "z"])}]


def test_months_end_where_the_calendar_says() -> None:
    start = 1_706_659_200_000_000  # 2024-01-31
    moments = calendar("1 month", start, start + 100 * DAY * 1_000_000)
    assert [iso(moment)[:10] for moment in moments] == [
        "2024-01-31",
        "2024-02-29",
        "2024-03-31",
        "2024-04-30",
    ]
    assert [iso(m)[:10] for m in calendar("1 year", start, start + 800 * DAY * 1_000_000)][1] == "2025-01-31"


def test_events_of_one_moment_keep_the_order_of_the_log_in_every_run(tmp_path: Path) -> None:
    # more rows than one thread takes at a time, all of one moment
    log = [(f"u{k % 5}", f"i{k % 977}-{k}", 7) for k in range(30_000)]
    path = write_log(tmp_path / "log.csv", log)
    first = ingested(tmp_path / "1", format="csv", path=str(path), stages=4)
    second = ingested(tmp_path / "2", format="csv", path=str(path), stages=4)
    assert first.manifest["files"] == second.manifest["files"]
    assert first.item_ids == [item for _, item, _ in log]
    assert histories(first)[0]["u0"][1] == [item for u, item, _ in log[:18_000] if u == "u0"]


def test_items_are_numbered_by_their_first_event(tmp_path: Path) -> None:
    """So the items known by the end of a stage are a prefix of the table, however many stages follow."""
    path = write_log(tmp_path / "log.csv", EVENTS)
    stream = ingested(tmp_path / "s", format="csv", path=str(path), stages=3)
    by_time = sorted(EVENTS, key=lambda event: event[2])
    assert stream.item_ids == list(dict.fromkeys(item for _, item, _ in by_time))


def test_low_ratings_go_first(tmp_path: Path) -> None:
    log = [(f"u{k % 3}", f"i{k % 5}", 100 + k, k % 5 + 1) for k in range(60)]
    path = write_log(tmp_path / "log.csv", log, "user,item,time,stars")
    stream = ingested(
        tmp_path / "s",
        format="csv",
        path=str(path),
        columns={"rating": "stars"},
        min_rating=4,
        min_user=2,
        stages=1,
    )
    steps = [(row["step"], row["events"]) for row in stream.manifest["funnel"]]
    assert steps[:3] == [("read", 60), ("readable", 60), ("rating of 4 or more", 24)]
    assert histories(stream) == expected_histories([(u, i, t) for u, i, t, r in log if r >= 4], [24])


def test_duplicates_are_kept_once_and_counted(tmp_path: Path) -> None:
    path = write_log(tmp_path / "log.csv", [*EVENTS, *EVENTS[:17]])
    stream = ingested(tmp_path / "s", format="csv", path=str(path), stages=2)
    steps = {row["step"]: row["events"] for row in stream.manifest["funnel"]}
    assert steps["read"] - steps["duplicates kept once"] == 17
    alone = ingested(tmp_path / "t", format="csv", path=str(write_log(tmp_path / "b.csv", EVENTS)), stages=2)
    assert stream.manifest["files"] == alone.manifest["files"]


def test_users_in_slices_are_users_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_log(tmp_path / "log.csv", [*EVENTS, *(("huge", f"i{k % 9}", k) for k in range(200))])
    whole = ingested(tmp_path / "1", format="csv", path=str(path), stages=3)
    monkeypatch.setattr("peso.events.stage_writer.SLICE", 13)
    sliced = ingested(tmp_path / "2", format="csv", path=str(path), stages=3)
    assert histories(sliced) == histories(whole)
    assert sliced.counts == whole.counts
    assert [sliced.stage(t).users for t in range(3)] == [whole.stage(t).users for t in range(3)]


TIMES: dict[str, Any] = {
    "seconds": lambda t: t,
    "milliseconds": lambda t: t * 1000,
    "microseconds": lambda t: t * 1_000_000,
    "ISO text": lambda t: iso(t * 1_000_000),
    "ISO text, no zone": lambda t: iso(t * 1_000_000).replace("T", " ").removesuffix("Z"),
    "seconds as decimals": lambda t: f"{t}.0",
}


@pytest.mark.parametrize("form", TIMES)
def test_times_are_recognised_and_stated(tmp_path: Path, form: str) -> None:
    path = write_log(tmp_path / "log.csv", [(u, i, TIMES[form](t)) for u, i, t in EVENTS])
    stream = ingested(tmp_path / "s", format="csv", path=str(path), stages=3)
    assert form.split(",")[0].split(" as")[0] in stream.manifest["time"]["recognised"]
    assert stream.manifest["time"]["first"] == min(t for *_, t in EVENTS) * 1_000_000
    assert histories(stream) == expected_histories(
        list(EVENTS), np.rint(np.cumsum([0.6, 0.2, 0.2]) * len(EVENTS)).astype(int).tolist()
    )


def test_a_pattern_of_times(tmp_path: Path) -> None:
    log = [("a", f"i{day}", f"{day:02}/03/2020") for day in (9, 3, 12, 1)]
    path = write_log(tmp_path / "log.csv", log)
    stream = ingested(tmp_path / "s", format="csv", path=str(path), time_format="%d/%m/%Y", stages=1)
    assert histories(stream) == [{"a": ([], ["i1", "i3", "i9", "i12"])}]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_days_without_separators_are_not_taken_for_seconds_of_1970(tmp_path: Path, kind: str) -> None:
    log = [("a", f"i{day}", 20200300 + day) for day in (9, 3, 12, 1)]
    if kind == "csv":
        path = write_log(tmp_path / "log.csv", log)
    else:
        path = tmp_path / "log.parquet"
        pq.write_table(
            pa.table(dict(zip(("user", "item", "time"), zip(*log, strict=True), strict=True))), path
        )
    source = {"format": kind, "path": str(path), "stages": 1}
    with pytest.raises(DataError, match=r"has '20200309', which could be a day .* '%Y%m%d' or seconds"):
        ingested(tmp_path / "auto", **source)
    stream = ingested(tmp_path / "days", **source, time_format="%Y%m%d")
    assert histories(stream) == [{"a": ([], ["i1", "i3", "i9", "i12"])}]
    assert stream.manifest["time"]["from"] == "2020-03-01T00:00:00Z"
    seconds = ingested(tmp_path / "seconds", **source, time_format="seconds")
    assert seconds.manifest["time"]["first"] == 20200301 * 1_000_000


def test_the_funnel_and_the_manifest_are_json(tmp_path: Path) -> None:
    path = write_log(tmp_path / "log.csv", EVENTS)
    (tmp_path / "s").mkdir()
    manifest = ingest(data_config(format="csv", path=str(path), stages=2), tmp_path / "s")
    assert manifest == json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == [
        "items.parquet",
        "manifest.json",
        "stage=0",
        "stage=1",
    ]


def test_a_simulation_takes_the_long_way_to_the_same_cases(tmp_path: Path) -> None:
    config = DataConfig(format="simulate")
    ingest(config, tmp_path, seed=3)
    stream = Stream.open(tmp_path)
    sizes = config.simulate
    direct = simulate(sizes.users, sizes.items, sizes.stages, 3)
    ids = direct.items[columns.ITEM_ID].to_pylist()
    assert stream.stages == sizes.stages
    for stage, told in zip(direct.stages, histories(stream), strict=True):
        assert told == {
            user: ([ids[i] for i in p], [ids[i] for i in c])
            for user, p, c in zip(stage.users, stage.previous, stage.current, strict=True)
        }
    assert None not in stream.titles
    assert {"events.parquet", "truth.parquet", "truth.json"} <= set(stream.manifest["files"])


def test_a_gzipped_log_is_the_log(tmp_path: Path) -> None:
    path = write_log(tmp_path / "log.csv", EVENTS)
    (tmp_path / "log.csv.gz").write_bytes(gzip.compress(path.read_bytes()))
    plain = ingested(tmp_path / "1", format="csv", path=str(path), stages=2)
    packed = ingested(tmp_path / "2", format="csv", path=str(path) + ".gz", stages=2)
    assert plain.manifest["files"] == packed.manifest["files"]
