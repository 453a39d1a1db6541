"""Differences between systems, their significance, and the smallest difference that could be detected.

A p value comes from the paired permutation test over users: the difference is compared with those obtained
when the two systems are exchanged for random users. An interval comes from the paired bootstrap over users.
Several seeds add a second level to both: the deviations due to users keep only the part that does not depend
on the seed (``Spread.shrinkage``), and a deviation due to seeds, drawn from Student's t, is added. Resampling
the seeds themselves would be too optimistic: the variance among resamples of five is a fifth too small, and
if seeds are the only source of chance, identical systems are rejected in 15 % of cases.

All pairs in one metric are corrected together, not only those with the best, because the best is chosen from
the same data. Metrics are corrected separately.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
from scipy import stats

from peso.evaluation.intervals import Panel, Spread, spread_of_difference


def holm(p: np.ndarray) -> np.ndarray:
    """p values corrected for the number of tests (Holm 1979). If every test whose corrected value is ≤ α is
    rejected, the probability of one or more false rejections is at most α, however the tests depend on each
    other.

    The i-th smallest of m becomes max_{j ≤ i} min(1, (m − j + 1) p_(j)).

    Args:
        p: float (m,), the p value of each test.

    >>> holm(np.array([0.01, 0.04, 0.03])).tolist()
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p, kind="stable")
    steps = np.minimum(1.0, p[order] * np.arange(len(p), 0, -1))
    result = np.empty(len(p))
    result[order] = np.maximum.accumulate(steps)
    return result


DRAWS = 10_000
LEVEL = 0.05
POWER = 0.8
# A weighted sum of random signs exceeds x standard deviations at most this many times as often as a normal
# variable does (Bentkus and Dzindzalieta 2015).
SIGN_TAIL = 1 / (4 * stats.norm.sf(math.sqrt(2)))
FEW = 10  # with fewer draws beyond the observed difference, the tail is bounded instead of counted


@dataclass(frozen=True, eq=False)
class SystemValues:
    """The results of one system.

    Attributes:
        name: the name of the system.
        seeds: the seed of each run; ``(None,)`` for a system in which nothing is random.
        values: for each metric, float (seeds, cases), with the cases in the panel's order.
    """

    name: str
    seeds: Sequence[int | None]
    values: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        if len(set(self.seeds)) < len(self.seeds) or not self.seeds:
            raise ValueError(f"{self.name} needs distinct seeds, not {list(self.seeds)}")
        if any(values.shape[0] != len(self.seeds) for values in self.values.values()):
            raise ValueError(f"{self.name} needs one row of values for each of its {len(self.seeds)} seeds")


@dataclass(frozen=True)
class Contrast:
    """One system minus another, in one metric.

    Attributes:
        value, low, high: the difference of means and its 95 % interval (nan if nothing varies).
        percent, percent_low, percent_high: the same in percent of the other system's mean.
        p, p_adjusted: p values of the permutation test, before and after Holm's correction over all pairs.
        detectable: the smallest true difference that data like these show (p ≤ 0.05) four times in five.
        covers_seeds: whether the interval and p account for randomness in training. If not, they account for
            the choice of users only.
    """

    value: float
    low: float
    high: float
    percent: float
    percent_low: float
    percent_high: float
    p: float
    p_adjusted: float
    detectable: float
    covers_seeds: bool

    @property
    def significant(self) -> bool:
        """After correction, at the 5 % level."""
        return self.p_adjusted <= LEVEL


