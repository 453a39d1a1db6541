"""Codes from behavior: co-occurrence counts, shifted PPMI, its factors, and the IDs made from them."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from scipy import sparse

from peso.config import BehaviorConfig, ItemsConfig, load_config
from peso.errors import ConfigError, DataError, WorkspaceError
from peso.items import behavior
from peso.items.behavior import Behavior, cooccurrences, factorize, shifted_ppmi
from peso.items.contents import ENCODER_FILE
from peso.items.earlier import shorten_semantic_ids
from peso.items.fusion import Fusion
from peso.items.semantic_ids import read_semantic_ids
from peso.items.tokenize import extend_semantic_ids, tokenize
from peso.items.vectors import ItemEncoder
from peso.runs import preparation
from peso.runs.workspace import Workspace
from peso.runtime.progress import Silent

pytestmark = pytest.mark.slow

ITEMS = 7
sequences = st.lists(st.lists(st.integers(0, ITEMS - 1), max_size=9), max_size=8)


def counted(users: list[list[int]], window: int) -> Counter[tuple[int, int]]:
    """Co-occurrences as they are defined: every two places of a user that are near enough."""
    counts: Counter[tuple[int, int]] = Counter()
    for user in users:
        for one, first in enumerate(user):
            for other, second in enumerate(user):
                if first != second and 0 < abs(one - other) <= window:
                    counts[first, second] += 1
    return counts


def arrays(users: list[list[int]]) -> list[np.ndarray]:
    return [np.array(user, np.int32) for user in users]


@given(sequences, st.integers(1, 10), st.sampled_from([1.0, 1.5, 5.0]))
def test_pmi_is_that_of_a_plain_double_loop(users: list[list[int]], window: int, shift: float) -> None:
    counts = counted(users, window)
    each: Counter[int] = Counter()
    for (one, _), count in counts.items():
        each[one] += count
    expected = np.zeros((ITEMS, ITEMS))
    for (one, other), count in counts.items():
        pmi = math.log(count * sum(counts.values()) / (each[one] * each[other]))
        expected[one, other] = max(0.0, pmi - math.log(shift))
    found = cooccurrences(arrays(users), ITEMS, window)
    np.testing.assert_array_equal(
        found.toarray(), [[counts[i, j] for j in range(ITEMS)] for i in range(ITEMS)]
    )
    np.testing.assert_allclose(shifted_ppmi(found, shift).toarray(), expected, atol=1e-12)


def test_counting_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    users = arrays(np.random.default_rng(0).integers(0, ITEMS, (40, 12)).tolist())
    whole = cooccurrences(users, ITEMS, 3).toarray()
    monkeypatch.setattr(behavior, "PAIRS", 60)
    np.testing.assert_array_equal(cooccurrences(iter(users), ITEMS, 3).toarray(), whole)


def test_the_factors_multiply_to_the_matrix() -> None:
    root = np.random.default_rng(0).normal(size=(6, 6))
    matrix = root @ root.T
    vectors = matrix @ factorize(sparse.csr_array(matrix), 6, seed=0)
    np.testing.assert_allclose(vectors @ vectors.T, matrix, atol=1e-4)
    assert factorize(sparse.csr_array(matrix), 2, seed=0).shape == (6, 2)


def test_equal_seeds_give_equal_vectors_even_where_singular_values_are_equal() -> None:
    """Groups of the same size have the same singular values, so any rotation of their vectors is an SVD."""
    pairs = [np.array([2 * group, 2 * group + 1]) for group in range(100)]
    one, same = (Behavior.fit(pairs, 200, BehaviorConfig(), seed=5).vectors for _ in range(2))
    np.testing.assert_array_equal(one, same)
    assert np.isfinite(one).all()


def test_without_any_pair_the_cause_and_the_cure_are_named() -> None:
    with pytest.raises(
        DataError, match=r"no two items .* (lower items.behavior.shift, or remove items.behavior)"
    ):
        Behavior.fit(arrays([[0], [1, 1]]), 2, BehaviorConfig(), seed=0)


def test_the_weight_is_the_share_of_behavior_in_squared_distances() -> None:
    generator = np.random.default_rng(0)
    text, image, together = (generator.normal(size=(300, 6)).astype(np.float32) for _ in range(3))
    rows = np.arange(300)
    vectors = Fusion.fit([text, image, together], rows, 0.7).apply([text, image, together])[0]
    shares = np.square(vectors).reshape(300, 3, 6).sum(2).mean(0)
    np.testing.assert_allclose(shares, (0.15, 0.15, 0.7), rtol=1e-3)


GROUPS, EACH = 8, 15  # groups of items that users have together
WORDS = ["green", "black", "steel", "wooden", "small", "large", "old", "new", "fine", "plain"]


def group_of(item: int) -> int:
    return item % GROUPS


def users_of_groups(users: int, length: int, seed: int = 0) -> list[np.ndarray]:
    """Every user has items of one group."""
    generator = np.random.default_rng(seed)
    return [
        generator.integers(0, EACH, length) * GROUPS + generator.integers(0, GROUPS) for _ in range(users)
    ]


def says_nothing(count: int = GROUPS * EACH, seed: int = 1) -> pa.Table:
    """Items whose titles are drawn at random."""
    generator = np.random.default_rng(seed)
    titles = [" ".join(generator.choice(WORDS, 3)) for _ in range(count)]
    empty = pa.nulls(count, pa.string())
    return pa.table(
        {"item_id": [f"i{n:03}" for n in range(count)], "title": titles, "text": empty, "category": empty}
    )


def config(**keys: Any) -> ItemsConfig:
    tree = {"quantizer": "rq-kmeans", "levels": 3, "codes": 16, "behavior": {"dimensions": 16}, **keys}
    return ItemsConfig.model_validate(tree)


def same_first(codes: np.ndarray) -> float:
    """The share of pairs of items of one group that have the same first code."""
    groups = [codes[group::GROUPS, 0] for group in range(GROUPS)]
    return float(
        np.mean([(group[:, None] == group)[np.triu_indices(len(group), 1)].mean() for group in groups])
    )


@pytest.mark.parametrize("quantizer", ["rq-kmeans", "balanced-rq-kmeans"])
def test_items_that_occur_together_share_first_codes_although_the_text_says_nothing(
    quantizer: str, tmp_path: Path
) -> None:
    users = users_of_groups(200, 10)
    keys = {"quantizer": quantizer, "codes": GROUPS}
    made = {}
    for name, settings in (("both", config(**keys)), ("text", config(**keys, behavior=None))):
        (tmp_path / name).mkdir()
        manifest = tokenize(says_nothing(), settings, tmp_path / name, seed=0, sequences=users)
        made[name] = same_first(read_semantic_ids(tmp_path / name).codes)
        assert ("behavior_neighbours" in manifest["quality"]) == (name == "both")
    assert made["text"] < 0.3
    assert made["both"] > made["text"] + 0.3


@pytest.mark.parametrize("quantizer", ["rq-kmeans", "rq-vae"])
def test_the_same_seed_makes_the_same_files_and_another_seed_does_not(quantizer: str, tmp_path: Path) -> None:
    settings = config(quantizer=quantizer, rq_vae={"steps": 20, "hidden": [16], "latent": 8})
    users, files = users_of_groups(200, 10), []
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        (tmp_path / name).mkdir()
        files.append(tokenize(says_nothing(), settings, tmp_path / name, seed, sequences=users)["files"])
    assert files[0] == files[1] != files[2]


def test_items_without_any_text_get_ids_from_behavior_alone(tmp_path: Path) -> None:
    items = says_nothing().set_column(1, "title", pa.nulls(GROUPS * EACH, pa.string()))
    with pytest.raises(DataError, match=r"items.index or items.behavior"):
        tokenize(items, config(behavior=None), tmp_path, seed=0)
    tokenize(items, config(codes=GROUPS), tmp_path, seed=0, sequences=users_of_groups(200, 10))
    assert same_first(read_semantic_ids(tmp_path).codes) > 0.8


def test_held_out_items_are_measured_as_new_ones_which_have_no_behavior(tmp_path: Path) -> None:
    """Otherwise every new item would look worse than the items it is compared with."""
    items, users = says_nothing(GROUPS * 60), users_of_groups(600, 10)
    users = [user + GROUPS * EACH * (number % 4) for number, user in enumerate(users)]
    stage = (np.arange(len(items)) >= 420).astype(int)
    users = [user[user < 420] for user in users]
    manifest = tokenize(items, config(), tmp_path, seed=0, first_stage=stage, sequences=users)
    held_out, new = manifest["fitness"]["held_out"], manifest["fitness"]["stages"][0]
    assert held_out["items"] == 21
    assert new["error"] == pytest.approx(held_out["error"], rel=0.2)
    assert not manifest["fitness"]["warnings"]


def folder(parent: Path, name: str) -> Path:
    path = parent / name
    path.mkdir()
    return path


def test_a_new_item_is_placed_by_its_text_alone_and_changes_no_id(tmp_path: Path) -> None:
    items, known = says_nothing(), GROUPS * EACH - 10
    users = [user[user < known] for user in users_of_groups(200, 10)]
    tokenize(items.slice(0, known), config(), folder(tmp_path, "one"), seed=0, sequences=users)
    more = extend_semantic_ids(items, config(), tmp_path / "one", folder(tmp_path, "two"))
    before, after = (read_semantic_ids(tmp_path / name) for name in ("one", "two"))
    np.testing.assert_array_equal(after.codes[:known], before.codes)
    assert len(np.unique(after.codes, axis=0)) == len(items)
    assert more["quality"]["without_behavior"] == 10
    # in one go they get the same IDs
    stage = (np.arange(len(items)) >= known).astype(int)
    tokenize(items, config(), folder(tmp_path, "together"), seed=0, first_stage=stage, sequences=users)
    np.testing.assert_array_equal(read_semantic_ids(tmp_path / "together").codes, after.codes)
    encoder = ItemEncoder.from_arrays(load_file(tmp_path / "two" / ENCODER_FILE))
    vectors = encoder.encode(items, config(), None, Silent())
    assert not vectors.behavior[known:].any()
    assert vectors.behavior[:known].any(1).all()
    assert vectors.vectors[known:].any(1).all()


def test_append_refuses_other_settings_of_behavior(tmp_path: Path) -> None:
    tokenize(says_nothing(), config(), folder(tmp_path, "ids"), seed=0, sequences=users_of_groups(99, 10))
    for settings in (config(behavior=None), config(behavior={"dimensions": 16, "weight": 0.6})):
        with pytest.raises(ConfigError, match=r"items.behavior \(.* → .*\); change them back"):
            extend_semantic_ids(says_nothing(), settings, tmp_path / "ids", folder(tmp_path, "more"))
        (tmp_path / "more").rmdir()


def test_undone_items_leave_no_behavior_to_the_items_that_get_their_rows(tmp_path: Path) -> None:
    items, known, settings = says_nothing(), GROUPS * EACH - 10, config(fit="all")
    stage = (np.arange(len(items)) >= known).astype(int)
    users = users_of_groups(200, 10)
    tokenize(items, settings, folder(tmp_path, "all"), seed=0, first_stage=stage, sequences=users)
    whole = (tmp_path / "all" / ENCODER_FILE).read_bytes()
    shorten_semantic_ids(items.slice(0, known), 1, tmp_path / "all", folder(tmp_path, "fewer"))
    assert (tmp_path / "all" / ENCODER_FILE).read_bytes() == whole
    others = says_nothing(seed=9).slice(known, 10)
    again = pa.concat_tables([items.slice(0, known), others])
    manifest = extend_semantic_ids(again, settings, tmp_path / "fewer", folder(tmp_path, "again"))
    assert manifest["quality"]["without_behavior"] == 10
    codes = [read_semantic_ids(tmp_path / name).codes[:known] for name in ("all", "again")]
    np.testing.assert_array_equal(*codes)


STAGE_1 = 1_000_000  # the time at which it begins


def shop(directory: Path, users: list[list[int]], later: list[list[int]], **items: Any) -> Workspace:
    """A log of users' items in stage 0 and stage 1, with a product table, ingested and with IDs."""
    directory.mkdir()
    rows = ["user,item,time"]
    for begin, histories in ((0, users), (STAGE_1, later)):
        rows += [
            f"u{user},i{item:03},{begin + 1000 * place + user}"
            for user, history in enumerate(histories)
            for place, item in enumerate(history)
        ]
    (directory / "log.csv").write_text("\n".join(rows))
    table = says_nothing()
    titles = zip(table["item_id"].to_pylist(), table["title"].to_pylist(), strict=True)
    (directory / "items.csv").write_text("\n".join(["item,title", *map(",".join, titles)]))
    tree = {
        "data": {
            "format": "csv",
            "path": str(directory / "log.csv"),
            "items": {"path": str(directory / "items.csv"), "columns": {"title": "title"}},
            "stages": {"boundaries": [STAGE_1]},
        },
        "items": {
            "quantizer": "rq-kmeans",
            "levels": 3,
            "codes": 16,
            "behavior": {"dimensions": 16},
            **items,
        },
        "backbone": "tiny",
    }
    workspace = Workspace.create_or_open(directory / "w", load_config(tree))
    with workspace.lock():
        preparation.ingest(workspace, Silent())
        preparation.tokenize(workspace, Silent())
    return workspace


