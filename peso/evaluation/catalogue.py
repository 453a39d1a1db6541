"""Item and user attributes, the statistics of recommended lists, and ways to split the test cases.

The attributes are how often each item was seen, its codes and its columns. The statistics measure the
variety, novelty and popularity of the lists, whether or not they contain the right item. A list is a row of
item numbers, best first, padded with -1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from peso.errors import ConfigError
from peso.evaluation.predictions import ITEM_SEGMENTS, USER_SEGMENTS, Predictions
from peso.events.histories import Cases
from peso.events.stream import Stream
from peso.items.semantic_ids import SemanticIds

WINDOW = 20  # items of a history that a report may show


@dataclass(frozen=True, eq=False)
class Catalogue:
    """Item and user attributes. Items are in the order of the stream's item table.

    Attributes:
        item_ids: the item ids as they appear in the log.
        seen: for each stage, int64 (items known at that stage,): the number of events of each item that the
            stage's model may have learned from, including earlier stages. Events that the stage holds out
            for validation and testing are not counted.
        codes: int32 (items, levels), the semantic ID of each item.
        item_columns: for each column of the item table (title, category, …), one value per item; None where
            the value is unknown.
        user_columns: for each column of the user table, the value of each user that has one.
        cases: a function from a stage to its test cases with their histories. They are read when the function
            is called.
    """

    item_ids: Sequence[str]
    seen: Mapping[int, np.ndarray]
    codes: np.ndarray
    item_columns: Mapping[str, Sequence[str | None]] = field(default_factory=dict)
    user_columns: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    cases: Callable[[int], Cases] | None = None

    @classmethod
    def of(
        cls,
        stream: Stream,
        semantic_ids: SemanticIds,
        user_columns: Mapping[str, Mapping[str, str]],
    ) -> Catalogue:
        """Build the catalog of a stream and its index, for the stages whose items all have semantic IDs."""
        seen, before = {}, np.zeros(len(stream.item_ids), dtype=np.int64)
        for number in range(stream.stages):
            if stream.items_known(number) > len(semantic_ids.item_ids):
                break
            stage = stream.stage(number)
            if number == 0:  # events from before the stream
                before += np.bincount(stage.previous.values, minlength=len(before))
            learned = np.concatenate(
                [np.empty(0, dtype=np.int64), *(targets for _, targets in stage.trained())]
            ).astype(np.int64)
            now = before + np.bincount(learned, minlength=len(before))
            seen[number] = now[: stream.items_known(number)]
            before += np.bincount(stage.current.values, minlength=len(before))

        def cases(stage: int) -> Cases:
            return stream.stage(stage).test_cases(WINDOW)

        columns = {
            name: stream.items[name].to_pylist() for name in stream.items.column_names if name != "item_id"
        }
        return cls(semantic_ids.item_ids, seen, semantic_ids.codes, columns, user_columns, cases)

    @cached_property
    def rows(self) -> dict[str, int]:
        """The row number of each item id."""
        return {item: row for row, item in enumerate(self.item_ids)}

    def require_column(self, name: str) -> None:
        """Check that the item table or the user table has this column.

        Raises:
            ConfigError: neither table has the column. The message lists the columns that they have.
        """
        known = [*self.item_columns, *self.user_columns]
        if name not in known:
            raise ConfigError(
                f"segment {name!r}: neither the item table nor the user table has this column; "
                f"they have {', '.join(known) or 'none'}"
            )

    def percentiles(self, stage: int) -> np.ndarray:
        """float64 (items known,): for each item, the share of items that were seen less often at this stage.
        Ties count half.

        >>> catalogue = Catalogue([], {1: np.array([0, 5, 5, 9])}, np.zeros((4, 1)))
        >>> catalogue.percentiles(1).tolist()
        [0.125, 0.5, 0.5, 0.875]
        """
        counts = self.seen[stage]
        ordered = np.sort(counts)
        below, up_to = (np.searchsorted(ordered, counts, side) for side in ("left", "right"))
        return (below + up_to) / (2 * len(counts))

    def popularity_thirds(self, stage: int) -> np.ndarray:
        """int (items known,): 0 for the most popular items, which together account for a third of the events
        seen so far; 1 for the next third; 2 for all other items, including those never seen.

        >>> Catalogue([], {0: np.array([1, 6, 0, 2, 2, 1])}, np.zeros((6, 1))).popularity_thirds(0).tolist()
        [2, 0, 2, 1, 2, 2]
        """
        counts = self.seen[stage]
        order = np.argsort(-counts, kind="stable")
        before = np.cumsum(counts[order]) - counts[order]  # events of all more popular items
        thirds = np.empty(len(counts), dtype=np.int64)
        thirds[order] = np.minimum(3 * before // max(1, counts.sum()), 2)
        thirds[counts == 0] = 2
        return thirds


def item_rows(lists: Sequence[Sequence[str]], rows: dict[str, int], k: int) -> np.ndarray:
    """The row numbers of the first k items of each list: int64 (n, k), padded with -1.

    >>> item_rows([["b", "a"], ["a"]], {"a": 0, "b": 1}, k=2).tolist()
    [[1, 0], [0, -1]]
    """
    result = np.full((len(lists), k), -1, dtype=np.int64)
    for row, items in zip(result, lists, strict=True):
        first = items[:k]
        row[: len(first)] = [rows[item] for item in first]
    return result


def coverage(lists: np.ndarray, items: int) -> float:
    """Catalog coverage: the share of the catalog that appears in at least one list (Ge et al. 2010).

    >>> coverage(np.array([[0, 1], [1, -1]]), items=4)
    0.5
    """
    return len(np.unique(lists[lists >= 0])) / items


def gini(lists: np.ndarray, items: int) -> float:
    """Gini index of how often each item of the catalog is listed: 0 if all items are listed equally often,
    near 1 if only one item is listed, NaN if none is.

        G = Σ_i (2 i − n − 1) e_(i) / (n Σ_i e_i)        e_(1) ≤ … ≤ e_(n): how often each item is listed

    >>> gini(np.array([[0, 1], [2, 3]]), items=4), gini(np.array([[0], [0]]), items=4)
    (0.0, 0.75)
    """
    times = np.sort(np.bincount(lists[lists >= 0], minlength=items))
    place = np.arange(1, items + 1)
    if not times.sum():
        return float("nan")
    return float((2 * place - items - 1) @ times / (items * times.sum()))


def novelty(lists: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Mean self-information of a list's items, in bits (Zhou et al. 2010): − log2 p_i, where p_i is the
    share of item i in the events seen so far, with add-one smoothing.

    Args:
        lists: int (n, k), item numbers padded with -1.
        seen: int (items,), how often each item was seen.

    Returns: float64 (n,), nan for an empty list.

    >>> novelty(np.array([[0, 1], [0, -1]]), seen=np.array([2, 0])).round(3).tolist()
    [1.208, 0.415]
    """
    surprise = -np.log2((seen + 1) / (seen.sum() + len(seen)))
    return _mean_of_lists(surprise, lists)


