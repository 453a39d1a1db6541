"""What learning one stage does to the others: transfer and forgetting.

Knows the matrix R, R[i, j] = result of the model after stage i on the test cases of stage j (larger is
better; nan where it was not tested); knows nothing of models or metrics. T is the last stage.
"""

from __future__ import annotations

import numpy as np


def backward_transfer(results: np.ndarray) -> float:
    """How much later learning changed the result on earlier stages (Lopez-Paz and Ranzato 2017):

        BWT = 1/T Σ_{j<T} (R[T, j] − R[j, j])

    Negative: it forgot. nan if an entry is missing, or there is one stage only.

    >>> backward_transfer(np.array([[0.5, 0.1], [0.3, 0.6]]))
    -0.2
    """
    last = len(results) - 1
    return float(np.mean(results[last, :last] - np.diag(results)[:last])) if last else np.nan


def forward_transfer(results: np.ndarray) -> float:
    """How much stages up to j − 1 help on stage j before it is learnt, after Lopez-Paz and Ranzato (2017):

        FWT = 1/(T − 1) Σ_{j=2…T} (R[j − 1, j] − R[0, j])

    They compare with a model that has learnt nothing; here it is the model of the base stage, without which
    there is no recommender, so j begins at 2. nan if an entry is missing, or there are fewer than 3 stages.

    >>> results = np.array([[0.5, 0.1, 0.1], [0.3, 0.6, 0.4], [0.3, 0.5, 0.6]])
    >>> round(forward_transfer(results), 3)
    0.3
    """
    stages = np.arange(2, len(results))
    return float(np.mean(results[stages - 1, stages] - results[0, stages])) if len(stages) else np.nan


def forgetting(results: np.ndarray) -> float:
    """How far the last model is below the best there was on each earlier stage (Chaudhry et al. 2018):

        F = 1/T Σ_{j<T} ( max_{i<T} R[i, j] − R[T, j] )

    nan if an entry of the columns j < T is missing, or there is one stage only.

    >>> round(forgetting(np.array([[0.5, 0.1], [0.3, 0.6]])), 3)
    0.2
    """
    last = len(results) - 1
    return float(np.mean(results[:last, :last].max(axis=0) - results[last, :last])) if last else np.nan
