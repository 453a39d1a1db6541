"""A model's predictions for each test case, and their file ``predictions.parquet``.

Each case also has the segments of its user and of its target item, which depend on what was seen before the
stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from peso.errors import DataError
from peso.events.histories import LEFT_OUT, Cases, Part, Stage
from peso.items.names import ItemNames
from peso.items.semantic_ids import SemanticIds

DORMANT = "dormant"  # users seen in an earlier stage, but not in the previous one
CONTINUING = "continuing"  # users seen in the previous stage
NEW = "new"  # users or items never seen before
KNOWN = "known"  # items seen before

USER_SEGMENTS = (DORMANT, CONTINUING, NEW)
ITEM_SEGMENTS = (KNOWN, NEW)


@dataclass(frozen=True)
class CaseLabels:
    """The segments of each case, in the order of ``Stage.cases``.

    ``history_length`` is int32 (n,), the number of the user's items before the target, not limited by the
    window.
    """

    users: list[str]
    user_segment: list[str]
    item_segment: list[str]
    history_length: np.ndarray


def user_segments(users: Sequence[str], last: AbstractSet[str], earlier: AbstractSet[str]) -> list[str]:
    """The segment of each user.

    Args:
        last: users seen in the previous stage.
        earlier: users seen in any stage before the previous one; they may also be in ``last``.

    >>> user_segments(["ann", "bo", "cy"], last={"ann"}, earlier={"ann", "bo"})
    ['continuing', 'dormant', 'new']
    """
    return [CONTINUING if user in last else DORMANT if user in earlier else NEW for user in users]


def item_segments(targets: Iterable[int], known: AbstractSet[int]) -> list[str]:
    """``known`` for targets that any user had before the stage, ``new`` for the others.

    >>> item_segments([3, 4], known={3})
    ['known', 'new']
    """
    return [KNOWN if int(target) in known else NEW for target in targets]


def label_cases(earlier: Iterable[Stage], stage: Stage, part: Part = "test") -> CaseLabels:
    """Label the test or validation cases of a stage by what was seen before it began.

    A user is seen in a stage if the user has at least one event in it, even if the protocol leaves the user
    out for having fewer than three. Events that appear only in a user's ``previous`` list count as earlier.
    In the first stage every user and every item is new.

    Args:
        earlier: all stages before this one, in order.
        stage: the stage whose test cases are labeled.
    """
    seen_before_last: set[str] = set()
    last: set[str] = set()
    known: set[int] = set()
    for past in earlier:
        seen_before_last |= last
        last = {past.users[i] for i in np.flatnonzero(past.current.lengths)}
        seen_before_last |= _with_history(past)
        known.update(np.unique(past.previous.values).tolist(), np.unique(past.current.values).tolist())
    seen_before_last |= _with_history(stage)
    known.update(np.unique(stage.previous.values).tolist())

    cases = stage.cases(part, window=1)
    lengths = (stage.previous.lengths + stage.current.lengths - LEFT_OUT[part])[stage.eligible()]
    return CaseLabels(
        users=cases.users,
        user_segment=user_segments(cases.users, last, seen_before_last),
        item_segment=item_segments(cases.targets, known),
        history_length=lengths.astype(np.int32),
    )


def _with_history(stage: Stage) -> set[str]:
    return {stage.users[i] for i in np.flatnonzero(stage.previous.lengths)}


# The columns of predictions.parquet. A rank is null if the target is not in the list.
USER = "user"
TARGET = "target"
ITEMS = "items"
SCORES = "scores"
RANK_SEMANTIC_ID = "rank_semantic_id"
RANK_ITEM = "rank_item"
TARGET_LOG_PROBABILITY = "target_log_probability"
TARGET_LEVEL_LOG_PROBABILITIES = "target_level_log_probabilities"
USER_SEGMENT = "user_segment"
ITEM_SEGMENT = "item_segment"
HISTORY_LENGTH = "history_length"

SCHEMA = pa.schema(
    [
        pa.field(USER, pa.string(), nullable=False),
        pa.field(TARGET, pa.string(), nullable=False),
        pa.field(ITEMS, pa.list_(pa.string()), nullable=False),
        pa.field(SCORES, pa.list_(pa.float32()), nullable=False),
        pa.field(RANK_SEMANTIC_ID, pa.int32()),
        pa.field(RANK_ITEM, pa.int32()),
        pa.field(TARGET_LOG_PROBABILITY, pa.float32(), nullable=False),
        pa.field(USER_SEGMENT, pa.string(), nullable=False),
        pa.field(ITEM_SEGMENT, pa.string(), nullable=False),
        pa.field(HISTORY_LENGTH, pa.int32(), nullable=False),
        pa.field(TARGET_LEVEL_LOG_PROBABILITIES, pa.list_(pa.float32())),
    ]
)
LATER_COLUMNS = (TARGET_LEVEL_LOG_PROBABILITIES,)  # missing from older files
DEPTH = b"peso.depth"  # a key of the Parquet metadata
UNRANKED = 0  # in memory, the rank of a target that is not in the list


@dataclass(frozen=True, eq=False)
class Predictions:
    """One row per test case of one stage; each user has one case.

    Attributes:
        users, targets: the user of each case and the item that came next.
        items: for each case the ranked item ids, best first. Items that share a semantic ID are next to each
            other, so a list may have more than ``depth`` items.
        scores: for each case float32 (items of the list,), the score of each item's semantic ID.
        rank_semantic_id: int32 (n,), the rank (from 1) of the target's semantic ID among the distinct
            semantic IDs of the list, or UNRANKED. Items that share an ID count as one (the paper's protocol).
        rank_item: int32 (n,), the rank (from 1) of the target item itself, or UNRANKED.
        target_log_probability: float32 (n,), the natural logarithm of the target's probability.
        user_segment, item_segment: the segment of each case's user and target, one of ``USER_SEGMENTS`` and
            ``ITEM_SEGMENTS``.
        history_length: int32 (n,), the number of the user's items before the target, not limited by the
            window.
        depth: the number of semantic IDs that were requested per case; metrics beyond it cannot be computed.
            A list is shorter only if filters or a small catalog leave fewer.
        target_level_log_probabilities: float32 (n, levels), the log-probability of each code of the target.
            Their sum is ``target_log_probability`` unless the model also has an item head. None if the
            answers were not generated level by level (baselines) or if an older version wrote the file.
    """

    users: list[str]
    targets: list[str]
    items: list[list[str]]
    scores: list[np.ndarray]
    rank_semantic_id: np.ndarray
    rank_item: np.ndarray
    target_log_probability: np.ndarray
    user_segment: list[str]
    item_segment: list[str]
    history_length: np.ndarray
    depth: int
    target_level_log_probabilities: np.ndarray | None = None

    def __post_init__(self) -> None:
        lengths = {name: len(column) for name, column in self._columns().items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the columns differ in length: {lengths}")
        if any(len(items) != len(scores) for items, scores in zip(self.items, self.scores, strict=True)):
            raise ValueError("a list of items and its scores differ in length")

    def __len__(self) -> int:
        return len(self.users)

    def take(self, rows: Sequence[int] | np.ndarray) -> Predictions:
        """The cases with these row numbers, in this order."""
        columns: dict[str, Any] = {
            name: column[rows] if isinstance(column, np.ndarray) else [column[r] for r in rows]
            for name, column in self._columns().items()
        }
        return Predictions(**columns, depth=self.depth)

    def named(self, names: ItemNames) -> Predictions:
        """The same predictions with the current names of renamed items."""
        if not names:
            return self
        items = [[names.now(item) for item in listed] for listed in self.items]
        return replace(self, targets=[names.now(item) for item in self.targets], items=items)

    def _columns(self) -> dict[str, Any]:
        """The attributes that have one row per case, by name."""
        columns = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "depth"}
        return {name: column for name, column in columns.items() if column is not None}


def semantic_id_ranks(leaves: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The rank (from 1) of each target among the ranked semantic IDs, or UNRANKED.

    Args:
        leaves: int (n, beams), the leaves found for each case, distinct, best first, padded with -1.
        targets: int (n,), the leaf of each target.

    Returns: int32 (n,).

    >>> semantic_id_ranks(np.array([[7, 3, 5], [7, 3, -1]]), np.array([3, 4])).tolist()
    [2, 0]
    """
    found = leaves == targets[:, None]  # (n, beams)
    return np.where(found.any(axis=1), found.argmax(axis=1) + 1, UNRANKED).astype(np.int32)


def ranked_items(leaves: np.ndarray, items_of: Callable[[int], np.ndarray]) -> list[np.ndarray]:
    """Replace each case's ranked semantic IDs by the items that have them.

    Args:
        leaves: int (n, beams), the leaves found for each case, best first, padded with -1.
        items_of: a function that returns the items of a leaf in their fixed order (``ItemTrie.items_of``).

    >>> items_of = {0: [10], 1: [11, 12]}.__getitem__
    >>> [case.tolist() for case in ranked_items(np.array([[1, 0], [0, -1]]), items_of)]
    [[11, 12, 10], [10]]
    """
    none = np.empty(0, dtype=np.int32)
    return [np.concatenate([none, *(items_of(leaf) for leaf in row if leaf >= 0)]) for row in leaves]


def item_ranks(lists: Sequence[np.ndarray], targets: np.ndarray) -> np.ndarray:
    """The rank (from 1) of each target item in its list, or UNRANKED. Returns int32 (n,).

    >>> item_ranks([np.array([11, 12, 10]), np.array([10])], np.array([10, 11])).tolist()
    [3, 0]
    """
    ranks = np.full(len(lists), UNRANKED, dtype=np.int32)
    for case, (items, target) in enumerate(zip(lists, targets, strict=True)):
        places = np.flatnonzero(items == target)
        if len(places):
            ranks[case] = places[0] + 1
    return ranks


def make_predictions(
    cases: Cases,
    labels: CaseLabels,
    leaves: np.ndarray,
    scores: np.ndarray,
    target_log_probability: np.ndarray,
    semantic_ids: SemanticIds,
    target_level_log_probabilities: np.ndarray | None = None,
    *,
    leave_out: Sequence[np.ndarray] | None = None,
) -> Predictions:
    """Combine the result of a beam search with the labels of the cases. Items have their stored ids.

    Args:
        labels: the segments of the cases.
        leaves: int (n, depth), the semantic IDs found for each case, best first, padded with -1.
        scores: float (n, depth), the score of each semantic ID.
        target_log_probability: float (n,), the log-probability of each target under the same model.
        semantic_ids: the index that ``leaves`` refers to.
        target_level_log_probabilities: float (n, levels), the log-probability of each code of the target, if
            the model has levels.
        leave_out: for each case, the rows of items that must not be listed. A semantic ID that such an item
            shares with others is still listed.

    Raises:
        ValueError: the arguments do not belong to the same cases.
    """
    if cases.users != labels.users:
        raise ValueError("the labels belong to different cases")
    if leaves.shape != scores.shape or len(leaves) != len(cases):
        raise ValueError(f"{len(cases)} cases do not match leaves {leaves.shape} and scores {scores.shape}")
    trie, names = semantic_ids.trie, semantic_ids.stored_ids
    lists = ranked_items(leaves, trie.items_of)
    ranked_scores = []
    for row, row_scores in zip(leaves, scores.astype(np.float32), strict=True):
        valid = row >= 0
        shared_by = trie.item_starts[row[valid] + 1] - trie.item_starts[row[valid]]
        ranked_scores.append(np.repeat(row_scores[valid], shared_by))
    if leave_out is not None:
        listed = [~np.isin(items, out) for items, out in zip(lists, leave_out, strict=True)]
        lists = [items[kept] for items, kept in zip(lists, listed, strict=True)]
        ranked_scores = [one[kept] for one, kept in zip(ranked_scores, listed, strict=True)]
    return Predictions(
        users=cases.users,
        targets=[names[target] for target in cases.targets],
        items=[[names[item] for item in items] for items in lists],
        scores=ranked_scores,
        rank_semantic_id=semantic_id_ranks(leaves, trie.leaf_of[cases.targets]),
        rank_item=item_ranks(lists, cases.targets),
        target_log_probability=target_log_probability.astype(np.float32),
        user_segment=labels.user_segment,
        item_segment=labels.item_segment,
        history_length=labels.history_length,
        depth=leaves.shape[1],
        target_level_log_probabilities=(
            None
            if target_level_log_probabilities is None
            else target_level_log_probabilities.astype(np.float32)
        ),
    )


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Write ``predictions.parquet``; ``depth`` is stored in the file's metadata."""
    offsets = np.zeros(len(predictions) + 1, dtype=np.int32)
    np.cumsum([len(items) for items in predictions.items], out=offsets[1:])
    flat_items = [item for items in predictions.items for item in items]
    flat_scores = np.concatenate([np.empty(0, dtype=np.float32), *predictions.scores])
    columns = {
        USER: predictions.users,
        TARGET: predictions.targets,
        ITEMS: pa.ListArray.from_arrays(offsets, pa.array(flat_items, pa.string())),
        SCORES: pa.ListArray.from_arrays(offsets, pa.array(flat_scores, pa.float32())),
        RANK_SEMANTIC_ID: _nullable(predictions.rank_semantic_id),
        RANK_ITEM: _nullable(predictions.rank_item),
        TARGET_LOG_PROBABILITY: predictions.target_log_probability,
        USER_SEGMENT: predictions.user_segment,
        ITEM_SEGMENT: predictions.item_segment,
        HISTORY_LENGTH: predictions.history_length,
        TARGET_LEVEL_LOG_PROBABILITIES: _rows(predictions.target_level_log_probabilities, len(predictions)),
    }
    schema = SCHEMA.with_metadata({DEPTH: str(predictions.depth)})
    pq.write_table(pa.table(columns, schema=schema), path)


def read_predictions(path: Path) -> Predictions:
    """Read what :func:`write_predictions` wrote.

    Raises:
        DataError: the file is missing, unreadable or in another format (the message lists the missing
            columns).
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path} cannot be read as predictions: {error}; evaluate the stage again") from None
    missing = [name for name in SCHEMA.names if name not in (*table.column_names, *LATER_COLUMNS)]
    depth = (table.schema.metadata or {}).get(DEPTH)
    if missing or depth is None:
        what = f"columns {', '.join(missing)}" if missing else f"metadata {DEPTH.decode()}"
        raise DataError(f"{path} is not a file of predictions: {what} missing; evaluate the stage again")
    column = {
        name: table.column(name).combine_chunks() for name in SCHEMA.names if name in table.column_names
    }
    ends = column[ITEMS].offsets.to_numpy()
    flat_items = column[ITEMS].values.to_pylist()
    flat_scores = column[SCORES].values.to_numpy()
    bounds = list(pairwise(ends))
    return Predictions(
        users=column[USER].to_pylist(),
        targets=column[TARGET].to_pylist(),
        items=[flat_items[begin:end] for begin, end in bounds],
        scores=[flat_scores[begin:end] for begin, end in bounds],
        rank_semantic_id=column[RANK_SEMANTIC_ID].fill_null(UNRANKED).to_numpy(),
        rank_item=column[RANK_ITEM].fill_null(UNRANKED).to_numpy(),
        target_log_probability=column[TARGET_LOG_PROBABILITY].to_numpy(),
        user_segment=column[USER_SEGMENT].to_pylist(),
        item_segment=column[ITEM_SEGMENT].to_pylist(),
        history_length=column[HISTORY_LENGTH].to_numpy(),
        depth=int(depth),
        target_level_log_probabilities=_matrix(column.get(TARGET_LEVEL_LOG_PROBABILITIES)),
    )


def _rows(matrix: np.ndarray | None, count: int) -> pa.Array:
    """A matrix (count, width) as a column of lists; a column of nulls if it is None."""
    kind = pa.list_(pa.float32())
    if matrix is None:
        return pa.nulls(count, kind)
    ends = np.arange(count + 1, dtype=np.int32) * np.int32(matrix.shape[1])
    return pa.ListArray.from_arrays(ends, pa.array(matrix.ravel(), pa.float32()))


def _matrix(rows: pa.Array | None) -> np.ndarray | None:
    """The matrix that :func:`_rows` wrote; None if the column is missing or has nulls."""
    if rows is None or rows.null_count or not len(rows):
        return None
    return rows.flatten().to_numpy().reshape(len(rows), -1)


def _nullable(ranks: np.ndarray) -> pa.Array:
    return pa.array(ranks, pa.int32(), mask=ranks == UNRANKED)
