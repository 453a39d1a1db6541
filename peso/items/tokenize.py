"""Make semantic IDs for a catalog, and for items that are added later.

    semantic_ids/index.parquet, manifest.json   see peso.items.semantic_ids; the manifest also records how the
                                                IDs were made, their quality and their fit
    semantic_ids/codebooks.safetensors          the frozen quantizer
    semantic_ids/encoder.safetensors            the frozen encoder of items
    semantic_ids/contents.safetensors           with head.contents: the content vectors of all items
    semantic_ids/categories.json                for IDs from category paths: the paths of each level, by code
    semantic_ids/refreshed.parquet              with items.refresh: later codes, see peso.items.ids_by_stage

Everything is fitted once, to the items of stage 0 (with ``fit: all``, to all items). Later items get codes
from the frozen quantizer. The code of an existing item never changes, unless ``items.refresh`` is set.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors.numpy import load_file

from peso.config import ItemsConfig
from peso.errors import ConfigError, DataError
from peso.items import quality
from peso.items.category_path import LIMIT, Frozen, category_path_ids, category_tree
from peso.items.codebooks import Fitted, ResidualCodebooks, fillable, fit_balanced_rq_kmeans, fit_rq_kmeans
from peso.items.contents import ENCODER_FILE, extended, known_contents, save_arrays, vectors_beside
from peso.items.ids_by_stage import Changes
from peso.items.placement import CodeAssigner, groups_of
from peso.items.refresh import Refresher, TrainingLog, by_stage
from peso.items.rq_vae import fit_rq_vae
from peso.items.semantic_ids import FORMAT, ITEM_ID, SemanticIds, read_semantic_ids, write_semantic_ids
from peso.items.vectors import MANY, ItemEncoder
from peso.runtime.files import write_json
from peso.runtime.manifest import intact, read_manifest
from peso.runtime.progress import Observer, Silent

CODEBOOKS_FILE = "codebooks.safetensors"
CATEGORIES_FILE = "categories.json"
# New items can be added only if these settings have not changed.
FROZEN_KEYS = (
    "encoder",
    "dimensions",
    "template",
    "max_tokens",
    "behavior",
    "refresh",
    "quantizer",
    "levels",
    "codes",
    "collisions",
    "rq_vae",
)


def tokenize(
    items: pa.Table,
    config: ItemsConfig,
    directory: Path,
    seed: int,
    cache: Path | None = None,
    observer: Observer | None = None,
    first_stage: np.ndarray | None = None,
    sequences: Iterable[np.ndarray] = (),
    contents: bool = False,
    log: TrainingLog | None = None,
) -> dict[str, Any]:
    """Make semantic IDs and write them to an existing empty directory.

    Args:
        items: the item table; the row is the item number.
        seed: the seed of everything random.
        cache: a directory that keeps vectors of text encoders between runs; None to keep none.
        first_stage: int (items,), the stage in which each item first occurs. With ``fit: base`` the codebooks
            are fitted to the items of stage 0; those of stages 1, 2, … then get codes in this order. None if
            all items are in stage 0.
        sequences: with ``items.behavior``, the item rows of each user in the stages to fit to, oldest first
            (:meth:`peso.events.stream.Stream.training_events`). Otherwise unused.
        contents: whether to keep the content vectors (``head.contents``).
        log: with ``items.refresh``, the training events of all stages. Otherwise unused.

    Returns:
        The manifest.

    Raises:
        ConfigError: an encoder cannot be loaded.
        DataError: there are no items, no item has a text or a vector (or no contents to keep), vectors are
            invalid, no two items occur together, or IDs cannot be made from the categories.
    """
    observer = observer or Silent()
    if not len(items):
        raise DataError("an empty catalog has no semantic IDs; give at least one item")
    stages = np.zeros(len(items), int) if first_stage is None else np.asarray(first_stage)
    base = np.ones(len(items), bool) if config.fit == "all" else stages == stages.min()
    if config.quantizer == "category-path":
        rows = np.flatnonzero(base) if contents else None
        return _by_category(items, config, None, None, directory, seed, cache, observer, rows)
    spared = np.zeros(len(items), bool)
    spared[base] = quality.held_out(int(base.sum()), seed)
    rows = np.flatnonzero(base & ~spared)
    encoder, vectors = ItemEncoder.fit(items, rows, config, seed, cache, observer, sequences)
    rows = rows[vectors.known[rows]]
    if not len(rows):
        raise DataError(
            f"none of {int(base.sum())} items has a text or a vector to make its ID from; set data.items to "
            "a product table, set items.vectors, items.index or items.behavior, or use items.quantizer: "
            "category-path"
        )
    size = fillable(config.codes, int(base.sum()), config.levels)
    if size < config.codes:
        observer.note(
            f"{size} codes per level instead of {config.codes}, because {int(base.sum()):,} items cannot "
            "fill more"
        )
    fitted = _fit(vectors.vectors[rows], [size] * config.levels, config, seed, observer)
    codebooks = fitted.codebooks
    wanted = codebooks.nearest(codebooks.latent(vectors.vectors))
    wanted[rows] = fitted.codes
    extra = size if config.collisions == "extra-level" else 0
    assigner = CodeAssigner(codebooks, config.collisions, extra, vectors, wanted)

    codes = np.zeros((len(items), config.levels + bool(extra)), np.int32)
    codes[base] = assigner.place(np.flatnonzero(base), codes[:0])
    done = base.copy()
    item_ids = items[ITEM_ID].to_pylist()
    refresher = Refresher.of(item_ids, config, encoder, assigner, log)
    state = {
        "fit": assigner.measure(rows, wanted[:0]),
        "held_out": _held_out(assigner, np.flatnonzero(spared), wanted[rows]) if spared.any() else None,
        "stages": by_stage(assigner, groups_of(stages, ~base), codes, done, refresher, observer),
    }

    save_arrays(codebooks.arrays(), directory / CODEBOOKS_FILE)
    save_arrays(encoder.arrays(), directory / ENCODER_FILE)
    sizes = (size,) * config.levels + ((extra,) if extra else ())
    kept = known_contents(vectors) if contents else None
    ids = SemanticIds(item_ids, codes, sizes, kept)
    refreshed = {} if refresher is None else refresher.write(directory)
    return _write(ids, items, assigner, config, seed, state, directory, observer, refreshed)


def extend_semantic_ids(
    items: pa.Table,
    config: ItemsConfig,
    source: Path,
    directory: Path,
    cache: Path | None = None,
    observer: Observer | None = None,
    first_stage: np.ndarray | None = None,
    log: TrainingLog | None = None,
) -> dict[str, Any]:
    """Give IDs to the items that were added to the item table since ``source`` was written, and with
    ``items.refresh`` new codes to items that have drifted in the stages since.

    Args:
        items: the whole item table; its first rows are the items of ``source``.
        source: a directory that :func:`tokenize` or this function wrote.
        directory: another directory to write to, existing and empty. It gets all items; existing codes do
            not change.
        cache: a directory that keeps vectors of text encoders between runs; None to keep none.
        first_stage: int (items,), the stage in which each item first occurs. None if all new items are in
            the stage after the last one.
        log: with ``items.refresh``, the training events of all stages. Otherwise unused.

    Returns:
        The manifest.

    Raises:
        ConfigError: the configuration does not match the frozen quantizer.
        DataError: the table does not extend the earlier one, or new vectors have another width.
        WorkspaceError: ``source`` is damaged, or a newer version wrote it.
    """
    observer = observer or Silent()
    old = read_semantic_ids(source)
    manifest = read_manifest(source, FORMAT)
    _require_continues(items, old, config, manifest, source)
    seed = int(manifest["seed"])
    if config.quantizer == "category-path":
        frozen = Frozen(_frozen_tree(source, manifest, items, old), old.codes)
        return _by_category(items, config, frozen, old, directory, seed, cache, observer, earlier=source)
    codebooks = ResidualCodebooks.from_arrays(load_file(intact(source, CODEBOOKS_FILE, manifest)))
    encoder = ItemEncoder.from_arrays(load_file(intact(source, ENCODER_FILE, manifest)))
    vectors = encoder.encode(items, config, cache, observer)
    wanted = codebooks.nearest(codebooks.latent(vectors.vectors))
    extra = old.sizes[-1] if config.collisions == "extra-level" else 0
    assigner = CodeAssigner(codebooks, config.collisions, extra, vectors, wanted)

    codes = np.zeros((len(items), old.levels), np.int32)
    codes[: len(old.codes)] = old.codes
    done = np.arange(len(items)) < len(old.codes)
    state = dict(manifest["fitness"])
    before = state["stages"]
    if first_stage is None:
        number = max([stage["stage"] for stage in before], default=0) + 1
        first_stage = np.full(len(items), number)
    groups = groups_of(np.asarray(first_stage), ~done)
    item_ids = items[ITEM_ID].to_pylist()
    refresher = Refresher.of(
        item_ids, config, encoder, assigner, log, Changes.read(source, manifest), manifest
    )
    state["stages"] = before + by_stage(assigner, groups, codes, done, refresher, observer)

    save_arrays(codebooks.arrays(), directory / CODEBOOKS_FILE)
    save_arrays(encoder.arrays(), directory / ENCODER_FILE)
    ids = SemanticIds(item_ids, codes, old.sizes, extended(old, vectors))
    refreshed = {} if refresher is None else refresher.write(directory)
    return _write(ids, items, assigner, config, seed, state, directory, observer, refreshed)


def _fit(vectors: np.ndarray, sizes: list[int], config: ItemsConfig, seed: int, observer: Observer) -> Fitted:
    if config.quantizer == "rq-kmeans":
        fitted = fit_rq_kmeans(vectors, sizes, seed, observer)
    elif config.quantizer == "balanced-rq-kmeans":
        fitted = fit_balanced_rq_kmeans(vectors, sizes, seed, observer)
    else:
        fitted = fit_rq_vae(vectors, sizes, config.rq_vae, seed, observer)
    observer.end()
    return fitted


def _held_out(assigner: CodeAssigner, rows: np.ndarray, taken: np.ndarray) -> dict[str, Any]:
    """Measure the items that were held out of the fit as if they were new. New items are compared with
    them."""
    if assigner.vectors.has_behavior is None:
        return assigner.measure(rows, taken)
    vectors = assigner.vectors.take(rows).as_new()
    wanted = assigner.codebooks.nearest(assigner.codebooks.latent(vectors.vectors))
    return replace(assigner, vectors=vectors, wanted=wanted).measure(np.arange(len(rows)), taken)


def _by_category(
    items: pa.Table,
    config: ItemsConfig,
    frozen: Frozen | None,
    old: SemanticIds | None,
    directory: Path,
    seed: int,
    cache: Path | None,
    observer: Observer,
    fitted: np.ndarray | None = None,
    earlier: Path | None = None,
) -> dict[str, Any]:
    """Make IDs from category paths, with room for twice as many categories and items. Vectors are used only
    to measure the IDs, and as contents (see :func:`vectors_beside`)."""
    item_ids, paths = items[ITEM_ID].to_pylist(), items["category"].to_pylist()
    if old is not None:
        sizes = old.sizes
    else:
        used = category_path_ids(item_ids, paths).sizes
        sizes = tuple(min(2 * size, LIMIT) for size in used)
    ids = category_path_ids(item_ids, paths, sizes, frozen=frozen)
    done, before = (len(frozen.codes), frozen.tree) if frozen else (0, None)
    write_json(directory / CATEGORIES_FILE, category_tree(paths[done:], ids.codes[done:], before))
    vectors = vectors_beside(items, config, seed, cache, observer, directory, fitted, earlier)
    if fitted is not None:
        ids = replace(ids, contents=known_contents(vectors))
    elif old is not None:
        ids = replace(ids, contents=extended(old, vectors))
    assigner = CodeAssigner(ResidualCodebooks(()), "allow", 0, vectors, ids.codes)
    return _write(ids, items, assigner, config, seed, {"stages": []}, directory, observer)


def lacks_tree(source: Path) -> bool:
    """Whether IDs from category paths were made by an earlier version, which did not store the tree. Then
    only the categories at that time determine the meaning of the codes."""
    manifest = read_manifest(source, FORMAT)
    quantizer = (manifest.get("config") or {}).get("quantizer")
    return quantizer == "category-path" and CATEGORIES_FILE not in manifest["files"]


def _frozen_tree(
    source: Path, manifest: Mapping[str, Any], items: pa.Table, old: SemanticIds
) -> list[list[str]]:
    if CATEGORIES_FILE in manifest["files"]:
        return json.loads(intact(source, CATEGORIES_FILE, manifest).read_text("utf-8"))
    paths = items["category"].slice(0, len(old.codes)).to_pylist()
    if (category_path_ids(old.item_ids, paths, old.sizes).codes != old.codes).any():
        raise DataError(
            f"the categories of items in {source} have changed since their IDs were made by an earlier "
            "version of peso, which did not store them; restore the old categories (`peso ingest --items`)"
        )
    return category_tree(paths, old.codes)


def _require_continues(
    items: pa.Table, old: SemanticIds, config: ItemsConfig, manifest: Mapping[str, Any], source: Path
) -> None:
    made_with = manifest.get("config")
    if made_with is None:
        raise ConfigError(
            f"{source} has an imported index, without codebooks to make codes for new items; ingest "
            "everything into a new workspace"
        )
    now = config.model_dump(mode="json")
    changed = [key for key in FROZEN_KEYS if made_with.get(key) != now.get(key)]
    if changed:
        listed = ", ".join(f"items.{key} ({made_with.get(key)!r} → {now.get(key)!r})" for key in changed)
        raise ConfigError(
            f"settings have changed since the IDs in {source} were made: {listed}; change them back, or "
            "ingest everything into a new workspace, where all IDs are new"
        )
    known = items[ITEM_ID].slice(0, len(old.item_ids)).to_pylist()
    if known != old.item_ids:
        pairs = zip(known, old.item_ids, strict=False)
        at = next((row for row, (given, then) in enumerate(pairs) if given != then), len(known))
        raise DataError(
            f"the item table does not extend that of {source}: row {at} was item {old.item_ids[at]!r}; "
            "rows may only be added at the end"
        )


def _write(
    ids: SemanticIds,
    items: pa.Table,
    assigner: CodeAssigner,
    config: ItemsConfig,
    seed: int,
    state: Mapping[str, Any],
    directory: Path,
    observer: Observer,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure the index, report the results, and write it with its manifest, which also gets ``more``."""
    vectors, known = assigner.vectors.vectors, assigner.vectors.known
    titles = items["title"].to_pylist() if "title" in items.column_names else [None] * len(items)
    books = assigner.codebooks
    measured = {
        "collisions_before": quality.collisions(assigner.wanted),
        **quality.of_codes(ids, titles),
        "reconstruction_error": (
            quality.quantization_error(books, vectors, ids.codes[:, : len(books.sizes)], known)
            if books.sizes
            else None
        ),
        "neighbours": quality.neighbors_kept(vectors[known], ids.codes[known], seed),
        "without_vector": int((~known).sum()),
        "same_vector": int(known.sum() - len(np.unique(vectors[known], axis=0))),
        **quality.of_behavior(assigner.vectors, ids.codes, seed),
    }
    if books.sizes:
        _tell(measured, ids, observer)
    warnings = quality.refit_warnings(state)
    for warning in warnings:
        observer.note(warning)
    content = {
        "made_by": "tokenize",
        "config": config.model_dump(mode="json"),
        "seed": seed,
        "vector_width": int(vectors.shape[1]),
        "collision_rule": _RULES["category-path" if not books.sizes else assigner.rule],
        "quality": measured,
        "fitness": {**state, "warnings": warnings},
        **(more or {}),
    }
    write_semantic_ids(ids, directory, content)
    return read_manifest(directory, FORMAT)


