"""The variance of a mean due to users and to seeds of training.

With S seeds and z_su the influence of user u under seed s:

    V_users       = U/(U−1) Σ_u z̄_u²                    of the mean over seeds, between users
    V_seeds       = Σ_s (m_s − m̄)² / (S (S−1))           of the mean over seeds, between seeds
    V_interaction = Σ_su (z_su − z̄_u)² / (S (S−1))       contained in both

(two-way clustering, Cameron, Gelbach and Miller 2011), so that V = V_users + V_seeds − V_interaction. V_seeds
is uncertain because there are few seeds; the other two are estimated from thousands of users. So the users'
own part max(0, V_users − V_interaction) is treated as normal, the rest as Student's t with S − 1 degrees of
freedom.
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

# SciPy is imported where it is used, because loading it would delay commands that fail early


@dataclass(frozen=True)
class Spread:
    """The variances of a mean.

    Attributes:
        users: V_users.
        interaction: V_interaction; 0 if there is only one seed.
        seeds: V_seeds; 0 if there is only one seed.
        degrees: the degrees of freedom of ``seeds``; infinite if seeds play no part.
        covers_seeds: False if training is random but only one seed was run, so that the variance between
            seeds is unknown.
    """

    users: float
    interaction: float = 0.0
    seeds: float = 0.0
    degrees: float = math.inf
    covers_seeds: bool = True

    @property
    def own(self) -> float:
        """The variance between users without the interaction of users and seeds."""
        return max(0.0, self.users - self.interaction)

    @property
    def shrinkage(self) -> float:
        """The factor that scales deviations of the mean due to users so that their variance is ``own``."""
        return math.sqrt(self.own / self.users) if self.users else 0.0

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return math.sqrt(self.own + self.seeds)

    @property
    def effective_degrees(self) -> float:
        """Degrees of freedom of the total variance (Satterthwaite 1946), where only V_seeds is uncertain."""
        return self.degrees * (self.own + self.seeds) ** 2 / self.seeds**2 if self.seeds else math.inf

    @property
    def half_width(self) -> float:
        """Half the width of the 95 % interval; nan if nothing varies."""
        if not self.error:
            return math.nan
        from scipy import stats

        return float(stats.t.ppf(0.975, self.effective_degrees)) * self.error

    def p(self, difference: float) -> float:
        """The two-sided p value of the t test that a difference with these variances is 0; 1 if nothing
        varies."""
        if not self.error:
            return 1.0
        from scipy import stats

        return float(2 * stats.t.sf(abs(difference) / self.error, self.effective_degrees))


def spread(means: np.ndarray, influence: np.ndarray, random: bool = True) -> Spread:
    """The variances of the mean over seeds.

    Args:
        means: float (seeds,), the mean under each seed.
        influence: float (seeds, users), the influence of each user on each mean.
        random: whether another seed would have given other values.

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
    """The variances of the difference of two systems' means over their seeds. Users are always paired.

    Systems with the same seeds are also paired by seed, because a seed may determine what both share (the
    base model, the order of batches). Otherwise the seeds' variances add up (Welch). A system whose only seed
    is None is not random; it is compared with every run of the other system.

    Args:
        means: for each system, float (its seeds,), the mean under each seed.
        influence: for each system, float (its seeds, users), the influence of each user on each mean.
        seeds: the seeds of each system.
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
        owner: int (cases,), the number of each case's user, 0 … users − 1.
        weight: float (cases,), the weight c_i of each case.
        group: int (cases,), the group of each case. The mean is a mean of the groups' means, and the sizes of
            the groups are taken as given. Groups are the stages for macro means; micro means have one group.
    """

    owner: np.ndarray
    weight: np.ndarray
    group: np.ndarray

    @classmethod
    def of(cls, users: Sequence[np.ndarray], average: Literal["macro", "micro"] = "macro") -> Panel:
        """Build a panel from the users of the cases of each stage.

        With ``macro`` every stage counts the same, c_i = 1 / (T n_t); with ``micro`` every case counts the
        same, c_i = 1 / n.

        >>> panel = Panel.of([np.array(["ann"]), np.array(["ann", "bo"])])
        >>> panel.weight.tolist(), panel.owner.tolist()
        ([0.5, 0.25, 0.25], [0, 0, 1])

        Raises:
            ValueError: there are no stages, or a stage has no cases.
        """
        if not users or not all(len(stage) for stage in users):
            raise ValueError("a panel needs at least one stage, and every stage needs cases")
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
        """What each user adds to the mean: y_u = Σ_{i of u} c_i x_i, so that Σ_u y_u = m.

        Args:
            values: float (…, cases), the value x_i of each case.

        Returns: float64 (…, users).
        """
        return self._per_user(values * self.weight)

    def influence(self, values: np.ndarray) -> np.ndarray:
        """The influence of each user on the mean: z_u = Σ_{i of u} c_i (x_i − m_g(i)).

        In another sample of users, in which user u occurs w_u times, the mean is m + Σ_u w_u z_u (to first
        order in the sizes of the groups; exactly if every user has one case and there is one group).

        Args:
            values: float (…, cases), the value x_i of each case.

        Returns: float64 (…, users), which add up to 0.
        """
        from scipy.sparse import csr_array

        total = np.bincount(self.group, weights=self.weight)
        members = csr_array(
            (self.weight / total[self.group], (np.arange(self.cases), self.group)),
            shape=(self.cases, len(total)),
        )
        means = values.reshape(-1, self.cases) @ members  # (…, groups)
        centered = values.reshape(-1, self.cases) - means[:, self.group]
        return self._per_user(centered * self.weight).reshape(*values.shape[:-1], self.users)

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
    """A mean of ``cases`` values with its 95 % interval from ``low`` to ``high``.

    ``low`` and ``high`` are nan if the cases show no spread (only one user, or all values equal, such as no
    hit in any case). This means that the uncertainty is unknown, not that it is zero.
    """

    value: float
    low: float
    high: float
    cases: int

    @classmethod
    def of(cls, values: np.ndarray, panel: Panel) -> Estimate:
        """The mean over a panel, and over the training seeds if there are several rows.

        Args:
            values: float (cases,) or (seeds, cases), the value of each case.
            panel: the user and the weight of each case.

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
        """A value with the 95 % interval that follows from a spread. A spread below the rounding error counts
        as no spread."""
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
        """Whether the interval is known and does not contain zero."""
        return self.low > 0 or self.high < 0

    def as_json(self) -> dict[str, float | int | None]:
        """The estimate as written to ``metrics.json``; unknown bounds become null."""
        known = self.has_interval
        return {
            "value": self.value,
            "low": self.low if known else None,
            "high": self.high if known else None,
            "cases": self.cases,
        }
