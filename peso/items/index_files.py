"""Semantic IDs on disk, and the ``index.json`` that research code exchanges.

semantic_ids/index.parquet   item_id, codes; the row is the item number
semantic_ids/manifest.json   format, sizes, the rule for shared IDs, sha256
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from peso.errors import DataError, WorkspaceError
from peso.items.semantic_ids import SemanticIds, token_name
from peso.runtime.files import read_json_object, write_atomically
from peso.runtime.manifest import intact, read_manifest, write_manifest

FORMAT = 1
INDEX_FILE = "index.parquet"
ITEM_ID = "item_id"
CODES = "codes"
EARLIER = "earlier"  # key of the manifest: what it said before items were added, oldest first
SHARED_IDS = "items of one ID stand in row order: the item that entered the catalogue first comes first"
# A level of so many codes would be a vocabulary of its own; a larger number is a slip in the file.
MAX_CODES = 65_536

_TOKEN = re.compile(r"<([a-z])_(\d+)>", re.ASCII)


def write_semantic_ids(ids: SemanticIds, directory: Path, manifest: Mapping[str, Any] | None = None) -> None:
    """Write semantic IDs into an existing, empty directory. The manifest comes last.

    Args:
        manifest: what else to record (where the codes come from, say).
    """
    codes = pa.FixedSizeListArray.from_arrays(pa.array(ids.codes.ravel(), pa.int32()), ids.levels)
    table = pa.table({ITEM_ID: pa.array(ids.item_ids, pa.string()), CODES: codes})
    pq.write_table(table, directory / INDEX_FILE)
    content = {
        "items": len(ids.item_ids),
        "sizes": list(ids.sizes),
        "distinct_ids": len(np.unique(ids.codes, axis=0)),
        "tokens_in_use": sum(len(np.unique(column)) for column in ids.codes.T),
        "shared_ids": SHARED_IDS,
    }
    write_manifest(directory, FORMAT, {**(manifest or {}), **content})


def read_semantic_ids(directory: str | Path) -> SemanticIds:
    """Read what :func:`write_semantic_ids` wrote.

    Raises:
        WorkspaceError: a missing or damaged file, or one of a newer version.
    """
    directory = Path(directory)
    manifest = read_manifest(directory, FORMAT)
    path = intact(directory, INDEX_FILE, manifest)
    try:
        table = pq.read_table(path)
        sizes = tuple(int(size) for size in manifest["sizes"])
        codes = table[CODES].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return SemanticIds(table[ITEM_ID].to_pylist(), codes.reshape(-1, len(sizes)), sizes)
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise WorkspaceError(
            f"{path} and its manifest do not fit ({type(error).__name__}: {error}); "
            f"remove {directory} and make it again"
        ) from None


def read_release_index(path: str | Path, sizes: Sequence[int] | None = None) -> SemanticIds:
    """Read an ``index.json``: ``{item_id: ["<a_12>", "<b_7>", …]}``, items in the order of the file.

    Args:
        sizes: codes of each level. By default the same for all levels: the smallest power of two that
            holds every code of the file, since the file does not tell and quantisers of released indices
            have one such size for all levels (256 in the PESO and MiniOneRec releases).

    Raises:
        DataError: unreadable file, no items, tokens that are not ``<letter_number>`` in the order of the
            levels, items with different numbers of codes, a code outside ``sizes``.
    """
    path = Path(path)
    index = read_json_object(path)
    if not index:
        raise DataError(f"{path} holds no items; an index maps item ids to tokens such as '<a_12>'")
    levels: int | None = None
    rows = []
    for item, tokens in index.items():
        row = _parse(path, item, tokens)
        if levels is None:
            levels, first = len(row), item
        if len(row) != levels:
            raise DataError(
                f"{path}: item {item!r} has {len(row)} codes {tokens}, but item {first!r} has {levels}; "
                "all items of an index need the same number of codes: make the index again"
            )
        rows.append(row)
    codes = np.array(rows, dtype=np.int32)
    if sizes is None:
        sizes = [1 << int(codes.max()).bit_length()] * codes.shape[1]
    if len(sizes) != codes.shape[1]:
        raise DataError(
            f"{path} has {codes.shape[1]} codes an item, but sizes are given for {len(sizes)} levels"
        )
    outside = (codes >= np.asarray(sizes)).any(axis=1)
    if outside.any():
        at = int(outside.argmax())
        raise DataError(
            f"{path}: item {list(index)[at]!r} has codes {codes[at].tolist()} outside the sizes "
            f"{list(sizes)} of the levels; write the index with smaller codes, or ingest everything into a "
            "new workspace (-w)"
        )
    return SemanticIds(list(index), codes, tuple(int(size) for size in sizes))


def write_release_index(ids: SemanticIds, path: str | Path) -> None:
    """Write the ``index.json`` of released research code, items in row order.

    Raises:
        WorkspaceError: the disk is full; nothing half-written is left.
    """
    index = {
        item: [token_name(level, code) for level, code in enumerate(codes)]
        for item, codes in zip(ids.item_ids, ids.codes.tolist(), strict=True)
    }
    write_atomically(Path(path), json.dumps(index, ensure_ascii=False).encode())


def _parse(path: Path, item: str, tokens: Any) -> list[int]:
    if not isinstance(tokens, list) or not tokens:
        raise DataError(
            f"{path}: item {item!r} has {tokens!r} where a list of tokens such as '<a_12>' belongs; "
            "make the index again"
        )
    if len(tokens) > len(ascii_lowercase):
        raise DataError(
            f"{path}: item {item!r} has {len(tokens)} codes; {len(ascii_lowercase)} are supported"
        )
    codes = []
    for level, token in enumerate(tokens):
        match = _TOKEN.fullmatch(token) if isinstance(token, str) else None
        if match is None or match[1] != ascii_lowercase[level] or int(match[2]) >= MAX_CODES:
            raise DataError(
                f"{path}: item {item!r} has {token!r} as code {level + 1}; expected "
                f"'<{ascii_lowercase[level]}_N>' with N from 0 to {MAX_CODES - 1}: make the index again"
            )
        codes.append(int(match[2]))
    return codes
