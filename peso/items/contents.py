"""The content vectors of items, kept beside their semantic IDs for models that use them (``head.contents``).

They are the vectors that semantic IDs are made from, without the part of behavior. If IDs come from elsewhere
(an index, category paths), an encoder is fitted for the vectors alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
from safetensors.numpy import load_file, save_file

from peso.config import ItemsConfig
from peso.errors import DataError
from peso.items.semantic_ids import FORMAT, SemanticIds
from peso.items.vectors import ItemEncoder, ItemVectors
from peso.runtime.manifest import intact, read_manifest
from peso.runtime.progress import Observer

ENCODER_FILE = "encoder.safetensors"


def vectors_beside(
    items: pa.Table,
    config: ItemsConfig,
    seed: int,
    cache: Path | None,
    observer: Observer,
    directory: Path,
    fitted: np.ndarray | None = None,
    earlier: Path | None = None,
) -> ItemVectors:
    """The vectors of items whose IDs are not made from these vectors. They measure the IDs, and may be kept
    as contents.

    Args:
        seed: the seed of the encoder.
        cache: a directory that keeps vectors of text encoders between runs; None to keep none.
        directory: the directory to which the encoder is written if the vectors are kept as contents.
        fitted: the rows of the items to fit the encoder to, if the vectors are kept as contents. None: it is
            fitted to all items, because the vectors only measure the IDs.
        earlier: the directory of the IDs that are extended; their encoder is used if it was kept.

    Raises:
        ConfigError: an encoder cannot be loaded.
        DataError: a vector file is invalid.
        WorkspaceError: a file in ``earlier`` is damaged.
    """
    manifest = None if earlier is None else read_manifest(earlier, FORMAT)
    if manifest is not None and earlier is not None and ENCODER_FILE in manifest["files"]:
        encoder = ItemEncoder.from_arrays(load_file(intact(earlier, ENCODER_FILE, manifest)))
        vectors = encoder.encode(items, config, cache, observer)
    else:
        rows = np.arange(len(items)) if fitted is None else fitted
        encoder, vectors = ItemEncoder.fit(items, rows, config, seed, cache, observer)
        if fitted is None:
            return vectors
    save_arrays(encoder.arrays(), directory / ENCODER_FILE)
    return vectors


def known_contents(vectors: ItemVectors) -> np.ndarray:
    """The content vectors. Raises DataError if no item has one."""
    has = vectors.known if vectors.has_contents is None else vectors.has_contents
    if not has.any():
        raise DataError(
            "head.contents needs items with texts or vectors, but no item has one; set data.items to a "
            "product table or items.vectors to files, or set head.contents=false"
        )
    return vectors.contents


def extended(old: SemanticIds, vectors: ItemVectors) -> np.ndarray | None:
    """The content vectors of the earlier IDs, which do not change, followed by those of the new items; None
    if the earlier IDs have none."""
    if old.contents is None:
        return None
    return np.concatenate([old.contents, vectors.contents[len(old.contents) :]])


def save_arrays(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Write named arrays to a safetensors file."""
    # safetensors writes the memory of an array unchanged, so it must be row-major
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)
