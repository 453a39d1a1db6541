"""Semantic IDs: which code tuple each item of the catalogue has, and the tokens that write it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from string import ascii_lowercase

import numpy as np

from peso.errors import DataError
from peso.items.trie import ItemTrie


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