class Contrasts:
    """The differences between all pairs of systems in all metrics.

    ``seed`` fixes the random draws: the same values give the same results.

    Args:
        systems: at least one system; all must have the same metrics and cases.
        panel: the user and the weight of each case.
        draws: the number of random draws of the permutation test and of the bootstrap.
        seed: the seed of the random draws.

    Raises:
        ValueError: a system has other metrics than the first, or another number of cases than the panel.
    """

    def __init__(
        self, systems: Sequence[SystemValues], panel: Panel, draws: int = DRAWS, seed: int = 0
    ) -> None:
        self.systems = list(systems)
        self.metrics = list(self.systems[0].values)
        for system in self.systems:
            if set(system.values) != set(self.metrics):
                raise ValueError(f"{system.name} has other metrics than {self.systems[0].name}")
            if any(values.shape[1] != panel.cases for values in system.values.values()):
                raise ValueError(f"{system.name} does not have {panel.cases} cases")
        self.panel, self.draws, self.seed = panel, draws, seed
        self._place = {system.name: number for number, system in enumerate(self.systems)}
        self._means = self._each(lambda values: values @ panel.weight)
        self._influence = self._each(panel.influence)
        self._spreads: dict[tuple[str, int, int], Spread] = {}
        self._t: dict[float, np.ndarray] = {}

    # -- estimates ---------------------------------------------------------------------------------

    def mean(self, metric: str, system: str) -> float:
        """The mean over the seeds and the panel."""
        return float(self._means[metric][self._place[system]].mean())

    def contrast(self, metric: str, system: str, other: str) -> Contrast:
        """``system`` minus ``other``."""
        a, b = self._place[system], self._place[other]
        base, found = self.mean(metric, other), self._spread(metric, a, b)
        value = self.mean(metric, system) - base
        interval = percents = (math.nan, math.nan)
        if found.error:
            resamples = self._resamples[metric]
            drawn = value + found.shrinkage * (resamples[:, a] - resamples[:, b]) + self._of_seeds(found)
            interval = _middle(drawn)
            bases = np.abs(base + resamples[:, b])
            if bases.all():
                percents = _middle(100 * drawn / bases)
        return Contrast(
            value=value,
            low=interval[0],
            high=interval[1],
            percent=100 * value / abs(base) if base else math.nan,
            percent_low=percents[0],
            percent_high=percents[1],
            p=self.p(metric, system, other),
            p_adjusted=self.p_adjusted(metric, system, other),
            detectable=smallest_detectable(self._drawn(metric, a, b)),
            covers_seeds=found.covers_seeds,
        )

    def best(self, metric: str) -> str:
        """The name of the system with the highest mean; the first one in case of a tie."""
        return max(self.systems, key=lambda system: self.mean(metric, system.name)).name

    def ties(self, metric: str, best: str | None = None) -> list[str]:
        """The names of the systems that are not significantly worse than the best one, without the best."""
        best = best or self.best(metric)
        return [
            system.name
            for system in self.systems
            if system.name != best and self.p_adjusted(metric, best, system.name) > LEVEL
        ]

    # -- p values ----------------------------------------------------------------------------------

    def p(self, metric: str, system: str, other: str) -> float:
        """The two-sided p value of the paired permutation test; 1 for a system against itself."""
        return self._p.get(self._key(metric, system, other), 1.0)

    def p_adjusted(self, metric: str, system: str, other: str) -> float:
        """:meth:`p` after Holm's correction over all pairs in this metric."""
        return self._adjusted.get(self._key(metric, system, other), 1.0)

    def _key(self, metric: str, system: str, other: str) -> tuple[str, int, int]:
        one, two = sorted((self._place[system], self._place[other]))
        return metric, one, two

    @cached_property
    def _p(self) -> dict[tuple[str, int, int], float]:
        """The p value of every metric and pair of system numbers (smaller number first)."""
        return {
            (metric, a, b): self._p_of(metric, a, b)
            for metric in self.metrics
            for a, b in combinations(range(len(self.systems)), 2)
        }

    @cached_property
    def _adjusted(self) -> dict[tuple[str, int, int], float]:
        result: dict[tuple[str, int, int], float] = {}
        for metric in self.metrics:
            keys = [key for key in self._p if key[0] == metric]
            result |= dict(zip(keys, holm(np.array([self._p[key] for key in keys])).tolist(), strict=True))
        return result

    def _p_of(self, metric: str, a: int, b: int) -> float:
        means, found = self._means[metric], self._spread(metric, a, b)
        observed = abs(float(means[a].mean() - means[b].mean()))
        drawn = self._drawn(metric, a, b)
        # treat values that are equal up to rounding as equal: hits produce many ties, and so do differences
        # that are the same for all users, whose standard error is only rounding
        rounding = 1e-9 * max(found.error, observed)
        reached = int(np.count_nonzero(np.abs(drawn) >= observed - rounding))
        # of the 2^users sign patterns, two give the observed difference or its opposite
        least = 2.0 ** (1 - self.panel.users)
        p = max((1 + reached) / (1 + self.draws), least)
        if reached >= FEW or found.error <= rounding:
            return p
        beyond = float(stats.t.sf(observed / found.error, found.effective_degrees))
        return max(least, min(p, 2 * SIGN_TAIL * beyond))

    def _drawn(self, metric: str, a: int, b: int) -> np.ndarray:
        """Differences as they would be drawn if the two systems were equally good: float64 (draws,)."""
        flips, found = self._flips[metric], self._spread(metric, a, b)
        result: np.ndarray = found.shrinkage * (flips[:, a] - flips[:, b]) + self._of_seeds(found)
        return result

    # -- draws -------------------------------------------------------------------------------------

    @cached_property
    def _flips(self) -> dict[str, np.ndarray]:
        generator = np.random.default_rng((self.seed, 0))
        shares = self._each(lambda values: self.panel.shares(values.mean(axis=0)))
        return self._split(sign_flips(self._columns(shares), self.draws, generator))

    @cached_property
    def _resamples(self) -> dict[str, np.ndarray]:
        generator = np.random.default_rng((self.seed, 1))
        influence = {m: [z.mean(axis=0) for z in self._influence[m]] for m in self.metrics}
        return self._split(user_resamples(self._columns(influence), self.draws, generator))

    def _of_seeds(self, found: Spread) -> np.ndarray | float:
        """The drawn deviations due to seeds; 0 if seeds play no part."""
        if not found.seeds:
            return 0.0
        if found.degrees not in self._t:
            generator = np.random.default_rng((self.seed, 2))
            self._t[found.degrees] = generator.standard_t(found.degrees, self.draws)
        return math.sqrt(found.seeds) * self._t[found.degrees]

    def _spread(self, metric: str, a: int, b: int) -> Spread:
        key = (metric, min(a, b), max(a, b))
        if key not in self._spreads:
            _, one, other = key
            means, influence = self._means[metric], self._influence[metric]
            self._spreads[key] = spread_of_difference(
                (means[one], means[other]),
                (influence[one], influence[other]),
                (self.systems[one].seeds, self.systems[other].seeds),
            )
        return self._spreads[key]

    def _each(self, function: Callable[[np.ndarray], np.ndarray]) -> dict[str, list[np.ndarray]]:
        return {m: [function(system.values[m]) for system in self.systems] for m in self.metrics}

    def _columns(self, rows: Mapping[str, Sequence[np.ndarray]]) -> np.ndarray:
        return np.stack([row for metric in self.metrics for row in rows[metric]], axis=1)

    def _split(self, columns: np.ndarray) -> dict[str, np.ndarray]:
        parts = np.split(columns, len(self.metrics), axis=1)
        return dict(zip(self.metrics, parts, strict=True))


