"""Codes that evolve: which items change, what they change to, and what stays."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import load_file

from peso.config import ItemsConfig
from peso.errors import ConfigError, WorkspaceError
from peso.items.behavior import cooccurrences, shifted_ppmi
from peso.items.earlier import shorten_semantic_ids
from peso.items.ids_by_stage import REFRESHED_FILE, Changes, IdsByStage
from peso.items.refresh import TrainingLog
from peso.items.semantic_ids import FORMAT, read_semantic_ids
from peso.items.tokenize import ENCODER_FILE, extend_semantic_ids, tokenize
from peso.items.vectors import ItemEncoder
from peso.runtime.manifest import read_manifest

GROUPS, EACH, NEW = 6, 12, 2
ITEMS = GROUPS * EACH + NEW  # the last ones arrive in stage 1
MOVES = 0  # an item of group 0 that users have with those of group 1 from stage 1 on
ARRIVES = GROUPS * EACH  # a new item, which users have with those of group 3
Users = list[np.ndarray]


def sequences(stage: int) -> Users:
    """Every user stays within one group of items; item n is in group n % GROUPS."""
    generator, users = np.random.default_rng(stage), []
    for user in range(240 if stage == 0 else 120):
        group = user % GROUPS
        items = group + GROUPS * generator.permutation(EACH)[:8]
        if stage:
            items = items[items != MOVES]
            extra = {1: [MOVES], 3: [ARRIVES]}.get(group, [])
            items = np.insert(items, 3, extra) if extra else items
        users.append(items.astype(np.int32))
    return users


LOG = [sequences(stage) for stage in range(3)]
FIRST = np.where(np.arange(ITEMS) < GROUPS * EACH, 0, 1)  # the stage in which each item first occurs


def log(stages: int = 3) -> TrainingLog:
    def events(asked: Iterable[int]) -> Iterable[np.ndarray]:
        return [user for stage in asked for user in LOG[stage]]

    return TrainingLog(stages, events)


def table(items: int = ITEMS) -> pa.Table:
    """Titles say nothing of the groups."""
    words = np.random.default_rng(1).choice(["red", "blue", "old", "new", "flat"], (ITEMS, 2))
    empty = pa.nulls(items, pa.string())
    return pa.table(
        {
            "item_id": [f"i{n:03}" for n in range(items)],
            "title": [" ".join(pair) for pair in words[:items]],
            "text": empty,
            "category": empty,
        }
    )


def config(refresh: dict[str, Any] | None = None, **keys: Any) -> ItemsConfig:
    tree = {
        "quantizer": "rq-kmeans",
        "levels": 3,
        "codes": GROUPS,
        "behavior": {"dimensions": GROUPS, "weight": 0.9},
        "refresh": refresh if refresh is not None else {},
        **keys,
    }
    return ItemsConfig.model_validate(tree)


def made(directory: Path, settings: ItemsConfig) -> IdsByStage:
    """The IDs of the whole log."""
    directory.mkdir()
    tokenize(table(), settings, directory, 0, first_stage=FIRST, sequences=LOG[0], log=log())
    return IdsByStage.read(directory)


def changed(ids: IdsByStage, stage: int) -> set[int]:
    before, now = ids.at(stage - 1).codes, ids.at(stage).codes
    return set(np.flatnonzero((before != now).any(1)).tolist())


def commonest(codes: np.ndarray, group: int) -> int:
    return int(np.bincount(codes[group : GROUPS * EACH : GROUPS, 0]).argmax())


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> IdsByStage:
    return made(tmp_path_factory.mktemp("refresh") / "ids", config())


def test_an_item_that_users_have_with_others_gets_their_first_code_and_all_others_keep_theirs(
    ids: IdsByStage,
) -> None:
    before = ids.at(0).codes
    assert commonest(before, 0) != commonest(before, 1)
    assert before[MOVES, 0] == commonest(before, 0)
    assert {MOVES, ARRIVES} >= changed(ids, 1) | changed(ids, 2) >= {MOVES}
    last = ids.at(2).codes
    assert last[MOVES, 0] == commonest(before, 1)
    assert last[ARRIVES, 0] == commonest(before, 3)  # by text alone before it had events
    np.testing.assert_array_equal(ids.at(None).codes, last)


def test_an_item_changes_when_it_has_enough_events_since_its_last_coding(tmp_path: Path) -> None:
    events = sum(int((user == ARRIVES).sum()) for user in LOG[1])
    enough, more = (made(tmp_path / str(n), config({"support": n})) for n in (events, events + 1))
    assert ARRIVES in changed(enough, 1)
    assert ARRIVES not in changed(more, 1)
    assert ARRIVES in changed(more, 2)


def test_the_share_limits_the_changes_to_the_largest_drift(tmp_path: Path) -> None:
    every = {"support": 1, "drift": 0.001, "depth": 3}
    one, many = (
        made(tmp_path / "one", config({**every, "share": 0.001})),
        made(tmp_path / "many", config(every)),
    )
    assert len(changed(one, 1)) == 1
    assert changed(one, 1) < changed(many, 1)
    told = read_manifest(tmp_path / "one", FORMAT)["refresh"]["stages"]
    assert told[0]["beyond_share"] == len(changed(many, 1)) - 1


def test_codes_are_refreshed_at_the_stages_asked_for(tmp_path: Path) -> None:
    second = made(tmp_path / "ids", config({"every": 2}))
    assert not changed(second, 1)
    assert MOVES in changed(second, 2)


def test_the_manifest_names_the_changed_items(ids: IdsByStage, tmp_path: Path) -> None:
    made(tmp_path / "ids", config())
    told = read_manifest(tmp_path / "ids", FORMAT)["refresh"]
    assert told["through"] == 3
    for found in told["stages"]:
        named = {int(item[1:]) for item in found["items"]}
        assert named == changed(ids, found["stage"])
        assert found["changed"] == len(named) <= found["drifted"] <= found["tested"]


@pytest.mark.parametrize("rule", ["reassign", "extra-level"])
def test_no_id_is_ever_given_to_two_items(rule: str, tmp_path: Path) -> None:
    settings = config({"support": 1, "drift": 0.001, "depth": 3, "share": 1.0}, collisions=rule)
    every = made(tmp_path / "ids", settings)
    owner: dict[tuple[int, ...], int] = {}
    for stage in range(3):
        codes = every.at(stage).codes
        assert len(np.unique(codes, axis=0)) == ITEMS
        for row, code in enumerate(map(tuple, codes.tolist())):
            assert owner.setdefault(code, row) == row
    assert len(owner) > ITEMS


@pytest.mark.parametrize("rule", ["reassign", "extra-level", "allow"])
def test_stage_by_stage_gives_the_same_codes_as_all_at_once(rule: str, tmp_path: Path) -> None:
    settings = config({"support": 1, "drift": 0.01, "depth": 3}, collisions=rule)
    whole = made(tmp_path / "whole", settings)
    for name in ("0", "1", "2"):
        (tmp_path / name).mkdir()
    known = GROUPS * EACH
    tokenize(table(known), settings, tmp_path / "0", 0, sequences=LOG[0], log=log(1))
    for stage in (1, 2):
        place = tmp_path / str(stage)
        more = {"first_stage": FIRST, "log": log(stage + 1)}
        extend_semantic_ids(table(), settings, tmp_path / str(stage - 1), place, **more)
    by_stage = IdsByStage.read(tmp_path / "2")
    for stage in range(3):
        np.testing.assert_array_equal(by_stage.at(stage).codes, whole.at(stage).codes)
    one, other = (read_manifest(tmp_path / name, FORMAT) for name in ("whole", "2"))
    assert one["refresh"] == other["refresh"]
    assert one["files"] == other["files"]


def test_undone_stages_leave_the_codes_of_the_stages_before(tmp_path: Path) -> None:
    settings = config({"support": 1, "drift": 0.01, "depth": 3})
    made(tmp_path / "whole", settings)
    for name in ("one", "again"):
        (tmp_path / name).mkdir()
    shorten_semantic_ids(table(), 2, tmp_path / "whole", tmp_path / "one")
    short, whole = (IdsByStage.read(tmp_path / name) for name in ("one", "whole"))
    np.testing.assert_array_equal(short.at(None).codes, whole.at(1).codes)
    extend_semantic_ids(table(), settings, tmp_path / "one", tmp_path / "again", log=log())
    manifests = [read_manifest(tmp_path / name, FORMAT) for name in ("whole", "again")]
    assert manifests[0] == manifests[1]


def test_the_fitted_events_give_the_fitted_vectors(tmp_path: Path) -> None:
    made(tmp_path / "ids", config())
    behavior = ItemEncoder.from_arrays(load_file(tmp_path / "ids" / ENCODER_FILE)).behavior
    assert behavior is not None
    matrix = shifted_ppmi(cooccurrences(LOG[0], ITEMS, 5), 1.0)
    np.testing.assert_array_equal(behavior.vectors_of(matrix), behavior.spread(ITEMS))


def test_without_refresh_there_is_no_file_and_the_codes_of_stage_0_are_the_same(
    ids: IdsByStage, tmp_path: Path
) -> None:
    frozen = made(tmp_path / "ids", config(refresh=None).model_copy(update={"refresh": None}))
    assert not (tmp_path / "ids" / REFRESHED_FILE).exists()
    assert "refresh" not in read_manifest(tmp_path / "ids", FORMAT)["config"]
    np.testing.assert_array_equal(frozen.at(2).codes, ids.at(0).codes)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    made(tmp_path / "ids", config())
    manifest = read_manifest(tmp_path / "ids", FORMAT)
    assert Changes.read(tmp_path / "ids", manifest) is not None
    (tmp_path / "ids" / REFRESHED_FILE).write_bytes(b"PAR1")
    with pytest.raises(WorkspaceError, match=REFRESHED_FILE):
        IdsByStage.read(tmp_path / "ids")


def test_other_settings_of_refresh_are_refused_later(tmp_path: Path) -> None:
    made(tmp_path / "ids", config())
    (tmp_path / "more").mkdir()
    other = config({"drift": 0.5})
    with pytest.raises(ConfigError, match=r"items.refresh \(.*change them back"):
        extend_semantic_ids(table(), other, tmp_path / "ids", tmp_path / "more", log=log())
    assert read_semantic_ids(tmp_path / "ids").codes.shape == (ITEMS, 3)