_RULES = {
    "reassign": "reassign: the item nearest to an ID keeps it; the others take the nearest free code of the "
    "last level, or of the level above where a prefix is full",
    "extra-level": "extra-level: the last level numbers the items whose other codes are the same",
    "allow": "allow: items may share an ID",
    "category-path": "category-path: the last level numbers the items of a category",
}


def _tell(measured: Mapping[str, Any], ids: SemanticIds, observer: Observer) -> None:
    without, same = measured["without_vector"], measured["same_vector"]
    before, after = measured["collisions_before"], measured["collisions"]
    items = after["items"]
    for count, told in (
        (without, "have no text or vector and get the codes nearest to the center"),
        (same, "have the same vector as another item, so their IDs are arbitrary"),
    ):
        if count:
            observer.note(f"{'warning: ' * (count > MANY * items)}{count:,} of {items:,} items {told}")
    if before["items_sharing"]:
        observer.note(
            f"{before['items_sharing']:,} of {before['items']:,} items shared their nearest ID with others; "
            f"after resolving collisions, {after['items_sharing']:,} share an ID"
        )
    capacity = math.prod(ids.sizes)
    if after["items"] > capacity:
        observer.note(
            f"there are {after['items']:,} items but only {capacity:,} IDs; set items.levels or items.codes "
            "higher to give each item its own ID"
        )
