"""Runs side by side: every estimate that tables, plots and sentences are made of.

Knows runs and metrics; knows nothing of how anything is shown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from peso.errors import WorkspaceError
from peso.evaluation.intervals import Estimate, mean_of_cases, mean_of_stages
from peso.evaluation.metrics import Metric, default_metrics
from peso.evaluation.predictions import Predictions
from peso.evaluation.run_summary import RunSummary


class Comparison:
    """Estimates of every metric for every run, over the stages that all runs have.

    Averages are macro over the later stages (1 … T), as in the paper, or over stage 0 where there is no
    later one. Runs are compared in pairs, case by case, and only where they answered the same cases.

    Args:
        runs: at least one.
        ks: the list lengths of Hit@k and NDCG@k.

    Attributes:
        averaged: the stages that averages are taken over, ascending.
        left_out: stages that some runs have and others lack.

    Raises:
        WorkspaceError: two runs of one name, or no stage that all runs have.
        ConfigError: a k beyond a stored list.
    """

    def __init__(self, runs: Sequence[RunSummary], ks: Sequence[int]) -> None:
        self.runs = list(runs)
        names = Counter(run.name for run in runs)
        if len(names) < len(self.runs):
            twice = ", ".join(name for name, times in names.items() if times > 1)
            raise WorkspaceError(f"several runs are called {twice}; give each a name of its own")
        self.ks = sorted(set(ks))
        self.metrics: list[Metric] = default_metrics(self.ks)
        held = [set(run.stages) for run in self.runs]
        common = sorted(set.intersection(*held))
        if not common:
            raise WorkspaceError(
                f"no stage is evaluated in all of {', '.join(names)}; evaluate the missing stages first"
            )
        self.averaged = [stage for stage in common if stage > 0] or common
        self.left_out = sorted(set.union(*held) - set(common))
        self._values: dict[tuple[str, int, str], np.ndarray] = {}
        self._users: dict[tuple[str, int], np.ndarray] = {}
        self._numbers: dict[str, int] = {}
        self._same: dict[int, bool] = {}

    # -- what there is -----------------------------------------------------------------------------

    @cached_property
    def stages(self) -> list[int]:
        """Every stage that some run has."""
        return sorted({stage for run in self.runs for stage in run.stages})

    @cached_property
    def labels(self) -> dict[str, str]:
        """What each run is called where it is shown: its strategy, where that tells it apart, else more."""
        times = Counter(run.strategy for run in self.runs)
        return {
            run.name: run.strategy if times[run.strategy] == 1 else f"{run.strategy} · {run.name}"
            for run in self.runs
        }

    def metric(self, name: str) -> Metric:
        return next(metric for metric in self.metrics if metric.name == name)

    @cached_property
    def headline(self) -> list[Metric]:
        """The metrics worth a plot: NDCG and Hit at the largest k, and the log-probability."""
        return [
            self.metric(name) for name in (f"ndcg@{self.ks[-1]}", f"hit@{self.ks[-1]}", "log_probability")
        ]

    @cached_property
    def same_cases(self) -> bool:
        """Whether all runs answered the same cases in the stages that averages are taken over."""
        return all(self._same_cases_at(stage) for stage in self.averaged)

    def _same_cases_at(self, stage: int) -> bool:
        if stage not in self._same:
            first, *others = (
                sorted(zip(predictions.users, predictions.targets, strict=True))
                for predictions in (self._predictions(run, stage) for run in self.runs)
            )
            self._same[stage] = all(other == first for other in others)
        return self._same[stage]

    def cases(self, run: RunSummary) -> int:
        """Number of cases that the run's averages are taken over."""
        return sum(len(run.stages[stage].predictions) for stage in self.averaged)

    # -- estimates ---------------------------------------------------------------------------------

    def at_stage(self, run: RunSummary, metric: Metric, stage: int) -> Estimate | None:
        """The mean over the cases of one stage; None where the run does not have it or it has no case."""
        if stage not in run.stages or not len(run.stages[stage].predictions):
            return None
        return mean_of_cases(self._of(run, metric, stage), self._who(run, stage))

    def average(self, run: RunSummary, metric: Metric) -> Estimate:
        """Macro over the averaged stages."""
        return mean_of_stages(
            [self._of(run, metric, stage) for stage in self.averaged],
            [self._who(run, stage) for stage in self.averaged],
        )

    def average_of_cases(self, run: RunSummary, metric: Metric) -> Estimate:
        """Micro over the averaged stages."""
        return mean_of_cases(
            np.concatenate([self._of(run, metric, stage) for stage in self.averaged]),
            np.concatenate([self._who(run, stage) for stage in self.averaged]),
        )

    def in_segment(self, run: RunSummary, metric: Metric, column: str, segment: str) -> Estimate | None:
        """The mean over all cases of a segment in the averaged stages (micro: a segment may be missing from
        a stage); None where there is no case.

        Args:
            column: ``user_segment`` or ``item_segment``.
        """
        values, users = [], []
        for stage in self.averaged:
            inside = np.array(getattr(run.stages[stage].predictions, column)) == segment
            values.append(self._of(run, metric, stage)[inside])
            users.append(self._who(run, stage)[inside])
        joined = np.concatenate(values)
        return mean_of_cases(joined, np.concatenate(users)) if len(joined) else None

    def difference(
        self, run: RunSummary, other: RunSummary, metric: Metric, stages: Sequence[int] | None = None
    ) -> Estimate:
        """Macro mean of ``run`` minus ``other``, case by case, so that what makes a case easy or hard for
        both cancels.

        Args:
            stages: over which; none given: the averaged ones.

        Raises:
            ValueError: the two did not answer the same cases.
        """
        differences, users = [], []
        for stage in self.averaged if stages is None else stages:
            if not self._same_cases_at(stage):
                raise ValueError(f"the runs answered different cases of stage {stage}")
            order, other_order = (np.argsort(self._who(r, stage), kind="stable") for r in (run, other))
            differences.append(
                self._of(run, metric, stage)[order] - self._of(other, metric, stage)[other_order]
            )
            users.append(self._who(run, stage)[order])
        return mean_of_stages(differences, users)

    # -- standing ----------------------------------------------------------------------------------

    def standing(self, metric: Metric, stages: Sequence[int] | None = None) -> Standing:
        """Which run is best, on average or in given stages, and which the data cannot tell from it.

        Args:
            stages: all runs must have them; none given: the averaged ones.
        """
        stages = self.averaged if stages is None else list(stages)
        means = {
            run.name: np.mean([self._of(run, metric, stage).mean() for stage in stages]) for run in self.runs
        }
        best, *rest = sorted(self.runs, key=lambda run: -means[run.name])  # stable: equals stay in order
        if not all(self._same_cases_at(stage) for stage in stages):
            return Standing(best, (), ())
        apart = {run.name: self.difference(best, run, metric, stages).excludes_zero for run in rest}
        return Standing(
            best,
            tuple(run for run in rest if not apart[run.name]),
            tuple(run for run in rest if apart[run.name]),
        )

    # -- one value per case ------------------------------------------------------------------------

    def _of(self, run: RunSummary, metric: Metric, stage: int) -> np.ndarray:
        key = (run.name, stage, metric.name)
        if key not in self._values:
            self._values[key] = metric.values(self._predictions(run, stage))
        return self._values[key]

    def _who(self, run: RunSummary, stage: int) -> np.ndarray:
        """Numbers for the users of the cases, the same for one user in every run and stage."""
        key = (run.name, stage)
        if key not in self._users:
            numbers, users = self._numbers, self._predictions(run, stage).users
            self._users[key] = np.array([numbers.setdefault(user, len(numbers)) for user in users])
        return self._users[key]

    def _predictions(self, run: RunSummary, stage: int) -> Predictions:
        return run.stages[stage].predictions


@dataclass(frozen=True)
class Standing:
    """``tied``: the interval of the difference to the best contains zero; ``behind``: it does not.

    Both are empty where runs answered different cases: then nothing can be said beyond who is best.
    """

    best: RunSummary
    tied: tuple[RunSummary, ...]
    behind: tuple[RunSummary, ...]
