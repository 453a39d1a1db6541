"""Semantic IDs: which code tuple each item of the catalog has, the tokens that write it, and the trie of all
code tuples: compressed sparse arrays in NumPy, built once, which a search takes to its device."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from string import ascii_lowercase

import numpy as np

from peso.errors import DataError


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
