"""Correction of p values for many tests."""

from __future__ import annotations

import numpy as np


def holm(p: np.ndarray) -> np.ndarray:
    """p values corrected for their number (Holm 1979): reject where the result is ≤ α, and the chance of one
    false rejection or more among all tests is at most α, however the tests hang together.

    The i-th smallest of m becomes max_{j ≤ i} min(1, (m − j + 1) p_(j)).

    Args:
        p: float (m,).

    >>> holm(np.array([0.01, 0.04, 0.03])).tolist()
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p, kind="stable")
    steps = np.minimum(1.0, p[order] * np.arange(len(p), 0, -1))
    result = np.empty(len(p))
    result[order] = np.maximum.accumulate(steps)
    return result
