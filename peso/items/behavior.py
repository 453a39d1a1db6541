"""Vectors of items from behavior: items that users have close together get similar vectors.

The method is the factorization that Levy and Goldberg (2014, "Neural word embedding as implicit matrix
factorization") give for word2vec, with items as words and each user's sequence as a text:

    M_ij = max(0, log(n_ij · n / (n_i · n_j)) − log k),   M ≈ U S Vᵀ,   vector of item i = U_i · √S

where n_ij counts how often i and j are at most ``window`` places apart in a sequence, n_i = Σ_j n_ij,
n = Σ_i n_i, and k is the shift (the number of negative samples of word2vec).

Since M V = U S, a vector is also M_i · V / √S. So ``V / √S``, the basis, gives vectors in the same space to
items whose row of M is counted later (:meth:`Behavior.vectors_of`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from peso.config import BehaviorConfig
from peso.errors import DataError

PAIRS = 5_000_000  # about as many are counted at a time, to limit memory

NEGLIGIBLE = 1e-9  # a smaller singular value is zero, because entries of the matrix are logarithms

Matrix = Any  # scipy.sparse.csr_array, which has no type stubs


@dataclass(frozen=True)
class Behavior:
    """The vectors of the items that the fitted events say something about. Other items have none.

    Attributes:
        rows: int64 (n,), the rows of the items in the item table, ascending.
        vectors: float32 (n, width), their vectors.
        basis: float32 (n, width), if later rows of the matrix are to be projected; else None.
    """

    rows: np.ndarray
    vectors: np.ndarray
    basis: np.ndarray | None = None

    @classmethod
    def fit(
        cls,
        sequences: Iterable[np.ndarray],
        items: int,
        config: BehaviorConfig,
        seed: int,
        *,
        keep_basis: bool = False,
    ) -> Behavior:
        """Count and factorize. The same sequences and seed give the same vectors on the same machine.

        Args:
            sequences: the item rows of each user, int, oldest first.
            items: the number of items.
            config: window, shift and number of dimensions.
            seed: the seed of the SVD.
            keep_basis: whether to keep the basis.

        Raises:
            DataError: no two items occur together more often than by chance.
        """
        matrix = shifted_ppmi(cooccurrences(sequences, items, config.window), config.shift)
        rows = np.flatnonzero(np.diff(matrix.indptr))
        if not len(rows):
            raise DataError(
                f"items.behavior: no two items are at most {config.window} places apart in a user's training "
                f"events more often than by chance (shift {config.shift:g}); lower items.behavior.shift, or "
                "remove items.behavior"
            )
        among = matrix[rows][:, rows]
        basis = factorize(among, config.dimensions, seed)
        return cls(rows, np.asarray(among @ basis, np.float32), basis if keep_basis else None)

    def vectors_of(self, matrix: Matrix) -> np.ndarray:
        """float32 (items, width): vectors from counts of other events, in the space of the fitted ones.

        Args:
            matrix: sparse (items, items), from :func:`shifted_ppmi`. Only the columns of the fitted items
                count. The matrix of the fitted events gives the fitted vectors.
        """
        assert self.basis is not None
        return np.asarray(matrix[:, self.rows] @ self.basis, np.float32)

    def spread(self, items: int) -> np.ndarray:
        """float32 (items, width): a row for every item of the item table, zero for items without a vector."""
        result = np.zeros((items, self.vectors.shape[1]), np.float32)
        result[self.rows] = self.vectors
        return result

    def first(self, items: int) -> Behavior:
        """The vectors of the first ``items`` rows of the item table."""
        kept = self.rows < items
        basis = None if self.basis is None else self.basis[kept]
        return Behavior(self.rows[kept], self.vectors[kept], basis)

    def arrays(self) -> dict[str, np.ndarray]:
        """The named arrays from which :meth:`from_arrays` restores the vectors."""
        named = {"rows": self.rows, "vectors": self.vectors}
        return named if self.basis is None else {**named, "basis": self.basis}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Behavior:
        return cls(arrays["rows"], arrays["vectors"], arrays.get("basis"))


def cooccurrences(sequences: Iterable[np.ndarray], items: int, window: int) -> Matrix:
    """n_ij: how often two different items are at most ``window`` places apart in a sequence.

    Every pair of places counts, so the matrix is symmetric with a diagonal of zeros.

    Args:
        sequences: the item rows of each user, int, oldest first.
        items: the number of items.
        window: the largest distance.

    Returns:
        int64 sparse (items, items), in compressed rows.
    """
    from scipy import sparse

    total = sparse.csr_array((items, items), dtype=np.int64)
    for values, users in _parts(sequences, PAIRS // window):
        pairs = []
        for distance in range(1, window + 1):
            one, other = values[:-distance], values[distance:]
            together = (users[:-distance] == users[distance:]) & (one != other)
            pairs.append((one[together], other[together]))
        rows, columns = (np.concatenate(side) for side in zip(*pairs, strict=True))
        ones = np.ones(len(rows), np.int64)
        total = total + sparse.coo_array((ones, (rows, columns)), shape=(items, items)).tocsr()
    return (total + total.T).tocsr()


def _parts(sequences: Iterable[np.ndarray], most: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Items and users, int64 (events,) each, of about ``most`` events at a time."""
    part: list[np.ndarray] = []
    events = 0
    for sequence in sequences:
        part.append(sequence)
        events += len(sequence)
        if events >= most:
            yield _joined(part)
            part, events = [], 0
    if part:
        yield _joined(part)


def _joined(part: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    users = np.repeat(np.arange(len(part)), [len(sequence) for sequence in part])
    return np.concatenate(part).astype(np.int64), users


def shifted_ppmi(counts: Matrix, shift: float) -> Matrix:
    """M_ij = max(0, log(n_ij · n / (n_i · n_j)) − log shift), sparse float64 (items, items); entries of zero
    are not stored."""
    from scipy import sparse

    counts = counts.tocoo()
    each = np.asarray(counts.sum(axis=1)).astype(np.float64)
    rows, columns = counts.coords
    pmi = np.log(counts.data * each.sum() / (each[rows] * each[columns]))
    value = pmi - np.log(shift)
    kept = value > 0
    entries = (value[kept], (rows[kept], columns[kept]))
    return sparse.coo_array(entries, shape=counts.shape).tocsr()


def factorize(matrix: Matrix, dimensions: int, seed: int) -> np.ndarray:
    """V / √S of the truncated SVD of a symmetric matrix, float32 (n, dimensions), with fewer dimensions if n
    is smaller. Its product with the matrix is U · √S. Columns of a singular value of zero are zero.

    The SVD is the randomized one of scikit-learn (Halko et al. 2011), which depends only on the matrix and
    the seed. SciPy's ``svds`` does not: if many singular values are equal, as in a log of groups of the same
    size, ARPACK draws unseeded numbers and PROPACK fails.
    """
    from sklearn.decomposition import TruncatedSVD

    svd = TruncatedSVD(min(dimensions, *matrix.shape), random_state=seed).fit(matrix)
    scale = np.sqrt(np.where(svd.singular_values_ > NEGLIGIBLE, svd.singular_values_, np.inf))
    return np.asarray(svd.components_.T / scale, np.float32)
