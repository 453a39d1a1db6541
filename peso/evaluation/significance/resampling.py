"""Random draws of sums over users, with the same draws for every column of a matrix, so that the difference
of two columns is that of paired systems. Memory stays at one block of draws."""

from __future__ import annotations

import numpy as np

BLOCK = 512  # draws at a time


def sign_flips(shares: np.ndarray, draws: int, generator: np.random.Generator) -> np.ndarray:
    """Σ_u ε_u y_u with independent random signs ε_u: the permutation distribution of paired differences.

    If two systems are alike, exchanging them for any user changes nothing, so a difference Σ_u y_u is one of
    the 2^U equally likely values Σ_u ±y_u.

    Args:
        shares: float (users, columns).

    Returns: float64 (draws, columns).
    """
    result = np.empty((draws, shares.shape[1]))
    for begin in range(0, draws, BLOCK):
        size = (min(BLOCK, draws - begin), len(shares))
        signs = generator.integers(0, 2, size, dtype=np.int8).astype(np.float64) * 2 - 1
        result[begin : begin + BLOCK] = signs @ shares
    return result


def user_resamples(influence: np.ndarray, draws: int, generator: np.random.Generator) -> np.ndarray:
    """Σ_u (w_u − 1) z_u, where w_u says how often user u is drawn in U draws with replacement: the bootstrap
    distribution (Efron 1979) of the deviation of a mean.

    Args:
        influence: float (users, columns).

    Returns: float64 (draws, columns).
    """
    users = len(influence)
    result = np.empty((draws, influence.shape[1]))
    for begin in range(0, draws, BLOCK):
        count = min(BLOCK, draws - begin)
        drawn = generator.integers(0, users, (count, users), dtype=np.int32)
        drawn += np.arange(count, dtype=np.int32)[:, None] * users
        times = np.bincount(drawn.ravel(), minlength=count * users).reshape(count, users)
        result[begin : begin + BLOCK] = (times - 1.0) @ influence
    return result
