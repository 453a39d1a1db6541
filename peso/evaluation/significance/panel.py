"""The user and the weight of each case. Users are the independent units: all cases of one user, over all
stages, belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from scipy.sparse import csr_array


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
        ones = np.ones(self.cases)
        return csr_array((ones, (np.arange(self.cases), self.owner)), shape=(self.cases, self.users))

    def _per_user(self, weighted: np.ndarray) -> np.ndarray:
        flat = weighted.reshape(-1, self.cases) @ self._membership
        return flat.reshape(*weighted.shape[:-1], self.users)
