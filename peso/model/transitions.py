"""Counts of transitions between items, combined with what a model has learned.

A model generalizes over items, but does not remember a pair of items that occurred a few times. A table of
counts remembers it, but has no information about other pairs. So the model's probability is the mean of a
Dirichlet prior, and the counts are the evidence (MacKay and Bauman Peto 1995, "A hierarchical Dirichlet
language model"):

    p(j | h) = (G_j(h) + μ · p_model(j | h)) / (Σ_i G_i(h) + μ)
    G_j(h) = Σ_n recency^n · edge(h_n, j)

with h_0 the newest item of the history, h_1 the one before it. After histories with many counts, the counts
decide; otherwise, the model does. The edges are those of the baseline ``item-graph``
(:mod:`peso.baselines.item_graph`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from peso.errors import WorkspaceError

FILE = "transitions.safetensors"
PRIOR = 100.0  # μ before it is tuned
MOST_EDGES = 300  # of an item, the heaviest; the counts then take 2.4 kB an item at most

Matrix = Any  # scipy.sparse.csr_array, which has no type stubs


@dataclass(frozen=True)
class Transitions:
    """Counted transitions, as they stand after a stage.

    Attributes:
        edges: sparse float32 (items, items), the weight of a step from the row's item to the column's.
        recency: the weight of an item of the history, relative to the next newer one.
        window: how many items of a history count.
        repeats: whether items that the history already has get evidence.
        prior: μ, how much evidence the model's probabilities are worth.
    """

    edges: Matrix
    recency: float
    window: int
    repeats: bool
    prior: float = PRIOR

    def evidence(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        """G: float32 (n, items), for histories of item rows, oldest first."""
        newest = weighted(histories, self.recency, self.window, self.edges.shape[0])
        result: np.ndarray = (newest @ self.edges).toarray().astype(np.float32)
        if not self.repeats:
            for row, history in zip(result, histories, strict=True):
                row[history] = 0
        return result

    def with_factors(self, factors: np.ndarray) -> Transitions:
        """The same with the weight of every step multiplied by the factor, (items,), of the item that it
        leads to."""
        from scipy import sparse

        weights = (self.edges.data * factors[self.edges.indices]).astype(np.float32)
        parts = (weights, self.edges.indices, self.edges.indptr)
        return replace(self, edges=sparse.csr_array(parts, self.edges.shape))

    def save(self, directory: Path) -> None:
        """Write ``transitions.safetensors``.

        It has the edges in compressed sparse rows: ``starts`` (items + 1,), ``items`` and ``weights``
        (edges,). The other attributes are in its metadata, ``settings``, as JSON.
        """
        tensors = {
            "starts": self.edges.indptr.astype(np.int64),
            "items": self.edges.indices.astype(np.int32),
            "weights": self.edges.data.astype(np.float32),
        }
        settings = {
            "recency": self.recency,
            "window": self.window,
            "repeats": self.repeats,
            "prior": self.prior,
        }
        # one key, because safetensors writes several in random order
        save_file(tensors, directory / FILE, {"settings": json.dumps(settings)})

    @classmethod
    def load(cls, directory: Path, items: int) -> Transitions | None:
        """Read what :meth:`save` wrote; None if there is no file.

        Args:
            directory: the directory of the file.
            items: the number of items of the catalog, which may have grown since.

        Raises:
            WorkspaceError: the file is damaged.
        """
        from scipy import sparse

        path = directory / FILE
        if not path.exists():
            return None
        try:
            with safe_open(path, "np") as file:
                starts, columns, weights = (file.get_tensor(name) for name in ("starts", "items", "weights"))
                settings = json.loads(file.metadata()["settings"])
            starts = np.concatenate([starts, np.full(items + 1 - len(starts), starts[-1])])
            edges = sparse.csr_array((weights, columns, starts), shape=(items, items))
            return cls(edges, **settings)
        except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
            raise WorkspaceError(f"{path} is damaged ({error}); train the stage again") from error


def weighted(histories: Sequence[np.ndarray], recency: float, window: int, items: int) -> Matrix:
    """Sparse float64 (n, items): recency^n at the n-th newest item of each history, of the last ``window``.

    >>> weighted([np.array([3, 0, 2])], 0.5, window=2, items=4).toarray().tolist()
    [[0.5, 0.0, 1.0, 0.0]]
    """
    from scipy import sparse

    newest_first = [history[::-1][:window] for history in histories]
    lengths = [len(history) for history in newest_first]
    rows = np.repeat(np.arange(len(histories)), lengths)
    places = np.concatenate([np.arange(0), *(np.arange(length) for length in lengths)])
    columns = np.concatenate([np.empty(0, dtype=np.int64), *newest_first])
    weights = recency ** places.astype(np.float64)
    return sparse.csr_array((weights, (rows, columns)), shape=(len(histories), items))


def heaviest(edges: Matrix, most: int) -> Matrix:
    """The ``most`` heaviest edges of each row, as float32; of equal ones those with the smaller column.

    >>> from scipy import sparse
    >>> heaviest(sparse.csr_array([[1.0, 3.0, 0.0, 3.0], [0.0, 0.0, 2.0, 0.0]]), most=1).toarray().tolist()
    [[0.0, 3.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0]]
    """
    from scipy import sparse

    edges = edges.tocsr().sorted_indices()
    owners = np.repeat(np.arange(edges.shape[0]), np.diff(edges.indptr))
    order = np.lexsort((edges.indices, -edges.data, owners))
    kept = order[np.arange(len(order)) - edges.indptr[owners] < most]
    kept.sort()
    return sparse.csr_array(
        (edges.data[kept].astype(np.float32), (owners[kept], edges.indices[kept])), edges.shape
    )
