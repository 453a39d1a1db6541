"""Rank items for histories that are given as item ids."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from peso.decoding.beam import search
from peso.decoding.returning import Returning
from peso.errors import ConfigError, DataError
from peso.items.semantic_ids import SemanticIds
from peso.model.generative import GenerativeModel

MIN_BEAMS = 10  # as in the paper; with fewer, a short list would be worse than the start of a long one

ItemLists = Collection[str] | Sequence[Collection[str]]


def beam_search(
    model: GenerativeModel,
    histories: Sequence[Sequence[str]],
    k: int = 10,
    *,
    beams: int | None = None,
    exclude_seen: bool = False,
    allow: ItemLists | None = None,
    deny: ItemLists | None = None,
    batch_size: int | None = None,
    returning: Sequence[Returning | None] | None = None,
    on_progress: Callable[[int], None] | None = None,
    ids: SemanticIds | None = None,
) -> list[list[tuple[str, float]]]:
    """The ``k`` best next items of each history with their log-probabilities, best first.

    Items that share a semantic ID have the same log-probability and are in the order in which they were added
    to the catalog. IDs with equal log-probabilities are in the order of their codes.

    Args:
        model: the model.
        histories: for each user, the item ids of the history, oldest first. It may be empty; the last
            ``window`` items are used.
        k: the number of items to return, at most the size of the catalog. If the filters leave fewer items
            for a user, all of those are returned.
        beams: the width of the search, at least ``k``; by default max(10, k).
        exclude_seen: whether to leave out every item of the history, including those before the window.
        allow: the only item ids that may be returned: one collection for all users, or a sequence with one
            collection for each history.
        deny: item ids that must not be returned, in the same form as ``allow``.
        batch_size: the largest number of users in a batch. By default 64, or 256 on a GPU.
        returning: for each user, where the prompt is kept between calls (``memory.of(user)`` of a
            :class:`~peso.decoding.returning.PromptMemory`), or None. With it, up to twice ``window`` items
            are used.
        on_progress: called with the number of users done so far.
        ids: the model's semantic IDs, with the current names of items that were renamed since it was loaded.

    Returns:
        For each history, ``k`` pairs (item id, log-probability under the model's ``loss_vocabulary``), or as
        many as the filters leave.

    Raises:
        DataError: an item id is unknown (the message names it), or ``k`` is larger than the catalog.
        ConfigError: ``k`` is less than 1, or there are fewer beams than ``k``.
    """
    if k < 1:
        raise ConfigError(f"k is {k}, but must be at least 1")
    if beams is None:
        beams = max(MIN_BEAMS, k)
    if beams < k:
        raise ConfigError(f"{beams} beams cannot give {k} items; use at least {k} beams, or the default")
    ids = model.semantic_ids if ids is None else ids
    if k > len(ids.item_ids):
        raise DataError(f"k = {k} is more than the {len(ids.item_ids)} items of the catalog; use a smaller k")
    rows = [_rows(ids, history, "a history") for history in histories]
    users = range(len(rows))
    allowed = _sets(ids, allow, len(rows), "allow")
    denied = _sets(ids, deny, len(rows), "deny")
    if isinstance(allowed, frozenset) and isinstance(denied, frozenset):
        allowed, denied = allowed - denied, None
    seen = [frozenset(history.tolist()) if exclude_seen else _NONE for history in rows]
    out = [seen[user] | (_of(denied, user) or _NONE) for user in users]

    found = search(
        model,
        rows,
        beams=beams,
        batch_size=batch_size,
        exclude=[_array(o) for o in out] if any(out) else None,
        allow=_arrays(allowed),
        returning=returning,
        on_progress=on_progress,
    )
    result = []
    for user, (leaves, scores) in enumerate(zip(found.leaves, found.scores.tolist(), strict=True)):
        only, ranked = _of(allowed, user), []
        for leaf, score in zip(leaves[leaves >= 0], scores, strict=False):
            for row in ids.trie.items_of(leaf).tolist():
                if row not in out[user] and (only is None or row in only):
                    ranked.append((ids.item_ids[row], score))
        result.append(ranked[:k])
    return result


def _rows(ids: SemanticIds, items: Collection[str], what: str) -> np.ndarray:
    # a string is also a collection of strings, and its letters could be item ids
    if isinstance(items, str):
        raise DataError(f"{what} must be a list of item ids, not the single string {items!r}")
    return ids.rows(list(items))


_NONE: frozenset[int] = frozenset()
_Sets = frozenset[int] | list[frozenset[int]] | None


def _sets(ids: SemanticIds, lists: ItemLists | None, users: int, name: str) -> _Sets:
    """The rows of one list for all users, or of one list per user."""
    if lists is None:
        return None
    if isinstance(lists, str) or all(isinstance(entry, str) for entry in lists):
        return frozenset(_rows(ids, lists, name).tolist())  # type: ignore[arg-type]
    if len(lists) != users:
        raise DataError(f"{name} has {len(lists)} lists for {users} histories")
    return [frozenset(_rows(ids, entry, f"an entry of {name}").tolist()) for entry in lists]


def _of(sets: _Sets, user: int) -> frozenset[int] | None:
    return sets[user] if isinstance(sets, list) else sets


def _arrays(sets: _Sets) -> np.ndarray | list[np.ndarray] | None:
    if isinstance(sets, list):
        return [_array(rows) for rows in sets]
    return None if sets is None else _array(sets)


def _array(rows: frozenset[int]) -> np.ndarray:
    return np.array(sorted(rows), dtype=np.int64)
