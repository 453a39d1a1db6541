"""The contents of a run that a report shows, as plain values."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import yaml

from peso.evaluation.catalogue import Catalogue
from peso.evaluation.predictions import Predictions
from peso.events.histories import TargetUsers
from peso.items.names import ItemNames


@dataclass(frozen=True)
class StageCost:
    """The cost of training one stage. A value is None if it was not measured.

    ``bytes_on_disk`` counts the files that the stage added and that are needed to serve it.
    """

    seconds: float | None = None
    peak_memory_bytes: int | None = None
    trained_parameters: int | None = None
    bytes_on_disk: int | None = None


@dataclass(frozen=True, eq=False)
class TrainingCurve:
    """Measurements during the training of one stage, in order. Some steps may be missing.

    Attributes:
        steps: int (n,), the number of each step, counted from 1.
        loss: float (n,), the loss without the penalty.
        gradient_norm: float (n,), the norm of the gradient of that loss over the adapter.
        penalty_gradient_norm: float (n,), the norm of the gradient of the strategy's penalty; 0 without one.
        validation_steps, validation_loss: (epochs,), the step and the validation loss at the end of each
            epoch.
    """

    steps: np.ndarray
    loss: np.ndarray
    gradient_norm: np.ndarray
    penalty_gradient_norm: np.ndarray
    validation_steps: np.ndarray
    validation_loss: np.ndarray

    @classmethod
    def of_records(cls, records: Iterable[Mapping[str, Any]]) -> TrainingCurve:
        """Build the curve from the lines of ``log.jsonl``: one record per step, and one with
        ``validation_loss`` at the end of each epoch."""
        records = list(records)
        steps = [record for record in records if "loss" in record]
        epochs = [record for record in records if "validation_loss" in record]

        def column(rows: list[Mapping[str, Any]], name: str) -> np.ndarray:
            return np.array([row[name] for row in rows], dtype=np.float64)

        return cls(
            steps=column(steps, "step"),
            loss=column(steps, "loss"),
            gradient_norm=column(steps, "gradient_norm"),
            penalty_gradient_norm=column(steps, "penalty_gradient_norm"),
            validation_steps=column(epochs, "step"),
            validation_loss=column(epochs, "validation_loss"),
        )


@dataclass(frozen=True)
class StageSummary:
    """One stage of a run.

    Attributes:
        predictions: the model's answers to the test cases.
        cost: the cost of training; None if nothing was trained.
        curve: measurements during training; None if nothing was trained.
        anchor: how the adapter moved and what restrained it: ``moved``
            (:func:`peso.adapters.anchor_report.anchor_report`), the results of
            :func:`peso.adapters.anchor_report.anchor_effect`, and ``strategy`` (weight, strength, ρ̄). It is
            empty if no adapter was trained.
        leaves_out_seen: whether items that a user has already had were left out of the answers.
        target_users: the users whose events were training targets (``training.users``).
        warnings: problems with the answers, see :func:`peso.evaluation.metrics.warnings`.
        trials: what chose the learning rates of each training, see :mod:`peso.training.rate_trials`.
    """

    predictions: Predictions
    cost: StageCost | None = None
    curve: TrainingCurve | None = None
    anchor: Mapping[str, Any] = field(default_factory=dict)
    leaves_out_seen: bool = False
    target_users: TargetUsers = "tested"
    warnings: Sequence[str] = ()
    trials: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class RunSummary:
    """One run.

    Attributes:
        name: a name that is unique in the report.
        strategy: how its stages were trained, in a few words, e.g. ``peso (weight 2, mean)``.
        stages: the stages by number.
        configuration: the configuration as YAML text.
        manifests: the chain of manifests, oldest first, each a JSON-like dictionary.
        drift: the drift of the stream, one dictionary per stage (:func:`peso.events.drift.drift`).
        semantic_ids: the manifest of the index, with its statistics, ``quality`` and ``fitness``.
        family: the name of the strategy, if ``strategy`` is a name that the user gave.
        reference: the role of this run as a reference for others: ``no updates``, ``fine-tuning`` or
            ``retraining``; empty if it has none.
        data_set, backbone: the data set and backbone, if a report has several.
        seed: the seed; None if nothing is random. Runs that differ only in the seed are one system.
        options: the options that an option grid varies, by key of the configuration, e.g.
            ``{"strategy.name": "peso", "strategy.weight": 2.0}``.
        across: the answers of the model after stage i to the cases of stage j ≠ i, by (i, j).
        catalogue: the catalog of its stream and index. If it is None, statistics that need it are left out.
        expected_stages: the number of stages of the finished run; 0 if it is not known.
        baseline: whether this is a baseline without a language model. Its probabilities are over items and
            sum to one over the catalog; a model's are over codes, including combinations that no item has.
        item_head: whether this is a model with an item head, whose probabilities are mostly over items, too.
        contains_model: whether this baseline answers together with the run's model, as a hybrid does.
        untested: the trained stages that are not tested with the present settings.
        verdicts: what the gate decided, by stage (``gate.json``).
    """

    name: str
    strategy: str
    stages: Mapping[int, StageSummary]
    configuration: str = ""
    manifests: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    drift: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    semantic_ids: Mapping[str, Any] = field(default_factory=dict)
    data_set: str = ""
    backbone: str = ""
    seed: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    across: Mapping[tuple[int, int], Predictions] = field(default_factory=dict)
    catalogue: Catalogue | None = None
    expected_stages: int = 0
    family: str = ""
    reference: str = ""
    baseline: bool = False
    item_head: bool = False
    contains_model: bool = False
    untested: Sequence[int] = ()
    verdicts: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)

    def named(self, names: ItemNames) -> RunSummary:
        """The same run with other names of renamed items."""
        if not names:
            return self
        stages = {
            t: replace(stage, predictions=stage.predictions.named(names)) for t, stage in self.stages.items()
        }
        across = {key: predictions.named(names) for key, predictions in self.across.items()}
        return replace(self, stages=stages, across=across)


UNTOLD = ("seed", "report", "gate")  # keys in which the configurations of one system may differ


@dataclass(frozen=True, eq=False)
class System:
    """A strategy with its settings, run with one or several seeds.

    Attributes:
        name: a name that is unique in the report.
        label: the name that the report shows.
        runs: the runs in order of their seeds, at least one.
    """

    name: str
    label: str
    runs: tuple[RunSummary, ...]

    @property
    def first(self) -> RunSummary:
        """The run with the smallest seed, which represents the system where one run is enough."""
        return self.runs[0]

    @property
    def family(self) -> str:
        """The strategy's name without its options: ``peso`` of ``peso (weight 2)`` and ``peso[weight=2]``."""
        named = (
            self.first.family
            or self.first.options.get("strategy.name")
            or re.split(r"[ \[(]", self.first.strategy)[0]
        )
        return str(named)

    @property
    def seeds(self) -> list[int | None]:
        return [run.seed for run in self.runs]

    @property
    def one_seed(self) -> bool:
        """Whether there is only one seed, so that the variation between seeds is unknown."""
        return len(self.runs) == 1 and self.first.seed is not None

    @property
    def stages(self) -> list[int]:
        """The stages that all its runs have, ascending."""
        return sorted(set.intersection(*(set(run.stages) for run in self.runs)))