def codes_of(workspace: Workspace) -> dict[str, list[str]]:
    ids = workspace.semantic_ids
    return {item: ids.semantic_id(item) for item in ids.item_ids}


@pytest.fixture(scope="module")
def histories() -> tuple[list[list[int]], list[list[int]]]:
    """Items of stage 0, which has every item in training events, and of stage 1."""
    first = [[*range(group, GROUPS * EACH, GROUPS), group, group + GROUPS] for group in range(GROUPS)]
    rest = [user.tolist() for user in users_of_groups(60, 8)]
    return first + rest, [user.tolist() for user in users_of_groups(60, 5, seed=2)]


def test_no_event_of_validation_test_or_later_stages_is_read(
    tmp_path: Path, histories: tuple[list[list[int]], list[list[int]]]
) -> None:
    stage_0, stage_1 = histories
    there = codes_of(shop(tmp_path / "there", stage_0, stage_1))
    ends = [user[-2:] for user in stage_0]
    other_ends = [user[:-2] + end for user, end in zip(stage_0, ends[7:] + ends[:7], strict=True)]
    assert other_ends != stage_0
    assert codes_of(shop(tmp_path / "ends", other_ends, stage_1)) == there
    assert codes_of(shop(tmp_path / "later", stage_0, stage_1[::-1])) == there
    training = [
        user[:-3] + end[:1] + user[-2:] for user, end in zip(stage_0, ends[7:] + ends[:7], strict=True)
    ]
    assert codes_of(shop(tmp_path / "training", training, stage_1)) != there


