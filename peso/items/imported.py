"""Use the semantic IDs of an index that was made elsewhere, and measure them if there are item vectors.

There are no codebooks, so new items need an updated index.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from peso.config import ItemsConfig
from peso.errors import DataError
from peso.items import quality
from peso.items.semantic_ids import FORMAT, ITEM_ID, SemanticIds, read_semantic_ids, write_semantic_ids
from peso.items.vectors import ItemEncoder, item_texts
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
) -> dict[str, Any]:
    """Write the IDs that an index has for these items to an existing empty directory.

    If items have texts, or if ``config.vectors`` names files, the vectors are used to measure how well the
    IDs preserve neighbors. Nothing else depends on them.

    Args:
        items: the item table; the row is the item number.
        index: the index. Items that are not in the item table are ignored and counted.
        source: where the index comes from, for the manifest and for messages.
        config: the configuration of the items.
        directory: the directory to write to.
        seed: the seed for measuring the IDs.
        cache: a directory that keeps vectors of text encoders between runs; None to keep none.
        observer: receives progress and notes.

    Returns:
        The manifest.

    Raises:
        DataError: items have no ID (the message names them), or vector files are invalid.
        ConfigError: an encoder cannot be loaded.
    """
    observer = observer or Silent()
    item_ids = items[ITEM_ID].to_pylist()
    try:
        rows = index.rows(item_ids)
    except DataError as error:
        raise DataError(
            f"{source}: {error}; add them to the index, or remove items.index to make IDs from the items' "
            "texts"
        ) from None
    ids = SemanticIds(item_ids, index.codes[rows], index.sizes)
    if aside := len(index.item_ids) - len(item_ids):
        observer.note(f"{source}: {aside:,} items that are not in the log are ignored")
    titles = items["title"].to_pylist() if "title" in items.column_names else [None] * len(items)
    measured = {
        **quality.of_codes(ids, titles),
        **_by_vectors(items, ids, config, seed, cache, observer),
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
    manifest = adopt(items, index, source, config, directory, seed, cache, observer)
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


def _by_vectors(
    items: pa.Table,
    ids: SemanticIds,
    config: ItemsConfig,
    seed: int,
    cache: Path | None,
    observer: Observer,
) -> dict[str, Any]:
    """The measures that need vectors; empty if no item has a vector."""
    if not config.vectors and not any(text is not None for text in item_texts(items, config.template)):
        return {}
    vectors = ItemEncoder.fit(items, np.arange(len(items)), config, seed, cache, observer)[1]
    known = vectors.known
    kept = quality.neighbours_kept(vectors.vectors[known], ids.codes[known], seed)
    return {"neighbours": kept, "without_vector": int((~known).sum())}
