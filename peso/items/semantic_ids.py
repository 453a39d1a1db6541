"""Semantic IDs: the code tuple of each item of the catalog, its tokens, and the trie of all code tuples.

The trie consists of compressed sparse arrays in NumPy. It is built once, and a search copies it to its
device. Semantic IDs are stored in these files, or in the ``index.json`` that research code uses:

    semantic_ids/index.parquet   item_id, codes; the row is the item number
    semantic_ids/manifest.json   format version, sizes, the rule for shared IDs, sha256
    semantic_ids/contents.safetensors   the content vectors, if a model uses them
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from peso.errors import DataError, WorkspaceError
from peso.items.names import NONE_RENAMED, ItemNames
from peso.runtime.failures import listed
from peso.runtime.files import read_json_object, write_atomically
from peso.runtime.manifest import intact, read_manifest, write_manifest


@dataclass(frozen=True, eq=False)
class ItemTrie:
    """The trie of all semantic IDs of a catalog, breadth first. Nodes are numbered from 0 within each level.

    Level l has the nodes that are reached by l + 1 codes, in lexicographic order of these codes. So the
    children of a node are next to each other and sorted by code. The nodes of the last level are the leaves,
    one for each distinct semantic ID. Items that share an ID are in one leaf in row order: the item that was
    added to the catalog first comes first.

    Attributes:
        codes: for each level, int32 (nodes,), the code that leads to each node.
        starts: for each level, int32 (nodes of the level above + 1,). The children of node i are the nodes
            ``starts[level][i]`` to ``starts[level][i + 1] - 1`` of this level. The root is above level 0.
        items: int32 (items,), the item rows, grouped by leaf.
        item_starts: int32 (leaves + 1,). Leaf i has the items
            ``items[item_starts[i] : item_starts[i + 1]]``.
        leaf_of: int32 (items,), the leaf of each item row.
    """

    codes: tuple[np.ndarray, ...]
    starts: tuple[np.ndarray, ...]
    items: np.ndarray
    item_starts: np.ndarray
    leaf_of: np.ndarray

    @classmethod
    def build(cls, codes: np.ndarray) -> ItemTrie:
        """Build the trie by sorting the catalog once. The nodes of a level begin where adjacent rows differ.

        Args:
            codes: int (items, levels), not negative.

        Raises:
            DataError: the catalog is empty, there are no levels, or a code is negative.
        """
        if codes.ndim != 2 or 0 in codes.shape:
            raise DataError(f"a trie needs items and levels, but the codes have shape {codes.shape}")
        if codes.min() < 0:
            row = int((codes < 0).any(axis=1).argmax())
            raise DataError(f"item row {row} has a negative code: {codes[row].tolist()}")
        # the sort is stable, so the items of one ID stay in row order
        order = np.lexsort(codes.T[::-1])
        new = np.zeros(len(codes), dtype=bool)  # True where a node of the current level begins
        new[0] = True
        above = np.zeros(1, dtype=np.int64)  # where the nodes of the level above begin; at first the root
        level_codes, level_starts = [], []
        for column in codes.T:
            ordered = column[order]
            new[1:] |= ordered[1:] != ordered[:-1]
            begins = np.flatnonzero(new)
            level_codes.append(ordered[begins].astype(np.int32))
            level_starts.append(_closed(np.searchsorted(begins, above), len(begins)))
            above = begins
        leaf_of = np.empty(len(codes), dtype=np.int32)
        leaf_of[order] = np.cumsum(new, dtype=np.int32) - 1
        return cls(
            tuple(level_codes),
            tuple(level_starts),
            order.astype(np.int32),
            _closed(above, len(codes)),
            leaf_of,
        )

    @property
    def levels(self) -> int:
        return len(self.codes)

    @property
    def nodes(self) -> tuple[int, ...]:
        """The number of nodes of each level."""
        return tuple(len(codes) for codes in self.codes)

    @property
    def leaves(self) -> int:
        """The number of distinct semantic IDs."""
        return len(self.codes[-1])

    @cached_property
    def fanout(self) -> tuple[int, ...]:
        """For each level, the largest number of children of a node of the level above."""
        return tuple(int(np.diff(starts).max()) for starts in self.starts)

    def items_of(self, leaf: int) -> np.ndarray:
        """int32: the rows of the items with this semantic ID, in the order in which they were added."""
        return self.items[self.item_starts[leaf] : self.item_starts[leaf + 1]]

    def parents(self, level: int, nodes: np.ndarray) -> np.ndarray:
        """The numbers, in the level above, of the parents of these nodes. The parent of level 0 is the root,
        0."""
        return np.searchsorted(self.starts[level], nodes, side="right") - 1

    def paths(self, leaves: np.ndarray) -> np.ndarray:
        """int32 (n, levels): the code tuples of these leaves."""
        result = np.empty((len(leaves), self.levels), dtype=np.int32)
        nodes = leaves
        for level in reversed(range(self.levels)):
            result[:, level] = self.codes[level][nodes]
            nodes = self.parents(level, nodes)
        return result


def _closed(starts: np.ndarray, total: int) -> np.ndarray:
    return np.append(starts, total).astype(np.int32)


def token_name(level: int, code: int) -> str:
    """The token of a code: ``token_name(0, 12) == "<a_12>"``. The letter is the level."""
    return f"<{ascii_lowercase[level]}_{code}>"


@dataclass(frozen=True)
class SemanticIds:
    """The semantic IDs of a catalog. Row i belongs to item i of the stream's item table.

    Attributes:
        item_ids: the item ids as they appear in the log; of renamed items, the current names.
        codes: int32 (items, levels), the codes of each item.
        sizes: the number of codes of each level. The semantic vocabulary has a row for each, also for codes
            that are not in use yet, so that new items do not change its size.
        contents: float32 (items, dimensions), the vector of each item's contents from which its ID is made;
            zero for an item without any. None unless a model uses them (``head.contents``).
        names: the names of renamed items. Every name of an item is understood wherever an item is looked up.
    """

    item_ids: list[str]
    codes: np.ndarray
    sizes: tuple[int, ...]
    contents: np.ndarray | None = field(default=None, repr=False, compare=False)
    names: ItemNames = field(default=NONE_RENAMED, repr=False, compare=False)
    _rows: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.codes.shape != (len(self.item_ids), len(self.sizes)):
            raise ValueError(
                f"codes of shape {self.codes.shape} do not match {len(self.item_ids)} items and the sizes "
                f"{self.sizes}"
            )
        if len(self.codes) and (self.codes.min() < 0 or (self.codes.max(axis=0) >= self.sizes).any()):
            raise ValueError("a code is outside the size of its level")
        if self.contents is not None and len(self.contents) != len(self.item_ids):
            raise ValueError(f"{len(self.contents)} content vectors for {len(self.item_ids)} items")
        rows = {item: row for row, item in enumerate(self.item_ids)}
        for name, stored in self.names.stored.items():
            row = rows.get(self.names.current[stored])
            if row is not None:
                rows.setdefault(stored, row)
                rows.setdefault(name, row)
        object.__setattr__(self, "_rows", rows)

    def named(self, names: ItemNames) -> SemanticIds:
        """The same items with other names."""
        if names == self.names:
            return self
        return replace(self, item_ids=[names.now(item) for item in self.stored_ids], names=names)

    @property
    def stored_ids(self) -> list[str]:
        """The ids of the items in the files, which do not change when an item is renamed."""
        return [self.names.in_files(item) for item in self.item_ids] if self.names else self.item_ids

    @property
    def earlier_ids(self) -> dict[str, str]:
        """The current id of each renamed item, by every other id that it has or had."""
        return {name: now for name, row in self._rows.items() if (now := self.item_ids[row]) != name}

    @property
    def levels(self) -> int:
        return len(self.sizes)

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64 (levels,): the number of the first token of each level."""
        return np.concatenate([[0], np.cumsum(self.sizes)[:-1]]).astype(np.int64)

    @cached_property
    def token_numbers(self) -> np.ndarray:
        """int64 (items, levels): the codes of each item as indices into :meth:`tokens`."""
        return self.codes.astype(np.int64) + self.offsets

    @cached_property
    def trie(self) -> ItemTrie:
        return ItemTrie.build(self.codes)

    def fingerprint(self, items: int) -> str:
        """The sha256 of the sizes and of the ids and codes of the first ``items`` rows. Items that are added
        later do not change it."""
        result = hashlib.sha256(json.dumps([list(self.sizes), self.stored_ids[:items]]).encode())
        result.update(np.ascontiguousarray(self.codes[:items], "<i4").tobytes())
        return result.hexdigest()

    @property
    def required_contents(self) -> np.ndarray:
        """``contents``. Raises DataError if there are none."""
        if self.contents is None:
            raise DataError(
                "head.contents needs the items' content vectors, but these semantic IDs were made without "
                "it; make them again with `peso tokenize` before training, or set head.contents=false"
            )
        return self.contents

    def fingerprint_of_contents(self, items: int) -> str:
        """The sha256 of the content vectors of the first ``items`` rows."""
        first = np.ascontiguousarray(self.required_contents[:items], "<f4")
        return hashlib.sha256(first.tobytes()).hexdigest()

    def first(self, items: int) -> SemanticIds:
        """Only the first ``items`` rows."""
        contents = None if self.contents is None else self.contents[:items]
        return SemanticIds(self.item_ids[:items], self.codes[:items], self.sizes, contents, self.names)

    def tokens(self) -> list[str]:
        """All token names, level by level, in the order of the rows of the semantic vocabulary."""
        return [token_name(level, code) for level, size in enumerate(self.sizes) for code in range(size)]

    def __contains__(self, item_id: str) -> bool:
        return item_id in self._rows

    def name(self, item_id: str) -> str:
        """The current name of an item. Raises DataError if it is unknown."""
        return self.item_ids[self.row(item_id)]

    def row(self, item_id: str) -> int:
        try:
            return self._rows[item_id]
        except KeyError:
            raise DataError(f"item {item_id!r} is not in the semantic-ID index") from None

    def rows(self, item_ids: list[str]) -> np.ndarray:
        """int32: the rows of several items.

        Raises:
            DataError: some ids are unknown; the message lists them.
        """
        unknown = [item for item in item_ids if item not in self._rows]
        if unknown:
            raise DataError(
                f"{len(unknown)} of {len(item_ids)} items are not in the semantic-ID index: "
                f"{listed(map(repr, unknown))}"
            )
        return np.array([self._rows[item] for item in item_ids], dtype=np.int32)

    def semantic_id(self, item_id: str) -> list[str]:
        """The item's tokens, e.g. ``["<a_128>", "<b_72>", "<c_95>", "<d_83>"]``."""
        return [token_name(level, int(code)) for level, code in enumerate(self.codes[self.row(item_id)])]


