"""Item-kNN is item-based collaborative filtering with cosine similarity (Deshpande and Karypis 2004).

Let c_ij be the number of users who had both i and j:

    similarity(i, j) = c_ij / (√(c_ii · c_jj) + shrinkage),   j among the ``neighbours`` most similar to i
    score(history, j) = Σ_{i ∈ history} similarity(i, j)

The order of a history is ignored. Items without any similarity to the history are ordered by popularity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import Field

from peso.baselines.baseline import Matrix, interactions, known_histories
from peso.baselines.tuning import Counted, least
from peso.events.histories import Cases, Stage

ROWS = 2048  # the number of rows of similarities to compute at once, to limit memory


class ItemKnn(Counted):
    """Cosine similarity of items by their users, computed at every stage on all events so far."""

    name = "item-knn"
    SETTINGS = (
        {"neighbours": 100, "shrinkage": 10.0},
        *({"neighbours": n, "shrinkage": s} for s in (1.0, 10.0, 100.0) for n in (20, 300)),
        {"neighbours": 100, "shrinkage": 0.0},
    )

    class Options(Counted.Options):
        neighbours: int | None = Field(
            None,
            ge=1,
            description="number of most similar items kept per item; default: chosen on validation",
        )
        shrinkage: float | None = Field(
            None,
            ge=0,
            description="added to the denominator: shrinks similarities that rest on few users; default: "
            "chosen on validation",
        )

    options: Options

    def counts(self, stages: Sequence[Stage]) -> Matrix:
        return interactions(list(known_histories(stages).values()), self.items)

    def fit(self, counts: Matrix, setting: Mapping[str, Any]) -> dict[str, Any]:
        self.similarities = similarities(counts, setting["neighbours"], setting["shrinkage"])
        self.popularity = least(np.asarray(counts.sum(axis=0)))
        return {"users": counts.shape[0], "similarities": int(self.similarities.nnz)}

    def sums(self, cases: Cases) -> np.ndarray:
        had = interactions([history[-self.window :] for history in cases.histories], self.items)
        return (had @ self.similarities).toarray()


def similarities(had: Matrix, neighbours: int, shrinkage: float) -> Matrix:
    """The similarities of each item's nearest neighbors, without the item itself.

    Of equally similar items, those with smaller numbers are kept.

    Args:
        had: sparse (users, items), 1 where a user had an item.
        neighbours: the number of neighbors of each item.
        shrinkage: the number that is added to the denominator.

    Returns:
        Sparse (items, items); row i has the neighbors of i.
    """
    from scipy import sparse

    users_of = np.asarray(had.sum(axis=0))  # (items,)
    transposed, kept = had.T.tocsr(), []
    for begin in range(0, had.shape[1], ROWS):
        block = (transposed[begin : begin + ROWS] @ had).tocoo()
        row, column, both = block.row, block.col, block.data
        other = row + begin != column
        row, column, both = row[other], column[other], both[other]
        norm = np.sqrt(users_of[row + begin] * users_of[column])
        value = both / (norm + shrinkage)
        order = np.lexsort((column, -value, row))
        row, column, value = row[order], column[order], value[order]
        counts = np.bincount(row, minlength=block.shape[0])
        place = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        near = place < neighbours
        kept.append(sparse.csr_array((value[near], (row[near], column[near])), shape=block.shape))
    return sparse.vstack(kept, format="csr")