def _middle(drawn: np.ndarray) -> tuple[float, float]:
    """The interval that leaves out 2.5 % of the draws on either side."""
    low, high = np.quantile(drawn, [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


def smallest_detectable(drawn: np.ndarray, level: float = LEVEL, power: float = POWER) -> float:
    """The true difference at which a two-sided test at ``level`` rejects with probability ``power``.

    The test rejects an absolute difference above the 1 - level quantile of the absolute draws; the difference
    that is observed exceeds the true one by at least the 1 - power quantile of the draws with probability
    power. For a normal distribution, the sum of the two is 2.8 standard errors.

    Args:
        drawn: float (draws,), differences between equally good systems, symmetric around zero.
        level: the significance level of the test.
        power: the probability that the test rejects.

    >>> drawn = np.random.default_rng(0).normal(size=100_000)
    >>> round(smallest_detectable(drawn), 1)
    2.8
    """
    # the power quantile of a symmetric distribution is the 2 · power - 1 quantile of its absolute values
    return float(np.quantile(np.abs(drawn), [1 - level, 2 * power - 1]).sum())


BLOCK = 512  # draws at a time


def sign_flips(shares: np.ndarray, draws: int, generator: np.random.Generator) -> np.ndarray:
    """Σ_u ε_u y_u with independent random signs ε_u: the permutation distribution of paired differences.

    If two systems are equally good, exchanging them for any user changes nothing, so a difference Σ_u y_u is
    one of the 2^U equally likely values Σ_u ±y_u.

    Args:
        shares: float (users, columns), what each user adds to the difference y_u.
        draws: the number of random sign vectors.

    Returns: float64 (draws, columns).
    """
    result = np.empty((draws, shares.shape[1]))
    for begin in range(0, draws, BLOCK):
        size = (min(BLOCK, draws - begin), len(shares))
        signs = generator.integers(0, 2, size, dtype=np.int8).astype(np.float64) * 2 - 1
        result[begin : begin + BLOCK] = signs @ shares
    return result


def user_resamples(influence: np.ndarray, draws: int, generator: np.random.Generator) -> np.ndarray:
    """Σ_u (w_u − 1) z_u, where w_u is how often user u is drawn in U draws with replacement: the bootstrap
    distribution (Efron 1979) of the deviation of a mean.

    Args:
        influence: float (users, columns), the influence z_u of each user on the mean.
        draws: the number of resamples.

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
