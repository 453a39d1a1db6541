"""Ranked items for histories, with item ids in and out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from peso.decoding.beam import search
from peso.decoding.returning import Returning
from peso.errors import ConfigError, DataError
from peso.items.semantic_ids import SemanticIds
from peso.model.generative import GenerativeModel

MIN_BEAMS = 10  # the published protocol; fewer would make short lists worse than the head of long ones

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
) -> list[list[tuple[str, float]]]:
    """The ``k`` best next items of each history, with their log-probabilities, best first.

    Items that share a semantic ID share its log-probability and come in the order in which they entered the
    catalog; IDs of equal log-probability come in the order of their codes.

    Args:
        histories: item ids of each user, oldest first; may be empty. The last ``window`` are read.
        k: items to return, at most as many as the catalog has. Where the filters leave fewer to a user,
            all of those come back.
        beams: width of the search, at least ``k``; default max(10, k).
        exclude_seen: leave out every item of the history, also those before the window.
        allow: the only item ids that may come back: one collection for all users, or a sequence of one per
            history.
        deny: item ids that may not come back, given like ``allow``.
        batch_size: users computed together, at most. None: 64, on a GPU 256.
        returning: per user where its prompt is kept from one call to the next, ``memory.of(user)`` of a
            :class:`~peso.decoding.returning.PromptMemory`; None: nowhere. Then up to twice ``window`` items
            are read.
        on_progress: called with the number of users done so far.

    Returns:
        Per history ``k`` pairs (item id, log-probability under the model's ``loss_vocabulary``), or as many
        as the filters leave.

    Raises:
        DataError: an unknown item id (told which), or ``k`` larger than the catalog.
        ConfigError: ``k`` below 1, or fewer beams than ``k``.
    """
    if k < 1:
        raise ConfigError(f"k is {k}; at least one item must be asked for")
    if beams is None:
        beams = max(MIN_BEAMS, k)
    if beams < k:
        raise ConfigError(f"{beams} beams cannot give {k} items; use at least k beams, or leave them out")
    ids = model.semantic_ids
    if k > len(ids.item_ids):
        raise DataError(f"k = {k} is more than the {len(ids.item_ids)} items of the catalog; ask for fewer")
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
    # a string is a collection of strings too, and its letters may well be item ids
    if isinstance(items, str):
        raise DataError(f"{what} is a list of item ids, not the single string {items!r}")
    return ids.rows(list(items))


_NONE: frozenset[int] = frozenset()
_Sets = frozenset[int] | list[frozenset[int]] | None


def _sets(ids: SemanticIds, lists: ItemLists | None, users: int, name: str) -> _Sets:
    """Rows of one list for all users, or of one list per user."""
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
