"""Transfer and forgetting.

In the matrix R, R[i, j] is the result of the model after stage i on the test cases of stage j (larger is
better; nan where it was not tested), and T is the last stage. Each figure is a mean over stages j of
R[a, j] − R[b, j], the difference between models a and b on the cases of j; the figures differ in a and b.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Term = tuple[int, int, int]  # stage j, models a and b


def figure(results: np.ndarray, terms: Sequence[Term]) -> float:
    """1/n Σ (R[a, j] − R[b, j]); nan if there is no term or an entry is missing."""
    return float(np.mean([results[a, j] - results[b, j] for j, a, b in terms])) if terms else np.nan


def backward_terms(results: np.ndarray) -> list[Term]:
    """(j, T, j) for j < T."""
    last = len(results) - 1
    return [(j, last, j) for j in range(last)]


def forward_terms(results: np.ndarray) -> list[Term]:
    """(j, j − 1, 0) for 2 ≤ j ≤ T."""
    return [(j, j - 1, 0) for j in range(2, len(results))]


def forgetting_terms(results: np.ndarray) -> list[Term]:
    """(j, argmax_{i<T} R[i, j], T) for j < T; none where an entry is missing."""
    last = len(results) - 1
    if np.isnan(results[:, :last]).any():
        return []
    return [(j, int(results[:last, j].argmax()), last) for j in range(last)]


def backward_transfer(results: np.ndarray) -> float:
    """How much later learning changed the result on earlier stages (Lopez-Paz and Ranzato 2017):

        BWT = 1/T Σ_{j<T} (R[T, j] − R[j, j])

    Negative: it forgot. nan if an entry is missing, or there is one stage only.

    >>> backward_transfer(np.array([[0.5, 0.1], [0.3, 0.6]]))
    -0.2
    """
    return figure(results, backward_terms(results))


def forward_transfer(results: np.ndarray) -> float:
    """How much stages up to j − 1 help on stage j before it is learned, after Lopez-Paz and Ranzato (2017):

        FWT = 1/(T − 1) Σ_{j=2…T} (R[j − 1, j] − R[0, j])

    They compare with a model that has learned nothing; here it is the model of the base stage, without which
    there is no recommender, so j begins at 2. nan if an entry is missing, or there are fewer than 3 stages.

    >>> results = np.array([[0.5, 0.1, 0.1], [0.3, 0.6, 0.4], [0.3, 0.5, 0.6]])
    >>> round(forward_transfer(results), 3)
    0.3
    """
    return figure(results, forward_terms(results))


def forgetting(results: np.ndarray) -> float:
    """How far the last model is below the best there was on each earlier stage (Chaudhry et al. 2018):

        F = 1/T Σ_{j<T} ( max_{i<T} R[i, j] − R[T, j] )

    nan if an entry of the columns j < T is missing, or there is one stage only.

    >>> round(forgetting(np.array([[0.5, 0.1], [0.3, 0.6]])), 3)
    0.2
    """
    return figure(results, forgetting_terms(results))
