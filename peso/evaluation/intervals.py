"""A mean over test cases and its 95 % interval over users (another seed of training is not covered).

Case i has an influence z_i on the deviation of the mean m. Cases of one user are not independent, so their
influences are added before squaring:

    s² = U/(U − 1) · Σ_u ( Σ_{i of u} z_i )²        interval: m ± 1.96 s

with U users (normal approximation, linearized, clustered by user). With one case per user and one stage this
is the textbook s²/n. For the difference of two systems on the same cases, pass the differences as values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Estimate:
    """A mean of ``cases`` values with its interval.

    ``low`` and ``high`` are nan where the cases show no spread at all (one user only, or all values equal,
    such as no hit in any case): then nothing can be said about chance, and certainly not that there is none.
    """

    value: float
    low: float
    high: float
    cases: int

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    @property
    def has_interval(self) -> bool:
        return not math.isnan(self.low)

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval is known and lies on one side of zero."""
        return self.low > 0 or self.high < 0

    def as_json(self) -> dict[str, float | int | None]:
        """For metrics.json; a bound that is not known becomes null."""
        known = self.has_interval
        return {
            "value": self.value,
            "low": self.low if known else None,
            "high": self.high if known else None,
            "cases": self.cases,
        }


def mean_of_cases(values: np.ndarray, users: np.ndarray) -> Estimate:
    """The mean in which every case counts the same (micro): m = Σ_i x_i / n,  z_i = (x_i − m) / n.

    Args:
        values: float (n,). users: (n,), whom each value belongs to.

    Raises:
        ValueError: no cases.

    >>> estimate = mean_of_cases(np.array([0.0, 0.0, 1.0, 1.0]), np.array([1, 2, 3, 4]))
    >>> f"{estimate.value:.2f} from {estimate.low:.2f} to {estimate.high:.2f}"
    '0.50 from -0.07 to 1.07'
    """
    if not len(values):
        raise ValueError("a mean of no cases")
    mean = float(np.mean(values, dtype=np.float64))
    return _estimate(mean, (values - mean) / len(values), users)


def mean_of_stages(values: Sequence[np.ndarray], users: Sequence[np.ndarray]) -> Estimate:
    """The mean in which every stage counts the same (macro, the paper's average).

    With T stages of n_t cases and means m_t:  m = Σ_t m_t / T,  z_i = (x_i − m_t) / (T n_t).

    Args:
        values: per stage float (n_t,). users: per stage (n_t,); one user may appear in several stages.

    Raises:
        ValueError: no stages, or a stage without cases.

    >>> stages = [np.array([1.0]), np.array([0.0, 0.0, 1.0])]
    >>> mean_of_stages(stages, [np.array([1]), np.array([1, 2, 3])]).value
    0.6666666666666666
    """
    if not values or not all(len(stage) for stage in values):
        raise ValueError("a mean of no stages, or of a stage without cases")
    means = [float(np.mean(stage, dtype=np.float64)) for stage in values]
    influence = [(x - m) / (len(values) * len(x)) for x, m in zip(values, means, strict=True)]
    return _estimate(math.fsum(means) / len(means), np.concatenate(influence), np.concatenate(users))


def _estimate(mean: float, influence: np.ndarray, users: np.ndarray) -> Estimate:
    _, owner = np.unique(users, return_inverse=True)
    per_user = np.bincount(owner, weights=influence)
    spread = float(per_user @ per_user)
    # differences below rounding error are no spread
    if len(per_user) < 2 or spread <= (1e-14 * abs(mean)) ** 2:
        return Estimate(mean, math.nan, math.nan, len(influence))
    error = Z * math.sqrt(spread * len(per_user) / (len(per_user) - 1))
    return Estimate(mean, mean - error, mean + error, len(influence))
