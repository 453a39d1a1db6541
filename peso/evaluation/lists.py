"""Variety, novelty and popularity of recommended lists, whether or not they were right. A list is a row of
item numbers, best first, padded with -1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from peso.evaluation.catalogue import Catalogue
from peso.evaluation.predictions import Predictions


def item_rows(lists: Sequence[Sequence[str]], rows: dict[str, int], k: int) -> np.ndarray:
    """The first k items of each list as numbers. Returns int64 (n, k), -1 where there is no item.

    >>> item_rows([["b", "a"], ["a"]], {"a": 0, "b": 1}, k=2).tolist()
    [[1, 0], [0, -1]]
    """
    result = np.full((len(lists), k), -1, dtype=np.int64)
    for row, items in zip(result, lists, strict=True):
        first = items[:k]
        row[: len(first)] = [rows[item] for item in first]
    return result


def coverage(lists: np.ndarray, items: int) -> float:
    """Catalog coverage: share of the catalog that is in some list (Ge et al. 2010).

    >>> coverage(np.array([[0, 1], [1, -1]]), items=4)
    0.5
    """
    return len(np.unique(lists[lists >= 0])) / items


def gini(lists: np.ndarray, items: int) -> float:
    """Gini index of how often each of the catalog's items is listed: 0 if all equally, near 1 if one only.

        G = Σ_i (2 i − n − 1) e_(i) / (n Σ_i e_i)        e_(1) ≤ … ≤ e_(n) the times listed

    >>> gini(np.array([[0, 1], [2, 3]]), items=4), gini(np.array([[0], [0]]), items=4)
    (0.0, 0.75)
    """
    times = np.sort(np.bincount(lists[lists >= 0], minlength=items))
    place = np.arange(1, items + 1)
    return float((2 * place - items - 1) @ times / (items * times.sum()))


def novelty(lists: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Mean self-information of a list's items, in bits (Zhou et al. 2010): − log2 p_i, where p_i is the
    add-one smoothed share of item i among the events seen.

    Args:
        lists: int (n, k). seen: int (items,).

    Returns: float64 (n,), nan for an empty list.

    >>> novelty(np.array([[0, 1], [0, -1]]), seen=np.array([2, 0])).round(3).tolist()
    [1.208, 0.415]
    """
    surprise = -np.log2((seen + 1) / (seen.sum() + len(seen)))
    return _mean_of_lists(surprise, lists)


def popularity_percentile(lists: np.ndarray, percentiles: np.ndarray) -> np.ndarray:
    """Mean popularity percentile of a list's items: 1 is the most popular item, 0.5 an average one.

    Args:
        percentiles: float (items,), see :meth:`Catalogue.percentiles`.

    >>> popularity_percentile(np.array([[0, 2]]), np.array([0.9, 0.5, 0.1])).tolist()
    [0.5]
    """
    return _mean_of_lists(percentiles, lists)


def prefix_diversity(lists: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Mean distance of two items of a list, 1 − (length of their common ID prefix) / levels: intra-list
    diversity (Ziegler et al. 2005) with the semantic ID as the taxonomy.

    Args:
        lists: int (n, k). codes: int (items, levels).

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
    """Of the lists of one stage; see the functions of the same names. Arrays are float64 (cases,)."""

    coverage: float
    gini: float
    novelty: np.ndarray
    popularity_percentile: np.ndarray
    prefix_diversity: np.ndarray

    def mean(self, name: str) -> float:
        """A figure of the stage: of one value a case their mean, empty lists left out."""
        return float(np.nanmean(getattr(self, name)))


def list_figures(predictions: Predictions, catalogue: Catalogue, stage: int, k: int) -> ListFigures:
    """Of one stage, for lists cut at k items, against the items known at the stage."""
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
