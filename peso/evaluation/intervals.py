"""The variance of a mean due to users and to seeds of training.

With S seeds and z_su the influence of user u under seed s:

    V_users       = U/(U−1) Σ_u z̄_u²                    of the mean over seeds, between users
    V_seeds       = Σ_s (m_s − m̄)² / (S (S−1))           of the mean over seeds, between seeds
    V_interaction = Σ_su (z_su − z̄_u)² / (S (S−1))       contained in both

(two-way clustering, Cameron, Gelbach and Miller 2011), so that V = V_users + V_seeds − V_interaction. V_seeds
is uncertain because seeds are few; the other two rest on thousands of users. So the users' own part
max(0, V_users − V_interaction) is treated as normal, the rest as Student's t with S − 1 degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from scipy.sparse import csr_array

# SciPy is imported where it is used: loading it takes longer than a refused command may


@dataclass(frozen=True)
class Spread:
    """Variances of a mean, as above; ``seeds`` and ``interaction`` are 0 where there is no second seed.

    ``degrees``: of freedom of ``seeds``; infinite where seeds play no part. ``covers_seeds``: False where
    training is random but one seed was run, so that nothing is known of another.
    """

    users: float
    interaction: float = 0.0
    seeds: float = 0.0
    degrees: float = math.inf
    covers_seeds: bool = True

    @property
    def own(self) -> float:
        """The users' part that is not luck of one seed with one user."""
        return max(0.0, self.users - self.interaction)

    @property
    def shrinkage(self) -> float:
        """What deviations of the mean over seeds, by users, are multiplied with to have variance ``own``."""
        return math.sqrt(self.own / self.users) if self.users else 0.0

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return math.sqrt(self.own + self.seeds)

    @property
    def effective_degrees(self) -> float:
        """Degrees of freedom of the whole (Satterthwaite 1946): only V_seeds is uncertain."""
        return self.degrees * (self.own + self.seeds) ** 2 / self.seeds**2 if self.seeds else math.inf

    @property
    def half_width(self) -> float:
        """Of the 95 % interval; nan where nothing varies."""
        if not self.error:
            return math.nan
        from scipy import stats

        return float(stats.t.ppf(0.975, self.effective_degrees)) * self.error

    def p(self, difference: float) -> float:
        """Two-sided, of the t test that a difference of this spread is 0; 1 where nothing varies."""
        if not self.error:
            return 1.0
        from scipy import stats

        return float(2 * stats.t.sf(abs(difference) / self.error, self.effective_degrees))


def spread(means: np.ndarray, influence: np.ndarray, random: bool = True) -> Spread:
    """Of the mean over seeds.

    Args:
        means: float (seeds,). influence: float (seeds, users).
        random: whether another seed would have given something else.

    >>> spread(np.array([0.2, 0.4]), np.array([[0.1, -0.1], [0.1, -0.1]])).seeds
    0.010000000000000002
    """
    runs, users = influence.shape
    middle = influence[0] if runs == 1 else influence.mean(axis=0)
    of_users = float(middle @ middle) * users / (users - 1) if users > 1 else 0.0
    if runs == 1:
        return Spread(of_users, covers_seeds=not random)
    pairs = runs * (runs - 1)
    flat = influence.ravel()  # Σ_s (z_s − z̄)² = Σ_s z_s² − S z̄², which needs no further array
    interaction = max(0.0, float(flat @ flat) - runs * float(middle @ middle)) / pairs
    between = float(np.sum((means - means.mean()) ** 2)) / pairs
    if between <= (1e-13 * np.abs(means).max()) ** 2:  # rounding
        return Spread(of_users, interaction if interaction > 1e-26 else 0.0)
    return Spread(of_users, interaction, between, runs - 1)


def spread_of_difference(
    means: tuple[np.ndarray, np.ndarray],
    influence: tuple[np.ndarray, np.ndarray],
    seeds: tuple[Sequence[int | None], Sequence[int | None]],
) -> Spread:
    """Of the difference of two systems' means over their seeds, users paired throughout.

    Systems with the same seeds are paired by seed, too, since a seed may fix what both share (the base model,
    the order of batches). Otherwise the seeds' variances add up (Welch). A system whose only seed is None is
    not random, and is set against every run of the other.

    Args:
        means: per system float (its seeds,). influence: per system float (its seeds, users).
    """
    fixed = [list(own) == [None] for own in seeds]
    if any(fixed) or (set(seeds[0]) == set(seeds[1]) and len(seeds[0]) == len(seeds[1])):
        order = [np.argsort([-1 if s is None else s for s in own], kind="stable") for own in seeds]
        one, other = (m[o] for m, o in zip(means, order, strict=True))
        z_one, z_other = (z[o] for z, o in zip(influence, order, strict=True))
        return spread(one - other, z_one - z_other, random=not all(fixed))
    parts = [spread(m, z) for m, z in zip(means, influence, strict=True)]
    middle = influence[0].mean(axis=0) - influence[1].mean(axis=0)
    users = len(middle)
    between = sum(part.seeds for part in parts)
    squares = sum(part.seeds**2 / part.degrees for part in parts)
    return Spread(
        float(middle @ middle) * users / (users - 1) if users > 1 else 0.0,
        sum(part.interaction for part in parts),
        between,
        between**2 / squares if squares else math.inf,
        covers_seeds=all(part.covers_seeds for part in parts),
    )


