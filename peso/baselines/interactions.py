"""Who had what, as a sparse matrix: the input of the baselines in closed form.

Knows histories; knows nothing of what is computed from the matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import sparse

Matrix = Any  # scipy.sparse.csr_array, which has no type stubs


def interactions(histories: Sequence[np.ndarray], items: int) -> Matrix:
    """float64 (n, items): 1 where an item is in a history, however often.

    >>> interactions([np.array([2, 0, 2]), np.array([1])], items=3).toarray().tolist()
    [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    """
    lengths = [len(history) for history in histories]
    rows = np.repeat(np.arange(len(histories)), lengths)
    columns = np.concatenate([np.empty(0, dtype=np.int32), *histories])
    matrix = sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=(len(histories), items))
    matrix.sum_duplicates()
    matrix.data[:] = 1.0
    return matrix
