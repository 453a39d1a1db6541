"""Compare systems: compute every estimate that the tables, plots and sentences of a report show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Literal

import numpy as np

from peso.errors import WorkspaceError
from peso.evaluation.aligned_values import AlignedValues
from peso.evaluation.catalogue import (
    ACTIVE,
    HISTORY,
    ITEMS,
    USERS,
    Catalogue,
    ListFigures,
    Segmentation,
    by_column,
    by_popularity,
    list_figures,
)
from peso.evaluation.contrasts import LEVEL, Contrasts, SystemValues, holm
from peso.evaluation.intervals import Estimate, Panel, spread_of_difference
from peso.evaluation.metrics import LOG_PROBABILITY, Metric, Term, default_metrics, headline_metrics
from peso.evaluation.predictions import Predictions
from peso.evaluation.run_summary import RunSummary, System, systems_of


class Comparison:
    """Estimates of every metric for every system, over the stages that all runs have.

    Averages are macro averages over the later stages (1 … T), as in the paper, or over stage 0 if there is
    no later stage, and over the seeds of a system. Systems are compared in pairs, case by case, and only if
    they answered the same cases.

    Args:
        runs: the runs to compare, at least one.
        ks: the list lengths k of Hit@k and NDCG@k.
        columns: columns of the item or user table. Each adds a way to split the cases.

    Attributes:
        systems: the complete runs, with the seeds of one system grouped.
        unfinished: runs with fewer stages than expected. They are left out, unless no model is complete; then
            every run counts with the stages that it has.
        averaged: the stages that averages are taken over, ascending.
        left_out: stages that some systems have and others lack.

    Raises:
        WorkspaceError: two runs have the same name, no stage is evaluated in all runs, or runs of one system
            answered different cases.
        ConfigError: a k is larger than the stored lists, or a column is unknown.
    """

    def __init__(self, runs: Sequence[RunSummary], ks: Sequence[int], columns: Sequence[str] = ()) -> None:
        names = Counter(run.name for run in runs)
        if len(names) < len(runs):
            twice = ", ".join(name for name, times in names.items() if times > 1)
            raise WorkspaceError(f"several runs are called {twice}; give each run a different name")
        tested = [run for run in runs if run.stages]
        complete = [run for run in tested if len(run.stages) >= run.expected_stages]
        # baselines finish early; readers want to see the models, even unfinished ones
        enough = any(not run.baseline for run in complete) or all(run.baseline for run in tested)
        counted = complete if complete and enough else tested
        self.unfinished = [run for run in runs if run not in counted]
        if not counted:
            raise WorkspaceError(f"none of {', '.join(names)} has a tested stage; run them first")
        self.systems = systems_of(counted)
        self.ks = sorted(set(ks))
        self.metrics: list[Metric] = default_metrics(self.ks)
        held = [set(system.stages) for system in self.systems]
        common = sorted(set.intersection(*held))
        if not common:
            raise WorkspaceError(
                f"no stage is evaluated in all of {', '.join(names)}; evaluate the missing stages first"
            )
        self.averaged = [stage for stage in common if stage > 0] or common
        self.left_out = sorted(set.union(*held) - set(common))
        self._values = AlignedValues()
        self._same: dict[int, bool] = {}
        self._lists: dict[tuple[str, int], ListFigures] = {}
        self._groups: dict[tuple[str, str], np.ndarray] = {}
        self._contrasts: dict[tuple[str, ...], Contrasts] = {}
        self.segmentations = self._segmentations(columns)
        for system in self.systems:
            self._require_same_within(system)

    # -- what there is -----------------------------------------------------------------------------

    @property
    def runs(self) -> list[RunSummary]:
        """All runs that are compared, system by system."""
        return [run for system in self.systems for run in system.runs]

    @cached_property
    def stages(self) -> list[int]:
        """Every stage that at least one system has."""
        return sorted({stage for system in self.systems for stage in system.stages})

    def metric(self, name: str) -> Metric:
        """The metric with this name."""
        return next(metric for metric in self.metrics if metric.name == name)

    @cached_property
    def headline(self) -> list[Metric]:
        """The metrics that are plotted. The first one decides which system is best."""
        return [self.metric(metric.name) for metric in headline_metrics(self.ks)]

    @cached_property
    def same_cases(self) -> bool:
        """Whether all systems answered the same cases in the stages that averages are taken over."""
        return all(self._same_cases_at(stage) for stage in self.averaged)

    @cached_property
    def subject(self) -> System:
        """The system that the page is mainly about: the best one in the first metric.

        It is chosen among the models for which the previous stage's model was also tested. If there are none,
        it is chosen among all models, or among all systems if there are only baselines.
        """
        models = [system for system in self.systems if not system.first.baseline] or self.systems
        updated = [system for system in models if self.last_change(system, self.headline[0])]
        return max(updated or models, key=lambda system: self.average(system, self.headline[0]).value)

    def cases(self, system: System) -> int:
        """The number of cases that the system's averages are taken over. It is the same for each seed."""
        return sum(len(system.first.stages[stage].predictions) for stage in self.averaged)

    def _same_cases_at(self, stage: int) -> bool:
        if stage not in self._same:
            first, *others = (self._values.cases(system.first, stage) for system in self.systems)
            self._same[stage] = all(other == first for other in others)
        return self._same[stage]

    def _require_same_within(self, system: System) -> None:
        for stage in system.stages:
            first, *others = (self._values.cases(run, stage) for run in system.runs)
            for run, other in zip(system.runs[1:], others, strict=True):
                if other != first:
                    raise _not_paired(system.first.name, run.name, stage)

    def require_same_cases(self) -> None:
        """Check that all systems can be compared case by case.

        Raises:
            WorkspaceError: two systems answered different cases of a stage.
        """
        for stage in self.averaged:
            first, *others = (self._values.cases(system.first, stage) for system in self.systems)
            for system, other in zip(self.systems[1:], others, strict=True):
                if other != first:
                    raise _not_paired(self.systems[0].name, system.name, stage)

    # -- estimates ---------------------------------------------------------------------------------

    def at_stage(self, system: System, metric: Metric, stage: int) -> Estimate | None:
        """The mean over the cases of one stage; None if the system lacks the stage or it has no cases."""
        if stage not in system.stages or not len(system.first.stages[stage].predictions):
            return None
        return self._estimate(system, metric, [stage], "macro")

    def average(self, system: System, metric: Metric) -> Estimate:
        """The macro average over the averaged stages: every stage counts the same."""
        return self._estimate(system, metric, self.averaged, "macro")

    def average_of_cases(self, system: System, metric: Metric) -> Estimate:
        """The micro average over the averaged stages: every case counts the same."""
        return self._estimate(system, metric, self.averaged, "micro")

    def in_group(
        self, system: System, metric: Metric, segmentation: Segmentation, group: int
    ) -> Estimate | None:
        """The mean over all cases of a group in the averaged stages; None if the group has no cases.

        Every case counts the same (micro average), because a group may be missing from a stage.
        """
        inside = self._group_of(system, segmentation) == group
        if not inside.any():
            return None
        users = np.concatenate([self._values.users(system.first, stage) for stage in self.averaged])
        values = self._values.of_system(system, metric, self.averaged)[:, inside]
        return Estimate.of(values, Panel.of([users[inside]], "micro"))

    def _group_of(self, system: System, segmentation: Segmentation) -> np.ndarray:
        """The group of each case: int (cases of the averaged stages,)."""
        key = (system.name, segmentation.name)
        if key not in self._groups:
            self._groups[key] = np.concatenate(
                [
                    segmentation.assign(stage, system.first.stages[stage].predictions)[
                        self._values.order(system.first, stage)
                    ]
                    for stage in self.averaged
                ]
            )
        return self._groups[key]

    @cached_property
    def catalogue(self) -> Catalogue | None:
        """The catalog of the first run that has one for all averaged stages; None if no run has."""
        return next(
            (c for run in self.runs if (c := run.catalogue) and set(self.averaged) <= set(c.seen)), None
        )

    def list_figures(self, run: RunSummary, stage: int) -> ListFigures:
        """Statistics of the lists of one stage, cut at the largest k."""
        if self.catalogue is None:
            raise ValueError("no run has a catalog")
        key = (run.name, stage)
        if key not in self._lists:
            predictions = run.stages[stage].predictions
            self._lists[key] = list_figures(predictions, self.catalogue, stage, self.ks[-1])
        return self._lists[key]

    def list_mean(self, system: System, name: str, stages: Sequence[int]) -> Estimate:
        """The macro average of a list statistic over some stages.

        There is no interval if the statistic has one value per stage instead of one per case, or if any list
        is empty.
        """
        found = [[self.list_figures(run, stage) for stage in stages] for run in system.runs]
        value = float(np.mean([[one.mean(name) for one in row] for row in found]))
        if not isinstance(getattr(found[0][0], name), np.ndarray):
            return Estimate(value, np.nan, np.nan, 0)
        values = [
            np.concatenate(
                [
                    getattr(one, name)[self._values.order(run, stage)]
                    for one, stage in zip(row, stages, strict=True)
                ]
            )
            for run, row in zip(system.runs, found, strict=True)
        ]
        if np.isnan(values).any():
            return Estimate(value, np.nan, np.nan, len(values[0]))
        return Estimate.of(np.stack(values), self._values.panel(system, stages, "macro"))

    def _segmentations(self, columns: Sequence[str]) -> list[Segmentation]:
        always = [USERS, ITEMS, HISTORY, ACTIVE]
        if self.catalogue is None:
            if columns:
                raise WorkspaceError(
                    f"segments by {', '.join(columns)} need the item table, which no run has"
                )
            return always
        chosen = [by_column(self.catalogue, column) for column in columns]
        return [*always, by_popularity(self.catalogue), *chosen]

    def difference(
        self,
        system: System,
        other: System,
        metric: Metric,
        stages: Sequence[int] | None = None,
        group: int | None = None,
    ) -> Estimate:
        """The macro average of ``system`` minus ``other``, case by case.

        What makes a case easy or hard for both systems cancels.

        Args:
            system: the system whose results count positively.
            other: the system that it is compared with.
            metric: the metric to compare.
            stages: the stages to average over; by default the averaged stages.
            group: an index into ``USER_SEGMENTS``. If given, only users of this segment are included, and
                every case counts the same.

        Raises:
            ValueError: the two systems did not answer the same cases.
        """
        stages = stages or self.averaged
        for stage in stages:
            if not self._same_cases_at(stage):
                raise ValueError(f"the runs answered different cases of stage {stage}")
        (one, z_one), (two, z_two) = (self._moments(each, metric, stages, group) for each in (system, other))
        found = spread_of_difference((one, two), (z_one, z_two), (system.seeds, other.seeds))
        cases = int(self._inside(system, stages, group).sum())
        return Estimate.around(float(one.mean() - two.mean()), found, cases)

    def change(
        self, system: System, metric: Metric, terms: Sequence[Term], group: int | None = None
    ) -> Estimate | None:
        """The mean over terms (j, a, b) of the difference between the models after stages a and b.

        Differences are computed case by case on the cases of stage j. Only seeds that were tested on other
        stages are included.

        Args:
            system: the system whose models are compared.
            metric: the metric to compare.
            terms: triples (j, a, b), see :mod:`peso.evaluation.metrics`.
            group: an index into ``USER_SEGMENTS``. If given, only users of this segment are included, and
                every case counts the same.

        Returns: None if a test is missing or the group has no cases.

        Raises:
            WorkspaceError: a model was tested on other cases than those of the stage.
        """
        runs = [run for run in system.runs if run.across]
        if not terms or not runs:
            return None
        rows = []
        for run in runs:
            parts = []
            for j, a, b in terms:
                if j not in run.stages or any((i, j) not in run.across for i in {a, b} - {j}):
                    return None
                found = [run.stages[j].predictions if i == j else run.across[i, j] for i in (a, b)]
                one, two = (metric.values(self._same_as_own(run, j, some)) for some in found)
                parts.append((one - two)[self._values.order(run, j)])
            rows.append(np.concatenate(parts))
        values, stages = np.stack(rows), [j for j, _, _ in terms]
        inside = self._inside(system, stages, group)
        if not inside.any():
            return None
        return Estimate.of(values[:, inside], self._panel_of_group(system, stages, group))

    def last_change(self, system: System, metric: Metric, group: int | None = None) -> Estimate | None:
        """The newest stage's model minus the previous one, on the newest stage's cases."""
        new = self.averaged[-1]
        return self.change(system, metric, [(new, new, new - 1)], group)

    def before_and_after(self, system: System, metric: Metric, change: Estimate) -> tuple[float, float]:
        """The means of the previous and the newest model, whose difference is :meth:`last_change`."""
        runs = [run for run in system.runs if run.across]
        after = float(np.mean([self._values.of_run(run, metric, self.averaged[-1]).mean() for run in runs]))
        return after - change.value, after

    def _same_as_own(self, run: RunSummary, stage: int, tested: Predictions) -> Predictions:
        if tested.users != run.stages[stage].predictions.users:
            raise _not_paired(run.name, f"its test on stage {stage}", stage)
        return tested

    def _moments(
        self, system: System, metric: Metric, stages: Sequence[int], group: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """For each seed, the mean (seeds,) and the influence of each user on it (seeds, users)."""
        panel = self._panel_of_group(system, stages, group)
        values = self._values.of_system(system, metric, stages)[:, self._inside(system, stages, group)]
        return values @ panel.weight, panel.influence(values)

    def _inside(self, system: System, stages: Sequence[int], group: int | None) -> np.ndarray:
        """bool (cases of the stages,): whether the user belongs to the segment; all True if ``group`` is
        None."""
        groups = [USERS.assign(stage, system.first.stages[stage].predictions) for stage in stages]
        ordered = [
            g[self._values.order(system.first, stage)] for g, stage in zip(groups, stages, strict=True)
        ]
        joined = np.concatenate(ordered)
        return np.ones(len(joined), dtype=bool) if group is None else joined == group

    def _panel_of_group(self, system: System, stages: Sequence[int], group: int | None) -> Panel:
        if group is None:
            return self._values.panel(system, stages, "macro")
        users = np.concatenate([self._values.users(system.first, stage) for stage in stages])
        return Panel.of([users[self._inside(system, stages, group)]], "micro")

    def _estimate(
        self, system: System, metric: Metric, stages: Sequence[int], average: Literal["macro", "micro"]
    ) -> Estimate:
        return Estimate.of(
            self._values.of_system(system, metric, stages), self._values.panel(system, stages, average)
        )

    # -- standing ----------------------------------------------------------------------------------

    def rivals(self, metric: Metric) -> list[System]:
        """The systems that can be compared in the metric: all of them, except in log-probability.

        Log-probabilities of baselines and of models without an item head are normalized over different sets,
        so only models are compared if there are such models.
        """
        if metric.name == LOG_PROBABILITY and self.codes_and_items:
            return [system for system in self.systems if not system.first.baseline]
        return self.systems

    @property
    def codes_and_items(self) -> bool:
        """Whether there are both baselines and models without an item head, whose log-probabilities cannot be
        compared."""
        runs = [system.first for system in self.systems]
        return any(run.baseline for run in runs) and any(not (run.baseline or run.item_head) for run in runs)

    def contrasts(self, metric: Metric) -> Contrasts:
        """The differences between all pairs of the metric's rivals, macro-averaged over the averaged stages.

        Raises:
            WorkspaceError: the systems answered different cases.
        """
        self.require_same_cases()
        rivals = self.rivals(metric)
        key = tuple(system.name for system in rivals)
        if key not in self._contrasts:  # shared by all metrics with these rivals
            alike = [each for each in self.metrics if self.rivals(each) == rivals]
            systems = [
                SystemValues(
                    system.name,
                    system.seeds,
                    {each.name: self._values.of_system(system, each, self.averaged) for each in alike},
                )
                for system in rivals
            ]
            self._contrasts[key] = Contrasts(systems, self._values.panel(rivals[0], self.averaged, "macro"))
        return self._contrasts[key]

    def standing(self, metric: Metric) -> Standing:
        """Which of the metric's rivals is best on average, and which are not significantly worse."""
        rivals = self.rivals(metric)
        best = max(rivals, key=lambda system: self.average(system, metric).value)
        if not self.same_cases or len(rivals) == 1:
            return Standing(best, (), ())
        contrasts = self.contrasts(metric)
        rest = sorted(
            (system for system in rivals if system is not best),
            key=lambda system: -contrasts.mean(metric.name, system.name),
        )
        ties = set(contrasts.ties(metric.name, best.name))
        return Standing(
            best,
            tuple(system for system in rest if system.name in ties),
            tuple(system for system in rest if system.name not in ties),
        )

    def standings_by_stage(self, metric: Metric, stages: Sequence[int]) -> dict[int, Standing]:
        """The standing at each of the given stages, which all systems must have.

        The p values come from the paired t test and are corrected over all stages and pairs together.
        """
        rivals = self.rivals(metric)
        pairs = list(combinations(range(len(rivals)), 2))
        comparable = [stage for stage in stages if self._same_cases_at(stage)]
        p = {}
        for stage in comparable:
            moments = [self._moments(system, metric, [stage]) for system in rivals]
            for a, b in pairs:
                (one, z_one), (two, z_two) = moments[a], moments[b]
                seeds = (rivals[a].seeds, rivals[b].seeds)
                found = spread_of_difference((one, two), (z_one, z_two), seeds)
                p[stage, a, b] = found.p(float(one.mean() - two.mean()))
        adjusted = dict(zip(p, holm(np.array(list(p.values()))), strict=True))
        result = {}
        for stage in stages:
            means = [self._values.of_system(system, metric, [stage]).mean() for system in rivals]
            best = int(np.argmax(means))
            tied: list[System] = []
            behind: list[System] = []
            if stage in comparable:
                for number in sorted(set(range(len(means))) - {best}, key=lambda i: -means[i]):
                    apart = adjusted[stage, min(best, number), max(best, number)] <= LEVEL
                    (behind if apart else tied).append(rivals[number])
            result[stage] = Standing(rivals[best], tuple(tied), tuple(behind))
        return result


@dataclass(frozen=True)
class Standing:
    """The best system, and how the others compare with it.

    ``tied`` systems are not significantly worse, ``behind`` ones are. Both are empty if the systems answered
    different cases, because then their differences cannot be tested.
    """

    best: System
    tied: tuple[System, ...]
    behind: tuple[System, ...]


def _not_paired(one: str, other: str, stage: int) -> WorkspaceError:
    return WorkspaceError(
        f"{one} and {other} answered different cases of stage {stage}, so they cannot be compared in pairs; "
        "test both on the same stream, or, if users were erased from one of them (`peso forget`), erase them "
        "from the other, too"
    )
