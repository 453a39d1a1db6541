"""Ranks from ranked semantic IDs, segments from stages, and the file that holds both."""

from __future__ import annotations

import doctest
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peso.errors import DataError
from peso.evaluation import predictions as module
from peso.evaluation.predictions import (
    Predictions,
    item_ranks,
    label_cases,
    make_predictions,
    ranked_items,
    read_predictions,
    semantic_id_ranks,
    write_predictions,
)
from peso.events.histories import Ragged, Stage
from peso.items.semantic_ids import SemanticIds

# a and b share an ID; so do d, e and f
IDS = SemanticIds(
    list("abcdef"), np.array([[0, 0], [0, 0], [0, 1], [1, 1], [1, 1], [1, 1]], dtype=np.int32), (2, 2)
)


def stage(number: int, users: dict[str, tuple[list[int], list[int]]]) -> Stage:
    return Stage(
        number,
        list(users),
        Ragged.of(previous for previous, _ in users.values()),
        Ragged.of(current for _, current in users.values()),
    )


STAGES = [
    stage(0, {"early": ([], [0, 1, 2]), "steady": ([], [0, 1, 2]), "brief": ([], [3])}),
    stage(1, {"steady": ([0, 1, 2], [2, 1, 0]), "other": ([], [0, 1, 2])}),
    stage(
        2,
        {
            "early": ([0, 1, 2], [0, 0, 3]),
            "steady": ([0, 1, 2, 2, 1, 0], [1, 1, 4]),
            "brief": ([3], [1, 1, 5, 1]),
            "fresh": ([], [5, 5, 2]),
            "rare": ([], [4, 4]),
        },
    ),
]


def example() -> Predictions:
    """Stage 2 of STAGES: leaf 0 = {a, b}, leaf 1 = {c}, leaf 2 = {d, e, f}."""
    leaves = np.array([[2, 0], [1, 2], [1, 0], [0, -1]])
    scores = np.array([[-0.5, -1.0], [-0.1, -2.0], [-0.3, -0.4], [-0.2, -np.inf]])
    by_level = np.array([[-0.5, -0.25], [-1.0, -2.0], [-4.0, -0.125], [-3.0, -0.5]], dtype=np.float32)
    cases, labels = STAGES[2].test_cases(window=20), label_cases(STAGES[:2], STAGES[2])
    return make_predictions(cases, labels, leaves, scores, by_level.sum(axis=1), IDS, by_level)


@pytest.mark.parametrize("documented", [module], ids=lambda m: m.__name__)
def test_docstring_examples(documented: object) -> None:
    failed, attempted = doctest.testmod(documented)  # type: ignore[arg-type]
    assert attempted
    assert not failed


def test_items_that_share_a_semantic_id_count_as_one_in_its_rank_and_apart_in_the_items_rank() -> None:
    predictions = example()
    # targets d, e, b, c of the users early, steady, brief, fresh
    assert predictions.targets == ["d", "e", "b", "c"]
    assert predictions.items == [list("defab"), list("cdef"), list("cab"), list("ab")]
    assert predictions.rank_semantic_id.tolist() == [1, 2, 2, 0]
    assert predictions.rank_item.tolist() == [1, 3, 3, 0]
    assert predictions.scores[0].tolist() == [-0.5] * 3 + [-1.0] * 2
    assert predictions.depth == 2


def test_segments_say_what_was_known_before_the_stage() -> None:
    predictions = example()
    assert predictions.users == ["early", "steady", "brief", "fresh"]  # "rare" has too few events
    # one event was enough to have been seen
    assert predictions.user_segment == ["dormant", "continuing", "dormant", "new"]
    assert predictions.item_segment == ["known", "new", "known", "known"]
    assert predictions.history_length.tolist() == [5, 8, 4, 2]


def test_in_the_first_stage_everyone_and_everything_is_new() -> None:
    labels = label_cases([], STAGES[0])
    assert set(labels.user_segment) == set(labels.item_segment) == {"new"}


def test_a_user_known_only_from_a_previous_list_is_not_new() -> None:
    late = stage(1, {"steady": ([], [1, 1, 1]), "brief": ([0, 4], [1, 1, 4])})
    labels = label_cases([stage(0, {"steady": ([], [0, 1, 2])})], late)
    assert labels.user_segment == ["continuing", "dormant"]
    assert labels.item_segment == ["known", "known"]


def test_released_stream_has_the_segments_that_its_files_show(release_dir: Path) -> None:
    from peso.events.release import read_release

    _, stages, _ = read_release(release_dir)
    counted = []
    for t in range(1, 5):
        names = label_cases(stages[:t], stages[t]).user_segment
        counted.append([names.count(segment) for segment in module.USER_SEGMENTS])
    # dormant, continuing, new; counted directly from the JSON files
    assert counted == [[0, 229, 806], [106, 113, 872], [142, 104, 1703], [76, 243, 1472]]


