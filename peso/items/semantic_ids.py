"""Semantic IDs: which code tuple each item of the catalog has, the tokens that write it, and the trie of all
code tuples: compressed sparse arrays in NumPy, built once, which a search takes to its device.

On disk, and as the ``index.json`` that research code exchanges:

    semantic_ids/index.parquet   item_id, codes; the row is the item number
    semantic_ids/manifest.json   format, sizes, the rule for shared IDs, sha256
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from peso.errors import DataError, WorkspaceError
from peso.runtime.files import read_json_object, write_atomically
from peso.runtime.manifest import intact, read_manifest, write_manifest


@dataclass(frozen=True, eq=False)
class ItemTrie:
    """All semantic IDs of a catalogue, breadth first: node numbers count from 0 within each level.

    Level l holds the nodes reached by l + 1 codes, in lexicographic order of those codes, so that the
    children of a node are neighbours and sorted by code. The nodes of the last level are the leaves, one per
    distinct semantic ID. Items that share an ID sit in one leaf in row order: the item that entered the
    catalogue first comes first. That is the rule by which they are told apart.

    Attributes:
        codes: per level int32 (nodes,), the code that leads to each node.
        starts: per level int32 (nodes of the level above + 1,): the children of node i are the nodes
            ``starts[level][i]`` to ``starts[level][i + 1] - 1`` of this level. Above level 0 stands the root.
        items: int32 (items,), item rows leaf by leaf.
        item_starts: int32 (leaves + 1,): leaf i holds ``items[item_starts[i] : item_starts[i + 1]]``.
        leaf_of: int32 (items,), the leaf of each item row.
    """

    codes: tuple[np.ndarray, ...]
    starts: tuple[np.ndarray, ...]
    items: np.ndarray
    item_starts: np.ndarray
    leaf_of: np.ndarray

    @classmethod
    def build(cls, codes: np.ndarray) -> ItemTrie:
        """Sort the catalogue once; every level follows from where neighbours differ.

        Args:
            codes: int (items, levels), non-negative.

        Raises:
            DataError: an empty catalogue, no levels, or a negative code.
        """
        if codes.ndim != 2 or 0 in codes.shape:
            raise DataError(f"no trie over codes of shape {codes.shape}: items and levels are needed")
        if codes.min() < 0:
            row = int((codes < 0).any(axis=1).argmax())
            raise DataError(f"item row {row} has a negative code: {codes[row].tolist()}")
        # the sort is stable, so the items of one ID stay in row order
        order = np.lexsort(codes.T[::-1])
        new = np.zeros(len(codes), dtype=bool)  # True where a node of the level at hand begins
        new[0] = True
        above = np.zeros(1, dtype=np.int64)  # where the nodes of the level above begin; first the root
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
        """Number of nodes of each level."""
        return tuple(len(codes) for codes in self.codes)

    @property
    def leaves(self) -> int:
        """Number of distinct semantic IDs."""
        return len(self.codes[-1])

    @cached_property
    def fanout(self) -> tuple[int, ...]:
        """Per level the most children that a node of the level above has."""
        return tuple(int(np.diff(starts).max()) for starts in self.starts)

    def items_of(self, leaf: int) -> np.ndarray:
        """int32 rows of the items with this semantic ID, the one that entered the catalogue first ahead."""
        return self.items[self.item_starts[leaf] : self.item_starts[leaf + 1]]

    def parents(self, level: int, nodes: np.ndarray) -> np.ndarray:
        """Numbers, in the level above, of the parents of these nodes (0, the root, above level 0)."""
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
    """``token_name(0, 12) == "<a_12>"``: the letter is the level."""
    return f"<{ascii_lowercase[level]}_{code}>"


@dataclass(frozen=True)
class SemanticIds:
    """The catalogue as code tuples. Row i belongs to the i-th item of the stream's item table.

    ``item_ids``: the log's own ids; ``codes``: int32 (items, levels); ``sizes``: codes per level, which is
    what the semantic vocabulary is made for (codes not in use yet keep a row, so new items need no resize).
    """

    item_ids: list[str]
    codes: np.ndarray
    sizes: tuple[int, ...]
    _rows: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.codes.shape != (len(self.item_ids), len(self.sizes)):
            raise ValueError(f"codes {self.codes.shape} do not fit {len(self.item_ids)} items, {self.sizes}")
        if len(self.codes) and (self.codes.min() < 0 or (self.codes.max(axis=0) >= self.sizes).any()):
            raise ValueError("a code lies outside its level")
        object.__setattr__(self, "_rows", {item: row for row, item in enumerate(self.item_ids)})

    @property
    def levels(self) -> int:
        return len(self.sizes)

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64 (levels,): number of the first token of each level."""
        return np.concatenate([[0], np.cumsum(self.sizes)[:-1]]).astype(np.int64)

    @cached_property
    def token_numbers(self) -> np.ndarray:
        """int64 (items, levels): each item as numbers into :meth:`tokens`."""
        return self.codes.astype(np.int64) + self.offsets

    @cached_property
    def trie(self) -> ItemTrie:
        return ItemTrie.build(self.codes)

    def fingerprint(self, items: int) -> str:
        """sha256 over the first ``items`` rows, ids and codes, and the sizes: what items added later at the
        end do not change."""
        result = hashlib.sha256(json.dumps([list(self.sizes), self.item_ids[:items]]).encode())
        result.update(np.ascontiguousarray(self.codes[:items], "<i4").tobytes())
        return result.hexdigest()

    def tokens(self) -> list[str]:
        """All token names, level by level: the order of the rows of the semantic vocabulary."""
        return [token_name(level, code) for level, size in enumerate(self.sizes) for code in range(size)]

    def __contains__(self, item_id: str) -> bool:
        return item_id in self._rows

    def row(self, item_id: str) -> int:
        try:
            return self._rows[item_id]
        except KeyError:
            raise DataError(f"item {item_id!r} is not in the semantic-ID index") from None

    def rows(self, item_ids: list[str]) -> np.ndarray:
        """int32 rows of several items. Raises DataError that lists every unknown id."""
        unknown = [item for item in item_ids if item not in self._rows]
        if unknown:
            shown = ", ".join(repr(item) for item in unknown[:5]) + (" …" if len(unknown) > 5 else "")
            raise DataError(
                f"{len(unknown)} of {len(item_ids)} items are not in the semantic-ID index: {shown}"
            )
        return np.array([self._rows[item] for item in item_ids], dtype=np.int32)

    def semantic_id(self, item_id: str) -> list[str]:
        """The item's tokens, e.g. ``["<a_128>", "<b_72>", "<c_95>", "<d_83>"]``."""
        return [token_name(level, int(code)) for level, code in enumerate(self.codes[self.row(item_id)])]


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