@dataclass(frozen=True, eq=False)
class Panel:
    """The cases that all systems of a table answered.

    A mean over the panel is m = Σ_i c_i x_i with Σ_i c_i = 1.

    Attributes:
        owner: int (cases,), number of the user in 0 … users − 1.
        weight: float (cases,), c_i.
        group: int (cases,); the mean is a mean of the groups' means, whose sizes are taken as given: the
            stage for macro means, 0 throughout for micro ones.
    """

    owner: np.ndarray
    weight: np.ndarray
    group: np.ndarray

    @classmethod
    def of(cls, users: Sequence[np.ndarray], average: Literal["macro", "micro"] = "macro") -> Panel:
        """From the users of the cases of each stage.

        ``macro``: every stage counts the same, c_i = 1 / (T n_t); ``micro``: every case does, c_i = 1 / n.

        >>> panel = Panel.of([np.array(["ann"]), np.array(["ann", "bo"])])
        >>> panel.weight.tolist(), panel.owner.tolist()
        ([0.5, 0.25, 0.25], [0, 0, 1])

        Raises:
            ValueError: no stage, or one without cases.
        """
        if not users or not all(len(stage) for stage in users):
            raise ValueError("a panel of no stages, or with a stage without cases")
        _, owner = np.unique(np.concatenate(users), return_inverse=True)
        stage = np.repeat(np.arange(len(users)), [len(stage) for stage in users])
        if average == "micro":
            return cls(owner, np.full(len(owner), 1 / len(owner)), np.zeros(len(owner), dtype=np.int64))
        sizes = np.bincount(stage)
        return cls(owner, 1 / (len(users) * sizes[stage]), stage)

    @property
    def cases(self) -> int:
        return len(self.owner)

    @cached_property
    def users(self) -> int:
        return int(self.owner.max()) + 1

    def shares(self, values: np.ndarray) -> np.ndarray:
        """What each user adds to the mean: y_u = Σ_{i of u} c_i x_i, so Σ_u y_u = m.

        Args:
            values: float (…, cases).

        Returns: float64 (…, users).
        """
        return self._per_user(values * self.weight)

    def influence(self, values: np.ndarray) -> np.ndarray:
        """What each user adds to the chance deviation of the mean: z_u = Σ_{i of u} c_i (x_i − m_g(i)).

        With another draw of users, in which user u occurs w_u times, the mean is m + Σ_u w_u z_u (to first
        order in the sizes of the groups; exactly where every user has one case and there is one group).

        Returns: float64 (…, users), which add up to 0.
        """
        from scipy.sparse import csr_array

        total = np.bincount(self.group, weights=self.weight)
        members = csr_array(
            (self.weight / total[self.group], (np.arange(self.cases), self.group)),
            shape=(self.cases, len(total)),
        )
        means = values.reshape(-1, self.cases) @ members  # (…, groups)
        centred = values.reshape(-1, self.cases) - means[:, self.group]
        return self._per_user(centred * self.weight).reshape(*values.shape[:-1], self.users)

    @cached_property
    def _membership(self) -> csr_array:
        from scipy.sparse import csr_array

        ones = np.ones(self.cases)
        return csr_array((ones, (np.arange(self.cases), self.owner)), shape=(self.cases, self.users))

    def _per_user(self, weighted: np.ndarray) -> np.ndarray:
        flat = weighted.reshape(-1, self.cases) @ self._membership
        return flat.reshape(*weighted.shape[:-1], self.users)


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

    @classmethod
    def of(cls, values: np.ndarray, panel: Panel) -> Estimate:
        """The mean over a panel; over seeds of training, too, where there are several rows.

        Args:
            values: float (cases,) or (seeds, cases).

        >>> estimate = Estimate.of(np.array([0.0, 0.0, 1.0, 1.0]), Panel.of([np.array([1, 2, 3, 4])]))
        >>> f"{estimate.value:.2f} from {estimate.low:.2f} to {estimate.high:.2f}"
        '0.50 from -0.07 to 1.07'
        >>> stages = [np.array([1]), np.array([1, 2, 3])]  # every stage counts the same
        >>> round(Estimate.of(np.array([1.0, 0.0, 0.0, 1.0]), Panel.of(stages)).value, 4)
        0.6667
        """
        values = np.atleast_2d(values)
        means = values @ panel.weight
        return cls.around(float(means.mean()), spread(means, panel.influence(values)), panel.cases)

    @classmethod
    def around(cls, value: float, found: Spread, cases: int) -> Estimate:
        """With the 95 % interval of a spread. Differences below rounding error are no spread."""
        half_width = found.half_width if found.error > 1e-14 * abs(value) else math.nan
        return cls(value, value - half_width, value + half_width, cases)

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
