"""What a report needs to know of a run, as plain values."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import yaml

from peso.evaluation.catalogue import Catalogue
from peso.evaluation.predictions import Predictions


@dataclass(frozen=True)
class StageCost:
    """What learning one stage took; None where it was not measured.

    ``bytes_on_disk``: of the files that the stage added, those that serving it needs.
    """

    seconds: float | None = None
    peak_memory_bytes: int | None = None
    trained_parameters: int | None = None
    bytes_on_disk: int | None = None


@dataclass(frozen=True, eq=False)
class TrainingCurve:
    """Samples along the training of one stage, in order of step (1-based); not every step need be there.

    Attributes:
        steps: int (n,).
        loss: float (n,), without the penalty.
        gradient_norm: float (n,), of that loss over the adapter.
        penalty_gradient_norm: float (n,), of the strategy's penalty; 0 where there is none.
        validation_steps, validation_loss: (epochs,), at the end of each.
    """

    steps: np.ndarray
    loss: np.ndarray
    gradient_norm: np.ndarray
    penalty_gradient_norm: np.ndarray
    validation_steps: np.ndarray
    validation_loss: np.ndarray

    @classmethod
    def of_records(cls, records: Iterable[Mapping[str, Any]]) -> TrainingCurve:
        """From the lines of ``log.jsonl``: one record a step, and at the end of an epoch one that has
        ``validation_loss`` instead."""
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
    """One stage of a run: its answers, and what it took to learn (None: nothing was learned).

    ``anchor``: how the adapter moved and what restrained it: ``moved``
    (:func:`peso.adapters.anchor_report.anchor_report`), the figures of
    :func:`peso.adapters.anchor_report.anchor_effect`, ``strategy`` (weight, strength, ρ̄); empty if no
    adapter was trained. ``leaves_out_seen``: whether items that a user has had were left out of the answers.
    ``warnings``: what is wrong with them (:mod:`peso.evaluation.metrics`).
    """

    predictions: Predictions
    cost: StageCost | None = None
    curve: TrainingCurve | None = None
    anchor: Mapping[str, Any] = field(default_factory=dict)
    leaves_out_seen: bool = False
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class RunSummary:
    """One run.

    Attributes:
        name: tells it from the other runs of a report.
        strategy: how its stages were learned, in a few words, e.g. ``peso (weight 2, mean)``.
        stages: by number.
        configuration: YAML text.
        manifests: the chain, oldest first: each a JSON-like dictionary.
        drift: of the stream, one dictionary a stage (:func:`peso.events.drift.drift`).
        semantic_ids: the manifest of the index: figures, ``quality``, ``fitness``.
        family: the strategy's own name, where ``strategy`` is what somebody called it.
        reference: what others are measured against it for: ``no updates``, ``fine-tuning``, ``retraining``.
        data_set, backbone: what it ran on, where a report holds several.
        seed: None where nothing is random. Runs that differ in nothing but the seed are one system.
        options: what an option grid sets apart, by key of the configuration, e.g. ``{"strategy.name": "peso",
            "strategy.weight": 2.0}``.
        across: answers of the model after stage i to the cases of stage j ≠ i, by (i, j).
        catalogue: of its stream and index; None: figures that need it are left out.
        expected_stages: how many it should have; fewer is a run not done yet. 0: not known.
        baseline: whether no language model answered. Its probabilities are of items and sum to one over the
            catalog; a model's are of codes, some of which no item has.
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


UNTOLD = ("seed", "report")  # keys of a configuration that do not make another system


@dataclass(frozen=True, eq=False)
class System:
    """One way of learning, run with one or several seeds.

    Attributes:
        name: tells it from the other systems of a report; label: what it is called where it is shown.
        runs: at least one, in order of their seeds.
    """

    name: str
    label: str
    runs: tuple[RunSummary, ...]

    @property
    def first(self) -> RunSummary:
        """The run that stands for all where one is enough."""
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
        """Whether chance in training cannot be told from these runs."""
        return len(self.runs) == 1 and self.first.seed is not None

    @property
    def stages(self) -> list[int]:
        """The stages that all its runs have, ascending."""
        return sorted(set.intersection(*(set(run.stages) for run in self.runs)))


def systems_of(runs: Sequence[RunSummary]) -> list[System]:
    """Put runs together, systems in order of their first run.

    Runs that are alike in all but the seed are one system; two of the same seed, or without one, are not. A
    label is the strategy where that tells systems apart, else the run's name is added.
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
