"""The drift simulator: what it promises about users, items and drift holds in the log it makes."""

from __future__ import annotations

import json
from pathlib import Path

import duckdb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peso.config import DataConfig
from peso.errors import DataError
from peso.events import columns
from peso.events.histories import Cases, Stage, stage_counts
from peso.events.ingest import ingest
from peso.events.simulate import KINDS, Behaviour, Simulation, simulate, write_simulation
from peso.events.simulate.catalogue import make_catalogue
from peso.events.stream import Stream
from peso.items.category_path import category_path_ids

STABLE, DRIFTING, DORMANT, NEW = range(4)


@pytest.fixture(scope="module")
def simulation() -> Simulation:
    return simulate()


def same_log(a: Simulation, b: Simulation) -> bool:
    return a.events.equals(b.events) and a.items.equals(b.items)


# -- the log -----------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_log_and_another_one_another(simulation: Simulation) -> None:
    assert same_log(simulate(), simulation)
    assert not same_log(simulate(seed=1), simulation)


def test_more_users_do_not_change_the_catalogue_or_the_market(simulation: Simulation) -> None:
    larger = simulate(users=700)
    assert larger.items.equals(simulation.items)
    assert np.array_equal(larger.market.trending, simulation.market.trending)


def test_every_stage_has_enough_cases_at_the_default_size(simulation: Simulation) -> None:
    counts = [stage_counts(stage) for stage in simulation.stages]
    assert len(counts) == 5
    assert min(count["test"] for count in counts) >= 150
    shares = np.array([count["events"] for count in counts]) / len(simulation.times)
    np.testing.assert_allclose(shares, [0.6, 0.1, 0.1, 0.1, 0.1], atol=1e-3)


def test_the_stages_are_those_the_truth_speaks_of(simulation: Simulation) -> None:
    for stage in simulation.stages:
        visits = np.zeros(600, dtype=np.int64)
        visits[[int(user[1:]) for user in stage.users]] = stage.current.lengths
        assert np.array_equal(visits, simulation.shoppers.visits[:, stage.number])


def test_times_ascend_strictly_for_each_user_and_over_the_log(simulation: Simulation) -> None:
    assert (np.diff(simulation.times) >= 0).all()
    by_user = np.lexsort((simulation.times, simulation.users))
    same_user = np.diff(simulation.users[by_user]) == 0
    assert (np.diff(simulation.times[by_user])[same_user] > 0).all()
    assert simulation.times.min() > 1_600_000_000  # seconds, not milliseconds or days


