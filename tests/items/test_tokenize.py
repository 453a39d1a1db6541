"""From an item table to a directory of semantic IDs, and on with the items of later."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from peso.config import ItemsConfig
from peso.errors import ConfigError, DataError, WorkspaceError
from peso.items import quality, semantic_ids
from peso.items.earlier import shorten_semantic_ids
from peso.items.quality import codebook_use, neighbors_kept, prefix_sample
from peso.items.semantic_ids import SemanticIds, read_release_index, read_semantic_ids, write_semantic_ids
from peso.items.tokenize import extend_semantic_ids, tokenize
from peso.items.vectors import ItemEncoder
from peso.runtime.files import commit_directory
from peso.runtime.progress import Silent

KINDS = ["tea", "coffee", "hammer", "nail", "drill", "lamp", "chair", "table", "book", "pen"]
WORDS = ["green", "black", "steel", "wooden", "small", "large", "old", "new", "fine", "plain"]


def catalogue(count: int, seed: int = 0) -> pa.Table:
    generator = np.random.default_rng(seed)
    rows = [(generator.choice(KINDS), *generator.choice(WORDS, 3)) for _ in range(count)]
    return item_table(
        [f"{kind} {' '.join(words)}" for kind, *words in rows], [f"Shop > {row[0]}" for row in rows]
    )


def item_table(titles: list[str | None], categories: list[str | None] | None = None) -> pa.Table:
    return pa.table(
        {
            "item_id": [f"item{row}" for row in range(len(titles))],
            "title": pa.array(titles, pa.string()),
            "text": pa.nulls(len(titles), pa.string()),
            "category": pa.array(categories or [None] * len(titles), pa.string()),
        }
    )


def settings_for(quantizer: str = "rq-kmeans", **keys: Any) -> ItemsConfig:
    defaults = {"levels": 3, "codes": 16, "rq_vae": {"steps": 20, "hidden": [16], "latent": 8}}
    return ItemsConfig.model_validate({"quantizer": quantizer, **defaults, **keys})


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    @property
    def text(self) -> str:
        return "\n".join(self.notes)


def folder(parent: Path, name: str) -> Path:
    path = parent / name
    path.mkdir()
    return path


every_quantizer = pytest.mark.parametrize(
    "quantizer", ["rq-kmeans", "balanced-rq-kmeans", "rq-vae", "category-path"]
)


@every_quantizer
def test_every_item_gets_an_id_of_its_own_and_the_directory_reads_back(
    quantizer: str, tmp_path: Path
) -> None:
    manifest = tokenize(catalogue(150), settings_for(quantizer), tmp_path, seed=0)
    ids = read_semantic_ids(tmp_path)
    assert ids.item_ids == catalogue(150)["item_id"].to_pylist()
    assert len(np.unique(ids.codes, axis=0)) == 150
    assert manifest["quality"]["collisions"]["rate"] == 0
    assert manifest == json.loads((tmp_path / "manifest.json").read_text())
    assert quantizer == "category-path" or manifest["collision_rule"].startswith("reassign")


@every_quantizer
def test_the_same_seed_makes_the_same_files(quantizer: str, tmp_path: Path) -> None:
    one, same = (
        tokenize(catalogue(150), settings_for(quantizer), folder(tmp_path, name), seed=3)["files"]
        for name in ("one", "same")
    )
    assert one == same


@pytest.mark.slow
@every_quantizer
@pytest.mark.parametrize("collisions", ["reassign", "extra-level", "allow"])
def test_append_changes_no_id_that_is_there(quantizer: str, collisions: str, tmp_path: Path) -> None:
    items = catalogue(220)
    config = settings_for(quantizer, collisions=collisions, codes=32)
    tokenize(items.slice(0, 120), config, folder(tmp_path, "one"), seed=0)
    extend_semantic_ids(items.slice(0, 170), config, tmp_path / "one", folder(tmp_path, "two"))
    manifest = extend_semantic_ids(items, config, tmp_path / "two", folder(tmp_path, "three"))
    one, two, three = (read_semantic_ids(tmp_path / name) for name in ("one", "two", "three"))
    assert one.sizes == two.sizes == three.sizes
    np.testing.assert_array_equal(two.codes[:120], one.codes)
    np.testing.assert_array_equal(three.codes[:170], two.codes)
    assert three.item_ids == items["item_id"].to_pylist()
    if quantizer != "category-path":
        assert [stage["items"] for stage in manifest["fitness"]["stages"]] == [50, 50]
    if collisions != "allow":
        assert len(np.unique(three.codes, axis=0)) == 220


@every_quantizer
def test_contents_are_kept_on_request_and_appends_do_not_change_them(quantizer: str, tmp_path: Path) -> None:
    items, config = catalogue(170), settings_for(quantizer, codes=32, dimensions=16)
    tokenize(items.slice(0, 120), config, folder(tmp_path, "without"), seed=0)
    tokenize(items.slice(0, 120), config, folder(tmp_path, "one"), seed=0, contents=True)
    manifest = extend_semantic_ids(items, config, tmp_path / "one", folder(tmp_path, "two"))
    without, one, two = (read_semantic_ids(tmp_path / name) for name in ("without", "one", "two"))
    assert without.contents is None
    np.testing.assert_array_equal(without.codes, one.codes)
    assert one.contents.shape == (120, 16)
    np.testing.assert_array_equal(two.contents[:120], one.contents)
    assert two.fingerprint_of_contents(120) == one.fingerprint_of_contents(120)
    encoder = ItemEncoder.from_arrays(load_file(tmp_path / "two" / "encoder.safetensors"))
    new = encoder.encode(items, config, None, Silent()).vectors[120:]  # by the frozen encoder
    np.testing.assert_array_equal(two.contents[120:], new)
    shorten_semantic_ids(items.slice(0, 120), 1, tmp_path / "two", folder(tmp_path, "short"))
    np.testing.assert_array_equal(read_semantic_ids(tmp_path / "short").contents, one.contents)
    (tmp_path / "two" / "contents.safetensors").write_bytes(b"damaged")
    assert "contents.safetensors" in manifest["files"]
    with pytest.raises(WorkspaceError, match="contents"):
        read_semantic_ids(tmp_path / "two")


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([*KINDS, None]), min_size=1, max_size=12), min_size=2, max_size=4),
    st.sampled_from(["reassign", "extra-level", "allow"]),
)
def test_no_sequence_of_appends_changes_an_id(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[str | None]], collisions: str
) -> None:
    parent = tmp_path_factory.mktemp("appends")
    batches[0].append("tea")  # not one text in stage 0 is an error
    config = settings_for(levels=2, codes=4, collisions=collisions)
    titles: list[str | None] = []
    before: SemanticIds | None = None
    for number, batch in enumerate(batches):
        titles += batch
        here = folder(parent, str(number))
        if number:
            extend_semantic_ids(item_table(titles), config, parent / str(number - 1), here)
        else:
            tokenize(item_table(titles), config, here, seed=0)
        ids = read_semantic_ids(here)
        if before is not None:
            np.testing.assert_array_equal(ids.codes[: len(before.codes)], before.codes)
        if collisions == "reassign":
            assert len(np.unique(ids.codes, axis=0)) == min(len(titles), math.prod(ids.sizes))
        before = ids


def test_stages_in_one_go_are_the_same_as_appending_them(tmp_path: Path) -> None:
    items = catalogue(200)
    stage = np.repeat([0, 1, 2], [120, 40, 40])
    config = settings_for()
    together = tokenize(items, config, folder(tmp_path, "together"), seed=0, first_stage=stage)
    tokenize(items.slice(0, 120), config, folder(tmp_path, "a"), seed=0)
    extend_semantic_ids(items.slice(0, 160), config, tmp_path / "a", folder(tmp_path, "b"))
    apart = extend_semantic_ids(items, config, tmp_path / "b", folder(tmp_path, "c"))
    np.testing.assert_array_equal(
        read_semantic_ids(tmp_path / "together").codes, read_semantic_ids(tmp_path / "c").codes
    )
    assert together["fitness"] == apart["fitness"]


def test_items_of_later_stages_change_nothing_of_what_is_fitted(tmp_path: Path) -> None:
    """Codes of stage 0 do not look ahead, wherever later items stand in the table."""
    items = catalogue(160)
    later = np.random.default_rng(0).permutation(160) < 60
    config = settings_for()
    tokenize(items, config, folder(tmp_path, "all"), seed=0, first_stage=later.astype(int))
    tokenize(items.filter(pa.array(~later)), config, folder(tmp_path, "base"), seed=0)
    whole, base = read_semantic_ids(tmp_path / "all"), read_semantic_ids(tmp_path / "base")
    np.testing.assert_array_equal(whole.codes[~later], base.codes)
    tokenize(
        items, settings_for(fit="all"), folder(tmp_path, "fit_all"), seed=0, first_stage=later.astype(int)
    )
    assert not np.array_equal(read_semantic_ids(tmp_path / "fit_all").codes, whole.codes)


def test_codes_are_clipped_to_what_the_catalogue_can_fill_and_that_is_said(tmp_path: Path) -> None:
    notes = Notes()
    manifest = tokenize(catalogue(100), settings_for(codes=256), tmp_path, seed=0, observer=notes)
    assert manifest["sizes"] == [25, 25, 25]
    assert "25 codes per level instead of 256, because 100 items cannot fill more" in notes.text


def test_an_item_without_text_gets_the_codes_nearest_to_the_centre(tmp_path: Path) -> None:
    titles = [*catalogue(120)["title"].to_pylist(), None, " ", "???"]
    notes = Notes()
    config = settings_for(collisions="allow")
    manifest = tokenize(item_table(titles), config, tmp_path, seed=0, observer=notes)
    codes = read_semantic_ids(tmp_path).codes
    assert manifest["quality"]["without_vector"] == 3
    assert (
        "\n3 of 123 items have no text or vector and get the codes nearest to the center" in f"\n{notes.text}"
    )
    assert (codes[-3:] == codes[-1]).all()
    later = extend_semantic_ids(item_table([*titles, None]), config, tmp_path, folder(tmp_path, "later"))
    assert (read_semantic_ids(tmp_path / "later").codes[-1] == codes[-1]).all()
    assert later["fitness"]["stages"][0]["error"] is None


@pytest.mark.parametrize("titles", [[None, "", "..."], [None, None, None]])  # no word; no text at all
def test_a_catalogue_without_any_text_is_refused(titles: list[str | None], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of 3 items has a text or a vector"):
        tokenize(item_table(titles), settings_for(), tmp_path, seed=0)
    with pytest.raises(DataError, match="empty catalog"):
        tokenize(item_table([]), settings_for(), tmp_path, seed=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("quantizer", ["rq-kmeans", "balanced-rq-kmeans", "rq-vae"])
def test_a_multitude_of_items_with_one_text_is_spread_over_the_ids_there_are(
    quantizer: str, tmp_path: Path
) -> None:
    """As docs/reference/items.md says: distinct IDs as long as there are any; the remaining items share."""
    notes = Notes()
    config = settings_for(quantizer, levels=2, codes=16)
    manifest = tokenize(item_table(["the same"] * 300), config, tmp_path, seed=0, observer=notes)
    codes = read_semantic_ids(tmp_path).codes
    assert len(np.unique(codes, axis=0)) == 16 * 16
    assert manifest["quality"]["same_vector"] == 299
    assert "warning: 299 of 300 items have the same vector as another item" in notes.text
    assert "there are 300 items but only 256 IDs" in notes.text
    # three levels have room for all of them
    roomy = tokenize(item_table(["the same"] * 300), settings_for(quantizer), folder(tmp_path, "3"), seed=0)
    assert roomy["quality"]["collisions"]["distinct_ids"] == 300


@pytest.mark.slow
def test_thirty_thousand_items_with_one_text_take_seconds(tmp_path: Path) -> None:
    config = settings_for(levels=4, codes=256)
    manifest = tokenize(item_table(["the same"] * 30_000), config, tmp_path, seed=0)
    assert manifest["quality"]["collisions"]["distinct_ids"] == 30_000


def test_a_full_disk_leaves_no_ids_or_those_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items, config = catalogue(80), settings_for()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def make(count: int, run: Callable[..., object], *source: Path) -> None:
        with commit_directory(tmp_path / "ids") as directory:
            run(items.slice(0, count), config, *source, directory, **({} if source else {"seed": 0}))

    with monkeypatch.context() as patch:
        patch.setattr(semantic_ids.pq, "write_table", full)
        with pytest.raises(WorkspaceError, match=r"no space left while writing .*no partial output"):
            make(60, tokenize)
    assert not list(tmp_path.iterdir())
    make(60, tokenize)
    before = read_semantic_ids(tmp_path / "ids").codes
    with monkeypatch.context() as patch:
        patch.setattr(semantic_ids.pq, "write_table", full)
        with pytest.raises(WorkspaceError, match="no space left while writing"):
            make(80, extend_semantic_ids, tmp_path / "ids")
    np.testing.assert_array_equal(read_semantic_ids(tmp_path / "ids").codes, before)
    make(80, extend_semantic_ids, tmp_path / "ids")
    np.testing.assert_array_equal(read_semantic_ids(tmp_path / "ids").codes[:60], before)


@pytest.fixture
def vectors(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    np.save(tmp_path / "image.npy", generator.normal(size=(120, 5)))
    (tmp_path / "image.ids.txt").write_text("\n".join(f"item{row}" for row in range(120)))
    return tmp_path / "image.npy"


def test_vectors_from_files_alone_and_fused_with_text(vectors: Path, tmp_path: Path) -> None:
    alone = settings_for(encoder="vectors", vectors=[str(vectors)])
    fused = settings_for(vectors=[str(vectors)], dimensions=8)
    assert tokenize(catalogue(120), alone, folder(tmp_path, "alone"), seed=0)["vector_width"] == 5
    assert tokenize(catalogue(120), fused, folder(tmp_path, "fused"), seed=0)["vector_width"] == 13


def test_an_item_that_no_file_has_a_vector_for_is_counted_and_gets_the_fallback(
    vectors: Path, tmp_path: Path
) -> None:
    notes = Notes()
    config = settings_for(encoder="vectors", vectors=[str(vectors)])
    manifest = tokenize(catalogue(123), config, folder(tmp_path, "ids"), seed=0, observer=notes)
    assert manifest["quality"]["without_vector"] == 3
    assert "image.npy: no vector for 3 of 123 items" in notes.text


def test_new_vectors_of_another_width_are_refused(vectors: Path, tmp_path: Path) -> None:
    config = settings_for(encoder="vectors", vectors=[str(vectors)])
    tokenize(catalogue(120), config, folder(tmp_path, "ids"), seed=0)
    np.save(vectors, np.ones((120, 6)))
    with pytest.raises(DataError, match=r"are \[6\], but the codebooks were fitted to \[5\]"):
        extend_semantic_ids(catalogue(121), config, tmp_path / "ids", folder(tmp_path, "more"))


def test_append_refuses_what_does_not_continue_the_index(tmp_path: Path) -> None:
    items, config = catalogue(60), settings_for()
    tokenize(items, config, folder(tmp_path, "ids"), seed=0)
    more = folder(tmp_path, "more")
    with pytest.raises(ConfigError, match=r"items.levels \(3 → 4\); change them back"):
        extend_semantic_ids(items, settings_for(levels=4), tmp_path / "ids", more)
    with pytest.raises(DataError, match="row 0 was item 'item0'"):
        extend_semantic_ids(items.slice(1), config, tmp_path / "ids", more)
    with pytest.raises(DataError, match="row 59 was item 'item59'"):
        extend_semantic_ids(items.slice(0, 59), config, tmp_path / "ids", more)
    write_semantic_ids(read_semantic_ids(tmp_path / "ids"), folder(tmp_path, "imported"))
    with pytest.raises(ConfigError, match="has an imported index, without codebooks"):
        extend_semantic_ids(items, config, tmp_path / "imported", more)
    (tmp_path / "ids" / "codebooks.safetensors").write_bytes(b"damaged")
    with pytest.raises(WorkspaceError, match=r"codebooks.safetensors is damaged"):
        extend_semantic_ids(items, config, tmp_path / "ids", more)
    assert not list(more.iterdir())


def test_items_unlike_all_before_are_a_reason_to_refit_items_alike_are_not(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    directions = generator.normal(size=(8, 20))
    alike = directions[generator.integers(0, 8, 700)] + 0.2 * generator.normal(size=(700, 20))
    unlike = generator.normal(size=(100, 20))
    np.save(tmp_path / "v.npy", np.concatenate([alike, unlike]))
    config = settings_for(encoder="vectors", vectors=[str(tmp_path / "v.npy")], levels=2)
    stage = np.repeat([0, 1, 2], [600, 100, 100])
    manifest = tokenize(catalogue(800), config, folder(tmp_path, "ids"), seed=0, first_stage=stage)
    (warning,) = [text for text in manifest["fitness"]["warnings"] if "error" in text]
    assert warning.startswith("stage 2: the error of the codes is")
    assert quality.refit_warnings(manifest["fitness"]) == manifest["fitness"]["warnings"]


def test_held_out_items_are_written_worse_than_fitted_ones(tmp_path: Path) -> None:
    state = tokenize(catalogue(600), settings_for(), tmp_path, seed=0)["fitness"]
    assert state["held_out"]["items"] == 30
    assert state["fit"]["items"] == 570
    assert state["held_out"]["error"] > state["fit"]["error"]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30))
def test_perplexity_lies_between_one_and_the_codes_used(column: list[int]) -> None:
    (level,) = codebook_use(np.array(column)[:, None], [4])
    assert level["used"] == len(set(column))
    assert 1 - 1e-9 <= level["perplexity"] <= level["used"] + 1e-9


def test_neighbors_kept_counts_the_true_neighbors() -> None:
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(60, 3)).astype(np.float32)
    vectors[7] = vectors[8]  # equally near: the item itself must not count as its neighbour
    codes = generator.integers(0, 3, (60, 2))
    kept = neighbors_kept(vectors, codes)
    distances = np.square(vectors[:, None] - vectors[None]).sum(2)
    np.fill_diagonal(distances, np.inf)
    nearest = np.argsort(distances, axis=1)[:, :10]
    first = codes[nearest, 0] == codes[:, None, 0]
    assert kept["first"] == pytest.approx(first.mean())
    assert kept["first_two"] == pytest.approx((first & (codes[nearest, 1] == codes[:, None, 1])).mean())


def test_prefixes_keep_more_neighbours_than_chance(tmp_path: Path) -> None:
    items = catalogue(400)
    tokenize(items, settings_for(), tmp_path, seed=0)
    ids = read_semantic_ids(tmp_path)
    vectors = ItemEncoder.fit(items, np.arange(400), settings_for(), 0, None, Silent())[1].vectors
    shuffled = np.random.default_rng(0).permutation(ids.codes)
    assert neighbors_kept(vectors, ids.codes)["first"] > 3 * neighbors_kept(vectors, shuffled)["first"]


def test_quality_shows_items_of_one_prefix_with_their_titles(tmp_path: Path) -> None:
    sample = tokenize(catalogue(150), settings_for(), tmp_path, seed=0)["quality"]["sample"]
    ids = read_semantic_ids(tmp_path)
    for shown in sample["items"]:
        assert ids.semantic_id(shown["item"])[: len(sample["prefix"])] == sample["prefix"]
    assert sample["under_it"] >= len(sample["items"]) > 1
    assert all(shown["title"].split()[0] in KINDS for shown in sample["items"])


@pytest.mark.slow
def test_on_a_real_catalogue_ids_are_distinct_and_keep_neighbours_as_the_released_index_does(
    industrial_dir: Path, tmp_path: Path
) -> None:
    entries = json.loads((industrial_dir / "Industrial_and_Scientific.item.json").read_text())
    released = read_release_index(industrial_dir / "Industrial_and_Scientific.index.json")
    items = pa.table(
        {
            "item_id": list(entries),
            "title": [entry["title"] for entry in entries.values()],
            "text": [entry["description"] for entry in entries.values()],
            "category": [entry["brand"] for entry in entries.values()],
        }
    )
    config = ItemsConfig(quantizer="rq-kmeans", levels=3)
    tokenize(items, config, tmp_path, seed=0)
    ids = read_semantic_ids(tmp_path)
    assert len(np.unique(released.codes, axis=0)) == len(released.codes) - 16
    assert len(np.unique(ids.codes, axis=0)) == len(ids.codes) == 3686
    vectors = ItemEncoder.fit(items, np.arange(3686), config, 0, None, Silent())[1].vectors
    ours, theirs = neighbors_kept(vectors, ids.codes), neighbors_kept(vectors, released.codes)
    assert ours["first"] >= theirs["first"]
    assert ours["first_two"] >= theirs["first_two"]


def test_a_sample_prefers_items_with_titles() -> None:
    codes = np.array([[0, 0, k] for k in range(5)] + [[1, 1, k] for k in range(3)], np.int32)
    ids = SemanticIds([f"item{k}" for k in range(8)], codes, (2, 2, 5))
    told = prefix_sample(ids, [None] * 5 + ["tea", None, "pot"])
    assert told["prefix"] == ["<a_1>", "<b_1>"]
    assert told["under_it"] == 3
    assert told["items"] == [{"item": "item5", "title": "tea"}, {"item": "item7", "title": "pot"}]
    assert prefix_sample(ids, [None] * 8)["prefix"] == ["<a_0>", "<b_0>"]