def popularity_percentile(lists: np.ndarray, percentiles: np.ndarray) -> np.ndarray:
    """Mean popularity percentile of a list's items: 1 for the most popular item, 0.5 for an average one.

    Args:
        lists: int (n, k), item numbers padded with -1.
        percentiles: float (items,), see :meth:`Catalogue.percentiles`.

    Returns: float64 (n,), nan for an empty list.

    >>> popularity_percentile(np.array([[0, 2]]), np.array([0.9, 0.5, 0.1])).tolist()
    [0.5]
    """
    return _mean_of_lists(percentiles, lists)


def prefix_diversity(lists: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Mean distance between two items of a list, 1 − (length of their common ID prefix) / levels. This is
    intra-list diversity (Ziegler et al. 2005) with the semantic ID as the taxonomy.

    Args:
        lists: int (n, k), item numbers padded with -1.
        codes: int (items, levels), the semantic ID of each item.

    Returns: float64 (n,), nan for a list of fewer than two items.

    >>> codes = np.array([[0, 0], [0, 1], [5, 1]])
    >>> prefix_diversity(np.array([[0, 1, -1], [0, 1, 2]]), codes).tolist()
    [0.5, 0.8333333333333334]
    """
    there = lists >= 0  # (n, k)
    distance, pairs = np.zeros(len(lists)), np.zeros(len(lists))
    for one in range(lists.shape[1]):
        for other in range(one):
            both = there[:, one] & there[:, other]
            same = codes[lists[:, one]] == codes[lists[:, other]]  # (n, levels)
            shared = np.cumprod(same, axis=1).sum(axis=1)
            distance += both * (1 - shared / codes.shape[1])
            pairs += both
    return np.divide(distance, pairs, out=np.full(len(lists), np.nan), where=pairs > 0)


@dataclass(frozen=True, eq=False)
class ListFigures:
    """Statistics of the lists of one stage. Each is computed by the function of the same name. Arrays are
    float64 (cases,)."""

    coverage: float
    gini: float
    novelty: np.ndarray
    popularity_percentile: np.ndarray
    prefix_diversity: np.ndarray

    def mean(self, name: str) -> float:
        """A statistic as one number: the mean over the cases, without empty lists, if it has one per case."""
        values = np.atleast_1d(getattr(self, name))
        values = values[~np.isnan(values)]
        return float(values.mean()) if len(values) else float("nan")


def list_figures(predictions: Predictions, catalogue: Catalogue, stage: int, k: int) -> ListFigures:
    """Compute the statistics of one stage from the first k items of each list.

    Coverage and the Gini index refer to the items known at the stage.
    """
    lists = item_rows(predictions.items, catalogue.rows, k)
    seen = catalogue.seen[stage]
    return ListFigures(
        coverage=coverage(lists, len(seen)),
        gini=gini(lists, len(seen)),
        novelty=novelty(lists, seen),
        popularity_percentile=popularity_percentile(lists, catalogue.percentiles(stage)),
        prefix_diversity=prefix_diversity(lists, catalogue.codes),
    )


def _mean_of_lists(of_item: np.ndarray, lists: np.ndarray) -> np.ndarray:
    there = lists >= 0
    total = np.where(there, of_item[lists], 0).sum(axis=1)
    return np.divide(total, there.sum(axis=1), out=np.full(len(lists), np.nan), where=there.any(axis=1))


LONG_HISTORY = 10  # half of the usual window
MOST_VALUES = 8  # values of a column that get their own group
POPULARITY = ("head", "middle", "tail")
HISTORIES = (f"up to {LONG_HISTORY} items", f"more than {LONG_HISTORY}")
ACTIVITY = ("least active quarter", "second", "third", "most active quarter")
OTHER, UNKNOWN = "other", "unknown"


@dataclass(frozen=True)
class Segmentation:
    """A way to split the test cases into groups.

    Attributes:
        name: used in file names.
        title: what is split, as shown in the report.
        groups: the name of each group.
        assign: a function of a stage and its predictions that returns the group of each case as an index
            into ``groups``: int (cases,).
    """

    name: str
    title: str
    groups: Sequence[str]
    assign: Callable[[int, Predictions], np.ndarray]


def _labelled(name: str, title: str, groups: Sequence[str], column: str) -> Segmentation:
    number = {group: place for place, group in enumerate(groups)}
    return Segmentation(
        name, title, groups, lambda stage, given: np.array([number[g] for g in getattr(given, column)])
    )


def activity_quarters(lengths: np.ndarray) -> np.ndarray:
    """The activity quarter of each user, by the number of items before the target: int (n,), 0 for the least
    active users. Users with the same number are in the same quarter.

    >>> activity_quarters(np.array([1, 1, 1, 5, 7, 9])).tolist()
    [0, 0, 0, 2, 3, 3]
    """
    return np.searchsorted(np.quantile(lengths, [0.25, 0.5, 0.75]), lengths, side="left")


USERS = _labelled("user-segment", "users", USER_SEGMENTS, "user_segment")
ITEMS = _labelled("item-segment", "target items", ITEM_SEGMENTS, "item_segment")
HISTORY = Segmentation(
    "history", "history", HISTORIES, lambda stage, given: (given.history_length > LONG_HISTORY).astype(int)
)
ACTIVE = Segmentation(
    "activity", "activity", ACTIVITY, lambda stage, given: activity_quarters(given.history_length)
)


def by_popularity(catalogue: Catalogue) -> Segmentation:
    """Split cases by the popularity of the target: head, middle and tail, each with a third of the events
    seen so far."""

    def assign(stage: int, given: Predictions) -> np.ndarray:
        return catalogue.popularity_thirds(stage)[[catalogue.rows[target] for target in given.targets]]

    return Segmentation("popularity", "popularity of the target", POPULARITY, assign)


def by_column(catalogue: Catalogue, column: str) -> Segmentation:
    """Split cases by the most frequent values of a column of the item table (for the target) or of the user
    table.

    Raises:
        ConfigError: neither table has this column.
    """
    catalogue.require_column(column)
    of_items = column in catalogue.item_columns
    if of_items:
        known = dict(zip(catalogue.item_ids, catalogue.item_columns[column], strict=False))
    else:
        known = dict(catalogue.user_columns[column])
    values = Counter(value for value in known.values() if value is not None)
    groups = [
        value for value, _ in sorted(values.items(), key=lambda pair: (-pair[1], pair[0]))[:MOST_VALUES]
    ]
    number = {group: place for place, group in enumerate(groups)}

    def assign(stage: int, given: Predictions) -> np.ndarray:
        found = [known.get(name) for name in (given.targets if of_items else given.users)]
        return np.array(
            [len(groups) + 1 if value is None else number.get(value, len(groups)) for value in found]
        )

    return Segmentation(f"column-{column}", column, [*groups, OTHER, UNKNOWN], assign)