def systems_of(runs: Sequence[RunSummary]) -> list[System]:
    """Group runs into systems, in the order of each system's first run.

    Runs that differ only in the seed form one system; two runs with the same seed, or without a seed, do not.
    A system is labeled by its strategy; if several systems have the same strategy, the run's name is added.
    """
    groups: dict[Hashable, list[RunSummary]] = {}
    for run in runs:
        key: Hashable = ("run", run.name) if run.seed is None else _likeness(run)
        if any(other.seed == run.seed for other in groups.get(key, [])):
            key = ("run", run.name)
        groups.setdefault(key, []).append(run)
    times = Counter(group[0].strategy for group in groups.values())
    systems = []
    for group in groups.values():
        first = min(group, key=lambda run: run.seed or 0)
        label = first.strategy if times[first.strategy] == 1 else f"{first.strategy} · {first.name}"
        ordered = sorted(group, key=lambda run: run.seed or 0)
        systems.append(System(first.name, label, tuple(ordered)))
    return systems


def _likeness(run: RunSummary) -> Hashable:
    options = tuple(sorted((key, str(value)) for key, value in run.options.items()))
    return run.data_set, run.backbone, run.strategy, options, _without_seed(run.configuration)


@lru_cache(maxsize=256)
def _without_seed(configuration: str) -> str:
    values = yaml.safe_load(configuration) if configuration else {}
    return yaml.safe_dump({key: value for key, value in values.items() if key not in UNTOLD})
