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

import numpy as np
from scipy import stats


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
        return float(stats.t.ppf(0.975, self.effective_degrees)) * self.error

    def p(self, difference: float) -> float:
        """Two-sided, of the t test that a difference of this spread is 0; 1 where nothing varies."""
        if not self.error:
            return 1.0
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