@settings(max_examples=25, deadline=None)
@given(st.integers(10, 80), st.integers(20, 150), st.integers(1, 6), st.integers(0, 10**6))
def test_any_size_gives_a_usable_stream_or_says_why_not(
    users: int, items: int, stages: int, seed: int
) -> None:
    try:
        made = simulate(users, items, stages, seed)
    except DataError as error:
        assert stages > 1, "one stage always has room"
        assert "stage" in str(error)  # noqa: PT017
        return
    assert len(made.stages) == stages
    assert len(made.items) == items
    assert len(made.times) == users * made.behaviour.events_per_user
    assert all(len(stage.eligible()) for stage in made.stages)
    assert made.item_rows.min() >= 0
    assert made.item_rows.max() < items


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"users": 0}, "cannot simulate 0 users"),
        ({"items": 5}, "5 items are too few for a category tree; simulate at least 8"),
        ({"users": 3, "stages": 100}, "fewer stages"),
    ],
)
def test_sizes_that_do_not_work_out_are_refused_with_the_cure(sizes: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        simulate(**sizes)


@pytest.mark.parametrize("wrong", [{"series": 0.9}, {"trend": -0.1}, {"kinds": (0.0, 0.0, 0.0, 0.0)}])
def test_behaviour_that_is_no_share_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        Behaviour(**wrong)


# -- users -------------------------------------------------------------------------------------------


def test_user_kinds_have_their_shares_and_do_what_they_are_called(simulation: Simulation) -> None:
    kinds, favourites, visits = (
        simulation.shoppers.kinds,
        simulation.shoppers.favourites,
        simulation.shoppers.visits,
    )
    assert np.bincount(kinds).tolist() == [210, 150, 90, 150]
    changed = (favourites != favourites[:, :1]).any(axis=(1, 2))
    assert not changed[kinds != DRIFTING].any()
    assert changed[kinds == DRIFTING].mean() > 0.8
    assert (visits[kinds != NEW, 0] > 0).all()
    assert (visits[kinds == NEW, 0] == 0).all()
    assert (visits[kinds == NEW, 1:].sum(axis=1) > 0).all()
    assert (visits[kinds == DORMANT, 1] == 0).all()
    assert (visits[kinds == DORMANT, 2:].sum(axis=1) > 0).all()  # and all come back


def test_users_take_what_they_like(simulation: Simulation) -> None:
    """Far more of the events lie in the user's three favourite leaves than if users were interchanged."""
    stage = np.concatenate([np.full(len(s.current.values), s.number) for s in simulation.stages])
    leaf = simulation.catalogue.leaf[simulation.item_rows]

    def share(users: np.ndarray) -> float:
        return float((simulation.shoppers.favourites[users, stage] == leaf[:, None]).any(axis=1).mean())

    shuffled = np.random.default_rng(0).permutation(600)[simulation.users]
    assert share(simulation.users) > 0.3 > 4 * share(shuffled)


def test_drifted_users_have_left_their_old_taste(simulation: Simulation) -> None:
    def share_in_first_taste(kind: int) -> float:
        last = simulation.stages[-1]
        hits = total = 0
        for user, items in zip(last.users, last.current, strict=True):
            if simulation.shoppers.kinds[int(user[1:])] == kind:
                old = simulation.shoppers.favourites[int(user[1:]), 0]
                hits += np.isin(simulation.catalogue.leaf[items], old).sum()
                total += len(items)
        return hits / total

    assert share_in_first_taste(DRIFTING) < 0.8 * share_in_first_taste(STABLE)


# -- items -------------------------------------------------------------------------------------------


def test_nothing_is_taken_before_it_comes_out(simulation: Simulation) -> None:
    for stage in simulation.stages:
        assert (simulation.catalogue.release[stage.current.values] <= stage.number).all()


def test_new_items_come_out_at_every_later_stage_and_sell(simulation: Simulation) -> None:
    release = simulation.catalogue.release
    assert (np.diff(release) >= 0).all()  # rows stand in the order in which items come out
    assert (np.bincount(release, minlength=5)[1:] >= 10).all()
    for stage in simulation.stages[1:]:
        new = release == stage.number
        assert new[stage.current.values].mean() > 1.25 * new[release <= stage.number].mean()


def test_trending_categories_move_on(simulation: Simulation) -> None:
    def share(leaves: np.ndarray, stage: Stage) -> float:
        return float(np.isin(simulation.catalogue.leaf[stage.current.values], leaves).mean())

    trending = simulation.market.trending
    for stage in simulation.stages[1:]:
        gone = np.setdiff1d(trending[0], trending[stage.number])
        came = np.setdiff1d(trending[stage.number], trending[0])
        assert len(came)
        assert share(gone, stage) < share(gone, simulation.stages[0])
        assert share(came, stage) > share(came, simulation.stages[0])


@pytest.mark.parametrize("items", [20, 400, 3000])
def test_the_catalogue_has_a_tree_of_three_levels_and_texts_of_its_own(items: int) -> None:
    catalogue = make_catalogue(items, 5, np.random.default_rng(0))
    table = catalogue.items
    titles, categories = (table[name].to_pylist() for name in (columns.TITLE, columns.CATEGORY))
    assert len(set(titles)) == items
    assert all(category.count(" > ") == 2 for category in categories)
    for title, text, category in zip(titles, table[columns.TEXT].to_pylist(), categories, strict=True):
        department, shelf, line = category.split(" > ")
        assert line in title
        assert shelf.lower() in text
        assert department.lower() in text
    ids = category_path_ids(table[columns.ITEM_ID].to_pylist(), categories)
    assert ids.levels == 4
    assert len(np.unique(ids.codes, axis=0)) == items


# -- what the stream is for --------------------------------------------------------------------------


class Bigram:
    """Counts of item after item, mixed with popularity: the least sequence model."""

    def __init__(self, stages: list[Stage], items: int) -> None:
        self.after = np.zeros((items, items))
        for stage in stages:
            for user in stage.training_sequences():
                targets = np.arange(max(user.first_target, 1), len(user.items))
                np.add.at(self.after, (user.items[targets - 1], user.items[targets]), 1)
        self.popular = self.after.sum(axis=0) / self.after.sum()

    def hit_rate(self, cases: Cases, sequence: bool = True, k: int = 10) -> float:
        hits = 0
        for history, target in zip(cases.histories, cases.targets, strict=True):
            counts = self.after[history[-1]] if sequence and len(history) else np.zeros(1)
            scores = 0.1 * self.popular + counts / max(counts.sum(), 1)
            hits += target in np.argsort(-scores, kind="stable")[:k]
        return hits / len(cases)


def gains(simulation: Simulation) -> tuple[float, float, float]:
    """Hit rates over the later stages of popularity, of a stale and of an updated bigram model."""
    stages, items = simulation.stages, len(simulation.items)
    stale = Bigram(stages[:1], items)
    updated = [Bigram(stages[: t + 1], items) for t in range(len(stages))]
    cases = [stage.test_cases(20) for stage in stages]
    later = range(1, len(stages))
    return (
        float(np.mean([updated[t].hit_rate(cases[t], sequence=False) for t in later])),
        float(np.mean([stale.hit_rate(cases[t]) for t in later])),
        float(np.mean([updated[t].hit_rate(cases[t]) for t in later])),
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sequence_beats_popularity_and_updated_beats_stale(seed: int) -> None:
    popularity, stale, updated = gains(simulate(seed=seed))
    assert stale > popularity + 0.05
    assert updated > stale + 0.1


def test_without_drift_updating_gains_little() -> None:
    _, stale, updated = gains(simulate(behaviour=Behaviour(novelty=1, rewired=0, drift=0, trends_kept=1)))
    _, drifting_stale, drifting_updated = gains(simulate())
    assert updated - stale < 0.7 * (drifting_updated - drifting_stale)


# -- files -------------------------------------------------------------------------------------------


def test_stream_log_and_truth_are_written_as_the_same_bytes_each_time(
    tmp_path: Path, simulation: Simulation
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for directory in (one, two):
        directory.mkdir()
        ingest(DataConfig(format="simulate"), directory)
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert len(files) == 5 + 5  # a file a stage; items, log, two of truth, manifest
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in files)

    stream = Stream.open(one)
    assert stream.counts == [stage_counts(stage) for stage in simulation.stages]
    assert sorted(stream.item_ids) == sorted(simulation.items["item_id"].to_pylist())
    assert stream.manifest["source"] == {
        "format": "simulate",
        "users": 600,
        "items": 400,
        "stages": 5,
        "seed": 0,
    }
    assert set(stream.manifest["files"]) >= {"events.parquet", "truth.parquet", "truth.json"}


def test_the_truth_beside_the_stream_is_the_log_s(tmp_path: Path) -> None:
    made = simulate(60, 60, 3, 5)
    write_simulation(made, tmp_path)
    events = duckdb.sql(f"select user, count(*) from '{tmp_path}/events.parquet' group by 1").fetchall()
    truth = duckdb.sql(
        f"select user, sum(events) from '{tmp_path}/truth.parquet' group by 1 having sum(events) > 0"
    ).fetchall()
    assert {u: int(n) for u, n in events} == {u: int(n) for u, n in truth}
    rows = duckdb.sql(f"select * from '{tmp_path}/truth.parquet' where user = 'u7' order by stage").fetchall()
    assert [row[2] for row in rows] == [0, 1, 2]
    paths = made.catalogue.paths
    for _, kind, stage, count, favourites in rows:
        assert kind == KINDS[made.shoppers.kinds[7]]
        assert count == made.shoppers.visits[7, stage]
        assert favourites == [paths[leaf] for leaf in made.shoppers.favourites[7, stage]]

    summary = json.loads((tmp_path / "truth.json").read_text())
    assert sum(summary["users"].values()) == 60
    assert [entry["stage"] for entry in summary["stages"]] == [0, 1, 2]
    trending = summary["stages"][2]["trending"]
    assert trending == [paths[leaf] for leaf in made.market.trending[2]]
    assert set(summary["stages"][0]["followers"]) == set(paths)
