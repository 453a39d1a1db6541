"""Semantic IDs from category paths: one level for each depth, and a last level that numbers the items of a
leaf.

The numbering of the paths is stored as a tree. New items and corrected categories do not change existing
codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from peso.errors import DataError
from peso.items.semantic_ids import SemanticIds

SEPARATOR = " > "
LIMIT = 1024  # the most codes of a level: each needs a trained vocabulary row; more need a deeper tree


@dataclass(frozen=True)
class Frozen:
    """The codes that are already assigned.

    Attributes:
        tree: for each level, the paths in the order of their codes, each written as ``"Kitchen > Coffee"``.
        codes: int32 (items, levels), the codes of the items that have an ID.
    """

    tree: list[list[str]]
    codes: np.ndarray


def category_path_ids(
    item_ids: Sequence[str],
    categories: Sequence[str | None],
    sizes: Sequence[int] | None = None,
    limit: int = LIMIT,
    frozen: Frozen | None = None,
) -> SemanticIds:
    """Make codes from paths such as ``"Kitchen > Coffee > Travel"``, which gives three levels and a number.

    The code of level l numbers the distinct paths down to depth l + 1 in the whole tree, in the order in
    which they occur in the catalog. The last code numbers the items of a leaf in the order of the catalog. So
    every item has a unique ID, and appended items do not change earlier codes.

    All paths must have the same depth, and no level may have more than ``limit`` codes.

    Args:
        item_ids: the ids of the catalog's items in row order.
        categories: the path of each item, with parts joined by ``" > "``.
        sizes: the number of codes of each level, to leave room for new categories and items. By default it is
            the number of codes in use.
        limit: the largest number of codes of a level.
        frozen: the codes of the first items, which are kept even if their categories have changed.

    Raises:
        DataError: there are no items, an item has no path or a path of a different depth, or a level has too
            many codes.
    """
    if not len(item_ids):
        raise DataError("an empty catalog has no semantic IDs; give at least one item")
    done = len(frozen.codes) if frozen else 0
    paths = [_parts(*row) for row in zip(item_ids[done:], categories[done:], strict=True)]
    depth = len(frozen.tree) if frozen else len(paths[0])
    numbers: list[dict[tuple[str, ...], int]] = [{} for _ in range(depth)]
    filled: dict[tuple[str, ...], int] = {}  # items of each leaf so far
    codes = np.empty((len(item_ids), depth + 1), dtype=np.int32)
    if frozen:
        codes[:done] = frozen.codes
        numbers = [{tuple(path.split(SEPARATOR)): n for n, path in enumerate(level)} for level in frozen.tree]
        counts = np.zeros(len(frozen.tree[-1]), np.int64)
        np.maximum.at(counts, frozen.codes[:, -2], frozen.codes[:, -1] + 1)
        filled = dict(zip(numbers[-1], counts.tolist(), strict=True))
    for row, path in enumerate(paths, start=done):
        if len(path) != depth:
            raise DataError(
                f"item {item_ids[row]!r} has a category path of depth {len(path)} "
                f"({SEPARATOR.join(path)!r}), but item {item_ids[0]!r} has one of depth {depth}; "
                "shorten or extend the paths in the product table to the same depth"
            )
        for level, known in enumerate(numbers):
            codes[row, level] = known.setdefault(path[: level + 1], len(known))
        codes[row, depth] = filled.get(path, 0)
        filled[path] = filled.get(path, 0) + 1

    used = tuple(int(largest) + 1 for largest in codes.max(axis=0))
    allowed = tuple(sizes) if sizes is not None else (limit,) * len(used)
    if len(allowed) != len(used):
        raise DataError(
            f"paths of depth {depth} give {len(used)} levels, but sizes are given for {len(allowed)}"
        )
    for level, (need, most) in enumerate(zip(used, allowed, strict=True)):
        if need > min(most, limit):
            fullest = max(filled, key=filled.__getitem__)
            what = (
                f"items in {SEPARATOR.join(fullest)!r}"
                if level == depth
                else f"categories of depth {level + 1}"
            )
            cure = (
                "give the new items other categories in the product table, or ingest everything into a new "
                "workspace, where there is room for more"
                if frozen
                else "give the items finer or other categories in the product table, or make their IDs from "
                "their texts (items.quantizer: rq-vae)"
            )
            raise DataError(
                f"{need} {what} do not fit into the {min(most, limit)} codes of level {level + 1}; {cure}"
            )
    return SemanticIds(list(item_ids), codes, used if sizes is None else allowed)


def category_tree(
    categories: Sequence[str | None], codes: np.ndarray, before: list[list[str]] | None = None
) -> list[list[str]]:
    """The tree (:class:`Frozen`) of these items in row order, which extends the tree ``before``."""
    tree = [list(level) for level in before] if before else [[] for _ in range(codes.shape[1] - 1)]
    for category, row in zip(categories, codes[:, :-1].tolist(), strict=True):
        path = _parts("", category)
        for level, code in enumerate(row):
            if code == len(tree[level]):
                tree[level].append(SEPARATOR.join(path[: level + 1]))
    return tree


def _parts(item: str, category: str | None) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in category.split(SEPARATOR.strip())) if category else ()
    if not parts or not all(parts):
        raise DataError(
            f"item {item!r} has the category {category!r} instead of a path such as "
            f"'Kitchen{SEPARATOR}Coffee'; give every item a path in the product table "
            "(data.items.columns.category)"
        )
    return parts
