"""Use the semantic IDs of an index that was made elsewhere, and measure them if there are item vectors.

Such an index has no codebooks, so new items need an updated index.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from peso.config import ItemsConfig
from peso.errors import DataError
from peso.items import quality
from peso.items.contents import extended, known_contents, vectors_beside
from peso.items.semantic_ids import FORMAT, ITEM_ID, SemanticIds, read_semantic_ids, write_semantic_ids
from peso.items.vectors import NAMES, ItemVectors, item_texts
from peso.runtime.manifest import read_manifest
from peso.runtime.progress import Observer, Silent


def adopt(
    items: pa.Table,
    index: SemanticIds,
    source: str,
    config: ItemsConfig,
    directory: Path,
    seed: int,
    cache: Path | None = None,
    observer: Observer | None = None,
    fitted: np.ndarray | None = None,
    earlier: Path | None = None,
) -> dict[str, Any]:
    """Write the IDs that an index has for these items to an existing empty directory.

    If items have texts, or if ``config.vectors`` names files, the vectors are used to measure how well the
    IDs preserve neighbors. Nothing else depends on them, unless they are kept as contents.

    Args:
        items: the item table; the row is the item number. With a column ``names``
            (:data:`peso.items.vectors.NAMES`), the first of an item's ids that the index has counts.
        index: the index. Items that are not in the item table are ignored and counted.
        source: where the index comes from, for the manifest and for messages.
        seed: the seed for measuring the IDs.
        cache: a directory that keeps vectors of text encoders between runs; None to keep none.
        fitted: the rows of the items to fit the encoder of contents to (``head.contents``); None to keep no
            contents.
        earlier: the directory of the IDs that these extend. If those have contents, contents are kept.

    Returns:
        The manifest.

    Raises:
        DataError: items have no ID (the message names them), vector files are invalid, or no item has
            contents to keep.
        ConfigError: an encoder cannot be loaded.
    """
    observer = observer or Silent()
    item_ids = items[ITEM_ID].to_pylist()
    every = items[NAMES].to_pylist() if NAMES in items.column_names else [[item] for item in item_ids]
    names = zip(item_ids, every, strict=True)
    try:
        rows = index.rows([next((name for name in known if name in index), item) for item, known in names])
    except DataError as error:
        raise DataError(
            f"{source}: {error}; add them to the index, or remove items.index to make IDs from the items' "
            "texts"
        ) from None
    old = None if earlier is None else read_semantic_ids(earlier)
    keeps = fitted is not None or (old is not None and old.contents is not None)
    ids, vectors = SemanticIds(item_ids, index.codes[rows], index.sizes), None
    if keeps or config.vectors or any(text is not None for text in item_texts(items, config.template)):
        vectors = vectors_beside(items, config, seed, cache, observer, directory, fitted, earlier)
        if keeps:
            kept = known_contents(vectors) if old is None else extended(old, vectors)
            ids = replace(ids, contents=kept)
    if aside := len({*index.item_ids}.difference(*every)):
        observer.note(f"{source}: {aside:,} items that are not in the log are ignored")
    titles = items["title"].to_pylist() if "title" in items.column_names else [None] * len(items)
    measured = {
        **quality.of_codes(ids, titles),
        **({} if vectors is None else _by_vectors(ids, vectors, seed)),
    }
    write_semantic_ids(ids, directory, {"made_by": "import", "source": source, "quality": measured})
    return read_manifest(directory, FORMAT)


def adopt_more(
    items: pa.Table,
    index: SemanticIds,
    source: str,
    config: ItemsConfig,
    earlier: Path,
    directory: Path,
    cache: Path | None = None,
    observer: Observer | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Do the same as :func:`adopt` for an item table and an index that extend those in the directory
    ``earlier``.

    Raises:
        DataError: see :func:`adopt`; or an earlier item now has another ID or another row.
        WorkspaceError: ``earlier`` is damaged, or a newer version wrote it.
    """
    old = read_semantic_ids(earlier)
    manifest = adopt(items, index, source, config, directory, seed, cache, observer, earlier=earlier)
    new = read_semantic_ids(directory)
    count = len(old.item_ids)
    if new.item_ids[:count] != old.item_ids or new.sizes != old.sizes:
        raise DataError(f"{source} does not extend the IDs in {earlier}; use a new workspace (-w)")
    changed = (new.codes[:count] != old.codes).any(axis=1)
    if changed.any():
        item = old.item_ids[int(changed.argmax())]
        before, now = ("".join(ids.semantic_id(item)) for ids in (old, new))
        raise DataError(
            f"{source}: {int(changed.sum())} items have another ID than before, the first is {item!r} "
            f"({before} → {now}); existing IDs must not change: restore them, or use a new workspace (-w)"
        )
    return manifest


def _by_vectors(ids: SemanticIds, vectors: ItemVectors, seed: int) -> dict[str, Any]:
    """The measures that need vectors."""
    known = vectors.known
    kept = quality.neighbors_kept(vectors.vectors[known], ids.codes[known], seed)
    return {"neighbours": kept, "without_vector": int((~known).sum())}