def test_read_gives_back_what_was_written(tmp_path: Path) -> None:
    written = example()
    write_predictions(tmp_path / "p.parquet", written)
    read = read_predictions(tmp_path / "p.parquet")
    for name in ("users", "targets", "items", "user_segment", "item_segment", "depth"):
        assert getattr(read, name) == getattr(written, name)
    for name in (
        "rank_semantic_id",
        "rank_item",
        "target_log_probability",
        "history_length",
        "target_level_log_probabilities",
    ):
        np.testing.assert_array_equal(getattr(read, name), getattr(written, name))
        assert getattr(read, name).dtype == getattr(written, name).dtype
    assert [scores.tolist() for scores in read.scores] == [scores.tolist() for scores in written.scores]


def test_no_cases_can_be_written_and_read(tmp_path: Path) -> None:
    write_predictions(tmp_path / "p.parquet", example().take([]))
    assert len(read_predictions(tmp_path / "p.parquet")) == 0


def test_other_programs_see_plain_columns_and_null_for_an_absent_target(tmp_path: Path) -> None:
    write_predictions(tmp_path / "p.parquet", example())
    table = pq.read_table(tmp_path / "p.parquet")
    assert table.schema.names == [
        "user",
        "target",
        "items",
        "scores",
        "rank_semantic_id",
        "rank_item",
        "target_log_probability",
        "user_segment",
        "item_segment",
        "history_length",
        "target_level_log_probabilities",
    ]
    assert table.column("rank_semantic_id").to_pylist() == [1, 2, 2, None]
    assert table.schema.field("items").type == pa.list_(pa.string())
    assert table.schema.field("scores").type == pa.list_(pa.float32())


def test_files_from_before_levels_were_stored_and_answers_without_levels_are_read(tmp_path: Path) -> None:
    write_predictions(tmp_path / "new.parquet", example())
    table = pq.read_table(tmp_path / "new.parquet")
    pq.write_table(table.drop_columns(["target_level_log_probabilities"]), tmp_path / "old.parquet")
    write_predictions(tmp_path / "plain.parquet", replace(example(), target_level_log_probabilities=None))
    for name in ("old", "plain"):
        read = read_predictions(tmp_path / f"{name}.parquet")
        assert read.target_level_log_probabilities is None
        assert read.take([2, 0]).target_level_log_probabilities is None
        np.testing.assert_array_equal(read.target_log_probability, example().target_log_probability)


def test_levels_follow_their_cases() -> None:
    by_level = example().target_level_log_probabilities
    assert by_level is not None
    taken = example().take([3, 1]).target_level_log_probabilities
    np.testing.assert_array_equal(taken, by_level[[3, 1]])


def test_a_foreign_or_broken_file_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"user": ["u"]}), tmp_path / "foreign.parquet")
    with pytest.raises(DataError, match=r"foreign\.parquet.*target"):
        read_predictions(tmp_path / "foreign.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(DataError, match=r"broken\.parquet"):
        read_predictions(tmp_path / "broken.parquet")
    with pytest.raises(DataError, match=r"absent\.parquet"):
        read_predictions(tmp_path / "absent.parquet")


def test_parts_of_different_cases_are_not_put_together() -> None:
    cases, labels = STAGES[2].test_cases(window=20), label_cases(STAGES[:2], STAGES[2])
    scores = np.zeros((4, 2))
    with pytest.raises(ValueError, match="different cases"):
        make_predictions(cases.take(np.array([1, 0, 2, 3])), labels, scores.astype(int), scores, scores, IDS)
    with pytest.raises(ValueError, match="do not match"):
        make_predictions(cases, labels, scores.astype(int), scores[:, :1], scores[:, 0], IDS)


@given(st.data())
def test_ranks_are_places_in_the_written_out_list(data: st.DataObject) -> None:
    codes = data.draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=12))
    trie = SemanticIds([str(i) for i in range(len(codes))], np.array(codes, dtype=np.int32), (3, 3)).trie
    order = data.draw(st.permutations(range(trie.leaves)))
    leaves = np.array([order[: data.draw(st.integers(1, trie.leaves))]])
    target = data.draw(st.integers(0, len(codes) - 1))

    (items,) = ranked_items(leaves, trie.items_of)
    rank = semantic_id_ranks(leaves, trie.leaf_of[[target]])[0]
    item_rank = item_ranks([items], np.array([target]))[0]

    distinct = list(dict.fromkeys(codes[item] for item in items))
    assert rank == (distinct.index(codes[target]) + 1 if codes[target] in distinct else 0)
    assert item_rank == (items.tolist().index(target) + 1 if target in items else 0)
    assert (item_rank > 0) == (rank > 0)
    assert item_rank >= rank
