"""The released stream: its counts, and what is said when a file of it is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from peso.errors import DataError
from peso.events import columns
from peso.events.histories import stage_counts
from peso.events.release import read_release, release_files
from peso.events.stream import Stream, write_stream

BLOCK = "Toys.all.block_{}.json"
INDEX = "Toys.index.epoch5.json"


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A released stream of two stages in small: user u3 has two items only, u1 comes back."""
    blocks = [
        {
            "u1": {"previous_block": [], "current_block": ["b", "a", "c", "a"]},
            "u3": {"previous_block": [], "current_block": ["a", "b"]},
        },
        {
            "u2": {"previous_block": [], "current_block": ["a", "b", "c"]},
            "u1": {"previous_block": ["b", "a", "c", "a"], "current_block": ["d", "d", "b"]},
        },
    ]
    for number, block in enumerate(blocks):
        write(tmp_path, BLOCK.format(number), block)
    index = {item: [f"<a_{code}>", f"<b_{code + 3}>"] for code, item in enumerate("cabd")}
    write(tmp_path, INDEX, index)
    return tmp_path


def write(directory: Path, name: str, content: object) -> None:
    (directory / name).write_text(json.dumps(content), encoding="utf-8")


def edit(directory: Path, name: str) -> dict:
    return json.loads((directory / name).read_text(encoding="utf-8"))


def test_the_released_video_games_stream_has_the_published_counts(release_dir: Path, tmp_path: Path) -> None:
    expected = [(12447, 66379), (1035, 5421), (1091, 5310), (1949, 10748), (1791, 9689)]
    items, stages, ids = read_release(release_dir)

    counts = [stage_counts(stage) for stage in stages]
    assert [(c["users"], c["training_targets"]) for c in counts] == expected
    assert all(c["validation"] == c["test"] == c["users"] for c in counts)
    # the counts are those of what the stages really give
    for stage, count in zip(stages, counts, strict=True):
        assert sum(s.targets for s in stage.training_sequences()) == count["training_targets"]
        assert len(stage.validation_cases(20)) == len(stage.test_cases(20)) == count["test"]
    assert (len(items), len(ids.item_ids), ids.levels) == (25935, 25935, 4)
    assert ids.sizes == (256, 256, 256, 256)
    assert len(np.unique(ids.codes, axis=0)) == 25707
    assert len(np.unique(ids.token_numbers)) == 943
    assert ids.semantic_id("0") == ["<a_128>", "<b_72>", "<c_95>", "<d_83>"]

    write_stream(tmp_path, items, stages)
    assert Stream.open(tmp_path).counts == counts


def test_stages_hold_the_files_content_as_rows_of_the_index(release: Path) -> None:
    items, stages, ids = read_release(release)
    assert items[columns.ITEM_ID].to_pylist() == ids.item_ids == ["c", "a", "b", "d"]
    assert items[columns.TITLE].null_count == len(items)
    assert stages[1].users == ["u2", "u1"]
    assert [row.tolist() for row in stages[1].previous] == [[], [2, 1, 0, 1]]
    assert [row.tolist() for row in stages[1].current] == [[1, 2, 0], [3, 3, 2]]


def test_users_with_two_items_stay_in_the_stage_but_give_no_targets(release: Path) -> None:
    stage = read_release(release)[1][0]
    assert stage.users == ["u1", "u3"]
    assert stage_counts(stage) == {
        "users": 2,
        "events": 6,
        "training_targets": 2,
        "validation": 1,
        "test": 1,
        "left_out": 1,
    }
    assert stage.test_cases(20).users == ["u1"]


def test_blocks_are_ordered_by_number_not_by_name(release: Path) -> None:
    for number in range(2, 11):
        write(release, BLOCK.format(number), edit(release, BLOCK.format(1)))
    blocks, index = release_files(release)
    assert [path.name for path in blocks] == [BLOCK.format(number) for number in range(11)]
    assert index.name == INDEX


def refused(release: Path, *parts: str) -> None:
    """Reading fails, and the message names all of these."""
    with pytest.raises(DataError) as error:
        read_release(release)
    for part in parts:
        assert part in str(error.value)


def test_a_gap_in_the_blocks_names_the_missing_file(release: Path) -> None:
    write(release, BLOCK.format(3), edit(release, BLOCK.format(1)))
    refused(release, "lacks Toys.all.block_2.json", "add the missing file")


def test_a_missing_first_block_is_named(release: Path) -> None:
    (release / BLOCK.format(0)).unlink()
    refused(release, "lacks Toys.all.block_0.json")


def test_no_blocks_at_all(release: Path) -> None:
    for number in (0, 1):
        (release / BLOCK.format(number)).unlink()
    refused(release, str(release), "no block files", "give the directory")


