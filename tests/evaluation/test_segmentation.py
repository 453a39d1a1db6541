"""Ways to part the cases."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reports import CASES, catalogue, predictions, run

from peso.errors import ConfigError, WorkspaceError
from peso.evaluation.catalogue import (
    ACTIVE,
    HISTORY,
    ITEMS,
    USERS,
    Catalogue,
    activity_quarters,
    by_column,
    by_popularity,
)
from peso.evaluation.comparison import Comparison
from peso.evaluation.report.sections.segments import segments


@pytest.fixture(scope="module")
def known() -> Catalogue:
    return catalogue()


def test_every_case_has_a_group_of_its_segmentation(known: Catalogue) -> None:
    given_ = predictions(2, 0.5, 1, CASES[2])
    for part in (USERS, ITEMS, HISTORY, ACTIVE, by_popularity(known), by_column(known, "category")):
        groups = part.assign(2, given_)
        assert len(groups) == len(given_)
        assert groups.min() >= 0
        assert groups.max() < len(part.groups)


def test_groups_are_those_of_the_labels() -> None:
    given_ = predictions(2, 0.5, 1, 50)
    assert [USERS.groups[g] for g in USERS.assign(2, given_)] == given_.user_segment
    assert [ITEMS.groups[g] for g in ITEMS.assign(2, given_)] == given_.item_segment


@given(st.lists(st.integers(0, 100), min_size=4, max_size=60))
def test_quarters_keep_the_order_and_equal_numbers_together(lengths: list[int]) -> None:
    quarters = activity_quarters(np.array(lengths))
    order = np.argsort(lengths, kind="stable")
    assert (np.diff(quarters[order]) >= 0).all()
    assert len(set(zip(lengths, quarters.tolist(), strict=True))) == len(set(lengths))


def test_head_is_the_fewest_items_with_a_third_of_the_events(known: Catalogue) -> None:
    thirds, seen = known.popularity_thirds(2), known.seen[2]
    head = seen[thirds == 0]
    assert head.min() >= seen[thirds == 1].max()
    assert seen[thirds == 1].min() >= seen[thirds == 2].max()
    assert head.sum() >= seen.sum() / 3
    assert head.sum() - head.min() < seen.sum() / 3
    assert (thirds[seen == 0] == 2).all()


def test_a_column_groups_targets_or_users(known: Catalogue) -> None:
    given_ = predictions(2, 0.5, 1, 60)
    part = by_column(known, "category")
    found = [part.groups[g] for g in part.assign(2, given_)]
    assert found == ["games" if int(target[1:]) % 3 else "unknown" for target in given_.targets]
    with_users = replace(known, user_columns={"country": {given_.users[0]: "FR"}})
    part = by_column(with_users, "country")
    assert [part.groups[g] for g in part.assign(2, given_)] == ["FR"] + ["unknown"] * 59


def test_rare_values_of_a_column_share_a_group(known: Catalogue) -> None:
    many = replace(known, item_columns={"title": [f"t{item}" for item in range(500)]})
    part = by_column(many, "title")
    assert len(part.groups) == 10
    groups = part.assign(2, predictions(2, 0.5, 1, 200))
    assert (groups == part.groups.index("other")).mean() > 0.9


def test_an_unknown_column_is_refused(known: Catalogue) -> None:
    runs = [replace(run("a", "a", 0.5), catalogue=known)]
    with pytest.raises(ConfigError, match=r"'colour'.*they have category"):
        Comparison(runs, [10], columns=["colour"])
    with pytest.raises(WorkspaceError, match="need the item table"):
        Comparison([run("a", "a", 0.5)], [10], columns=["category"])


def test_groups_of_a_segmentation_make_up_the_mean_of_all_cases(known: Catalogue) -> None:
    comparison = Comparison([replace(run("a", "a", 0.5), catalogue=known)], [10], columns=["category"])
    (system,) = comparison.systems
    metric = comparison.metric("log_probability")
    whole = comparison.average_of_cases(system, metric)
    assert len(comparison.segmentations) == 6
    for part in comparison.segmentations:
        found = [comparison.in_group(system, metric, part, g) for g in range(len(part.groups))]
        there = [estimate for estimate in found if estimate is not None]
        assert sum(e.cases for e in there) == whole.cases
        total = sum(e.value * e.cases for e in there) / whole.cases
        assert total == pytest.approx(whole.value)


def test_the_gap_is_that_between_the_best_and_the_worst_served_quarter() -> None:
    comparison = Comparison([run("a", "a", 0.5)], [10])
    (table,) = [t for t in segments(comparison).folded if t.name == "log-probability-by-activity"]
    assert table.columns[-1] == "Largest gap"
    *quarters, gap = table.rows[0][1:]
    values = [cell.value for cell in quarters]  # type: ignore[union-attr]
    assert gap.value == pytest.approx(max(values) - min(values))  # type: ignore[union-attr]
