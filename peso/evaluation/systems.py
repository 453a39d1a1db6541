"""Systems: runs that differ only in their seed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import yaml

from peso.evaluation.run_summary import RunSummary

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