FORMAT = 1
INDEX_FILE, CONTENTS_FILE = "index.parquet", "contents.safetensors"
ITEM_ID = "item_id"
CODES = "codes"
EARLIER = "earlier"  # a key of the manifest: its content before items were added, oldest first
SHARED_IDS = "items with the same ID are in row order: the item that was added first comes first"
# No level has this many codes; a larger number is an error in the file.
MAX_CODES = 65_536

_TOKEN = re.compile(r"<([a-z])_(\d+)>", re.ASCII)


def write_semantic_ids(ids: SemanticIds, directory: Path, manifest: Mapping[str, Any] | None = None) -> None:
    """Write semantic IDs to an existing empty directory. The manifest is written last.

    Args:
        manifest: further contents of the manifest, such as the source of the codes.
    """
    codes = pa.FixedSizeListArray.from_arrays(pa.array(ids.codes.ravel(), pa.int32()), ids.levels)
    table = pa.table({ITEM_ID: pa.array(ids.stored_ids, pa.string()), CODES: codes})
    pq.write_table(table, directory / INDEX_FILE)
    if ids.contents is not None:
        save_file({"contents": np.ascontiguousarray(ids.contents, np.float32)}, directory / CONTENTS_FILE)
    content = {
        "items": len(ids.item_ids),
        "sizes": list(ids.sizes),
        "distinct_ids": len(np.unique(ids.codes, axis=0)),
        "tokens_in_use": sum(len(np.unique(column)) for column in ids.codes.T),
        "shared_ids": SHARED_IDS,
    }
    write_manifest(directory, FORMAT, {**(manifest or {}), **content})