def test_no_directory(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere is not a directory")


def test_blocks_of_two_streams_in_one_directory(release: Path) -> None:
    write(release, "Books.all.block_0.json", edit(release, BLOCK.format(0)))
    refused(release, "several streams (Books, Toys)", "keep only one")


def test_a_missing_index(release: Path) -> None:
    (release / INDEX).unlink()
    refused(release, "no semantic-ID index", "put it in the directory of the blocks")


def test_two_indices(release: Path) -> None:
    write(release, "Toys.index.json", edit(release, INDEX))
    refused(release, INDEX, "Toys.index.json", "keep only the one to be used")


@pytest.mark.parametrize("name", [BLOCK.format(1), INDEX])
def test_a_truncated_file_is_located(release: Path, name: str) -> None:
    text = json.dumps(edit(release, name), indent=1)
    (release / name).write_text(text[: len(text) * 2 // 3], encoding="utf-8")
    refused(release, name, "ends too early", f"of {len(text) * 2 // 3})", "line ", "download")


def test_a_file_cut_within_a_letter_is_located(release: Path) -> None:
    whole = '{"ü": {"previous_block": [], "current_block": []}}'.encode()
    (release / BLOCK.format(0)).write_bytes(whole[:3])
    refused(release, BLOCK.format(0), "not UTF-8", "byte 2")


def test_an_empty_file(release: Path) -> None:
    (release / BLOCK.format(0)).write_bytes(b"")
    refused(release, BLOCK.format(0), "ends too early", "byte 0 of 0")


def test_malformed_json_in_the_middle_is_not_called_truncated(release: Path) -> None:
    (release / BLOCK.format(0)).write_text('{"u1": nonsense}', encoding="utf-8")
    refused(release, BLOCK.format(0), "is not valid JSON", "line 1, column 8")


def test_a_user_twice_in_a_block(release: Path) -> None:
    user = '"u1": {"previous_block": [], "current_block": ["a", "b", "c"]}'
    (release / BLOCK.format(0)).write_text(f"{{{user}, {user}}}", encoding="utf-8")
    refused(release, BLOCK.format(0), "'u1' twice", "keep only one")


@pytest.mark.parametrize("side", ["previous_block", "current_block"])
def test_an_item_unknown_to_the_index_is_named_with_its_user(release: Path, side: str) -> None:
    block = edit(release, BLOCK.format(1))
    block["u1"][side].append("zzz")
    write(release, BLOCK.format(1), block)
    refused(release, BLOCK.format(1), INDEX, "user 'u1' item 'zzz'", "use the index made for these blocks")


def test_many_unknown_items_are_counted(release: Path) -> None:
    block = edit(release, BLOCK.format(0))
    block["u1"]["current_block"] = [f"x{i}" for i in range(9)]
    write(release, BLOCK.format(0), block)
    refused(release, "item 'x4' and 4 more")


def test_an_empty_stage(release: Path) -> None:
    write(release, BLOCK.format(1), {})
    refused(release, BLOCK.format(1), "stage 1 is empty")


def test_a_stage_in_which_nobody_has_three_events(release: Path) -> None:
    block = edit(release, BLOCK.format(1))
    for entry in block.values():
        entry["current_block"] = entry["current_block"][:2]
    write(release, BLOCK.format(1), block)
    refused(release, BLOCK.format(1), "none of the 2 users of stage 1 has 3 events", "merge it")


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        (["a", "b", "c"], "instead of an object"),
        ({"current_block": ["a"]}, "lacks 'previous_block'"),
        ({"previous_block": [], "current_block": "abc"}, "instead of a list of item ids"),
        ({"previous_block": None, "current_block": ["a"]}, "None instead of a list"),
        ({"previous_block": [], "current_block": ["a", 7]}, "contains 7 instead of an item id"),
    ],
)
def test_wrong_types_in_a_block_name_file_user_and_value(release: Path, entry: object, part: str) -> None:
    write(release, BLOCK.format(0), {"u9": entry})
    refused(release, BLOCK.format(0), "'u9'", part)


def test_a_file_that_holds_no_object(release: Path) -> None:
    write(release, BLOCK.format(0), ["u1"])
    refused(release, BLOCK.format(0), "a JSON list instead of an object")


def test_the_same_directory_reads_again_after_the_cure(release: Path) -> None:
    whole = (release / BLOCK.format(0)).read_text(encoding="utf-8")
    (release / BLOCK.format(0)).write_text(whole[:20], encoding="utf-8")
    refused(release, "ends too early")
    (release / BLOCK.format(0)).write_text(whole, encoding="utf-8")
    assert len(read_release(release)[1]) == 2