def test_fit_all_reads_training_events_of_all_stages_and_no_test_event_of_any(
    tmp_path: Path, histories: tuple[list[list[int]], list[list[int]]]
) -> None:
    stage_0, stage_1 = histories
    there = codes_of(shop(tmp_path / "there", stage_0, stage_1, fit="all"))
    ends = [user[-2:] for user in stage_0]
    other_ends = [user[:-2] + end for user, end in zip(stage_0, ends[7:] + ends[:7], strict=True)]
    assert codes_of(shop(tmp_path / "ends", other_ends, stage_1, fit="all")) == there
    later = [user[:-2] + end[-2:] for user, end in zip(stage_1, stage_1[7:] + stage_1[:7], strict=True)]
    assert codes_of(shop(tmp_path / "later", stage_0, later, fit="all")) == there
    training = [end[:1] + user[1:] for user, end in zip(stage_1, stage_1[7:] + stage_1[:7], strict=True)]
    assert codes_of(shop(tmp_path / "training", stage_0, training, fit="all")) != there


def test_a_workspace_with_behavior_is_appended_to_and_keeps_its_settings(
    tmp_path: Path, histories: tuple[list[list[int]], list[list[int]]]
) -> None:
    workspace = shop(tmp_path / "s", *histories)
    before = codes_of(workspace)
    rows = [
        "user,item,time",
        *(
            f"u{user},{item},{2 * STAGE_1 + n}"
            for user in range(3)
            for n, item in enumerate(["i000", f"new{user}", "i001", "i008"])
        ),
    ]
    (tmp_path / "week.csv").write_text("\n".join(rows))
    (tmp_path / "new.csv").write_text("item,title\n" + "\n".join(f"new{n},green old plain" for n in range(3)))
    table = {"path": str(tmp_path / "new.csv"), "columns": {"title": "title"}}
    tree = {"format": "csv", "path": str(tmp_path / "week.csv"), "items": table, "stages": 1}
    with workspace.lock():
        preparation.append(workspace, Silent(), load_config({"data": tree}).data)
        preparation.tokenize_new(workspace, Silent())
    after = codes_of(Workspace.open(workspace.root))
    assert {item: after[item] for item in before} == before
    assert len(after) == len(before) + 3
    assert workspace.semantic_ids_manifest["quality"]["without_behavior"] == 3
    text = (workspace.root / "config.yaml").read_text()
    (workspace.root / "config.yaml").write_text(text.replace("weight: 0.5", "weight: 0.6", 1))
    with pytest.raises(WorkspaceError, match=r"items.behavior.weight was 0.5, is 0.6"):
        Workspace.open(workspace.root)


def test_behavior_that_is_turned_on_after_ids_were_made_is_refused(
    tmp_path: Path, histories: tuple[list[list[int]], list[list[int]]]
) -> None:
    workspace = shop(tmp_path / "s", *histories, behavior=None)
    tree = yaml.safe_load((workspace.root / "config.yaml").read_text())
    tree["items"]["behavior"] = BehaviorConfig().model_dump()
    (workspace.root / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(WorkspaceError, match=r"edited after its semantic IDs were made: items.behavior"):
        Workspace.open(workspace.root)