def read_semantic_ids(directory: str | Path) -> SemanticIds:
    """Read the files that :func:`write_semantic_ids` wrote.

    Raises:
        WorkspaceError: a file is missing or damaged, or a newer version wrote it.
    """
    directory = Path(directory)
    manifest = read_manifest(directory, FORMAT)
    path = intact(directory, INDEX_FILE, manifest)
    try:
        table = pq.read_table(path)
        sizes = tuple(int(size) for size in manifest["sizes"])
        codes = table[CODES].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        contents = None
        if CONTENTS_FILE in manifest["files"]:
            path = intact(directory, CONTENTS_FILE, manifest)
            contents = load_file(path)["contents"]
        return SemanticIds(table[ITEM_ID].to_pylist(), codes.reshape(-1, len(sizes)), sizes, contents)
    except (pa.ArrowException, SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise WorkspaceError(
            f"{path} does not match its manifest ({type(error).__name__}: {error}); "
            "restore it from a copy (before a stage is trained, you can also remove that directory and run "
            "`peso tokenize`)"
        ) from None


def read_release_index(path: str | Path, sizes: Sequence[int] | None = None) -> SemanticIds:
    """Read an ``index.json``: ``{item_id: ["<a_12>", "<b_7>", …]}``, items in the order of the file.

    Args:
        sizes: the number of codes of each level. The file does not contain it. By default it is the smallest
            power of two that fits every code, the same for all levels, as in released indices (256 in the
            PESO and MiniOneRec releases).

    Raises:
        DataError: the file is unreadable or has no items, tokens are not ``<letter_number>`` in the order of
            the levels, items have different numbers of codes, or a code is outside ``sizes``.
    """
    path = Path(path)
    index = read_json_object(path)
    if not index:
        raise DataError(f"{path} has no items; an index maps item ids to tokens such as '<a_12>'")
    levels: int | None = None
    rows = []
    for item, tokens in index.items():
        row = _parse(path, item, tokens)
        if levels is None:
            levels, first = len(row), item
        if len(row) != levels:
            raise DataError(
                f"{path}: item {item!r} has {len(row)} codes {tokens}, but item {first!r} has {levels}; "
                "create the index again with the same number of codes for all items"
            )
        rows.append(row)
    codes = np.array(rows, dtype=np.int32)
    if sizes is None:
        sizes = [1 << int(codes.max()).bit_length()] * codes.shape[1]
    if len(sizes) != codes.shape[1]:
        raise DataError(
            f"{path} has {codes.shape[1]} codes per item, but sizes are given for {len(sizes)} levels"
        )
    outside = (codes >= np.asarray(sizes)).any(axis=1)
    if outside.any():
        at = int(outside.argmax())
        raise DataError(
            f"{path}: item {list(index)[at]!r} has codes {codes[at].tolist()} outside the sizes "
            f"{list(sizes)} of the levels; use smaller codes in the index, or ingest everything into a new "
            "workspace (-w)"
        )
    return SemanticIds(list(index), codes, tuple(int(size) for size in sizes))


def write_release_index(ids: SemanticIds, path: str | Path) -> None:
    """Write an ``index.json`` as used by released research code, with items in row order.

    Raises:
        WorkspaceError: the disk is full. No partial output is left.
    """
    index = {
        item: [token_name(level, code) for level, code in enumerate(codes)]
        for item, codes in zip(ids.item_ids, ids.codes.tolist(), strict=True)
    }
    write_atomically(Path(path), json.dumps(index, ensure_ascii=False).encode())


def _parse(path: Path, item: str, tokens: Any) -> list[int]:
    if not isinstance(tokens, list) or not tokens:
        raise DataError(
            f"{path}: item {item!r} has {tokens!r} instead of a list of tokens such as '<a_12>'; "
            "create the index again"
        )
    if len(tokens) > len(ascii_lowercase):
        raise DataError(
            f"{path}: item {item!r} has {len(tokens)} codes; at most {len(ascii_lowercase)} are supported"
        )
    codes = []
    for level, token in enumerate(tokens):
        match = _TOKEN.fullmatch(token) if isinstance(token, str) else None
        if match is None or match[1] != ascii_lowercase[level] or int(match[2]) >= MAX_CODES:
            raise DataError(
                f"{path}: item {item!r} has {token!r} as code {level + 1}; expected "
                f"'<{ascii_lowercase[level]}_N>' with N from 0 to {MAX_CODES - 1}; create the index again"
            )
        codes.append(int(match[2]))
    return codes
