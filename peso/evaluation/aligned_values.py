"""Metric values of several systems with cases in the same order, so that they can be compared case by
case."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from peso.evaluation.intervals import Panel
from peso.evaluation.metrics import Metric
from peso.evaluation.run_summary import RunSummary, System


class AlignedValues:
    """One value per case, run and stage. Cases are sorted by user, and results are cached."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}  # user → number, the same in every run and stage
        self._users: dict[tuple[str, int], np.ndarray] = {}
        self._order: dict[tuple[str, int], np.ndarray] = {}
        self._values: dict[tuple[str, int, str], np.ndarray] = {}
        self._panels: dict[tuple[str, tuple[int, ...], str], Panel] = {}

    def of_system(self, system: System, metric: Metric, stages: Sequence[int]) -> np.ndarray:
        """float64 (seeds, cases): the values of all seeds, one stage after another."""
        return np.stack(
            [np.concatenate([self.of_run(run, metric, stage) for stage in stages]) for run in system.runs]
        )

    def of_run(self, run: RunSummary, metric: Metric, stage: int) -> np.ndarray:
        """float64 (cases,): the values of one run at one stage."""
        key = (run.name, stage, metric.name)
        if key not in self._values:
            self._values[key] = metric.values(run.stages[stage].predictions)[self.order(run, stage)]
        return self._values[key]

    def panel(self, system: System, stages: Sequence[int], average: Literal["macro", "micro"]) -> Panel:
        """The users of the cases and the weights of the cases in an average."""
        key = (system.name, tuple(stages), average)
        if key not in self._panels:
            self._panels[key] = Panel.of([self.users(system.first, stage) for stage in stages], average)
        return self._panels[key]

    def users(self, run: RunSummary, stage: int) -> np.ndarray:
        """int64 (cases,): the number of each case's user, ascending."""
        key = (run.name, stage)
        if key not in self._users:
            numbers, users = self._numbers, run.stages[stage].predictions.users
            found = np.array([numbers.setdefault(user, len(numbers)) for user in users], dtype=np.int64)
            self._order[key] = np.argsort(found, kind="stable")
            self._users[key] = found[self._order[key]]
        return self._users[key]

    def order(self, run: RunSummary, stage: int) -> np.ndarray:
        """int64 (cases,): the permutation that sorts the cases of the predictions."""
        self.users(run, stage)
        return self._order[run.name, stage]

    def cases(self, run: RunSummary, stage: int) -> list[tuple[str, str]]:
        """User and target of each case."""
        predictions = run.stages[stage].predictions
        return [(predictions.users[i], predictions.targets[i]) for i in self.order(run, stage)]
