"""Options that a configuration leaves open, chosen on validation cases, with one budget for all baselines.

A baseline lists settings that it tries (``SETTINGS``), the usual one first. Given options hold in all
of them. The one with the highest mean NDCG of the validation targets is taken, the first among equals. What
was tried and what was chosen is recorded with the stage.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from peso.baselines.baseline import Baseline, batches, repeats_occur
from peso.evaluation.metrics import ndcg
from peso.events.histories import Cases, Stage
from peso.runtime.files import read_json_object, write_json
from peso.runtime.progress import Observer

MOST_TRIALS = 8  # settings of every baseline, so that the budget is the same
TUNED_ON = 2048  # validation cases of a stage, evenly spaced, if it has more
LEAST = 1e-2  # weight of popularity beside evidence: with less, the temperature is that of what has none
CHOSEN = "chosen.json"


class Tuned(Baseline):
    """A baseline whose open options are chosen on validation cases."""

    SETTINGS: ClassVar[Sequence[Mapping[str, Any]]]
    """At most ``MOST_TRIALS``, each with a value for every option that may be left open."""

    class Options(Baseline.Options):
        trials: int = Field(
            MOST_TRIALS,
            ge=1,
            le=MOST_TRIALS,
            exclude_if=lambda trials: trials == MOST_TRIALS,
            description="settings of the options without a value that are compared on validation; 1: the "
            "usual one is taken",
        )

    def settings(self) -> list[dict[str, Any]]:
        """The settings to try: those of ``SETTINGS`` with the options that are given, each once."""
        given = {name: value for name, value in self.options.given().items() if value is not None}
        found: list[dict[str, Any]] = []
        for setting in self.SETTINGS[: self.options.trials]:
            own = {name: given.get(name, value) for name, value in setting.items()}
            if own not in found:
                found.append(own)
        return found

    def validation(self, stages: Sequence[Stage]) -> Validation:
        """The cases on which settings for the last of these stages are compared."""
        cases = stages[-1].validation_cases(self.window)
        rows = np.unique(np.linspace(0, len(cases) - 1, min(len(cases), TUNED_ON)).astype(np.int64))
        asked = self.options.repeats
        repeats = repeats_occur(stages) if asked == "auto" else asked == "keep"
        return Validation(cases.take(rows), self.setting.depth, repeats)


class Counted(Tuned):
    """A tuned baseline that learns from all stages at once, in seconds. It saves what it chose.

    It adds up evidence for each item, and scores an item by the logarithm of its sum: softmax at temperature
    τ gives P(j) ∝ (sum_j + least_j)^(1/τ). With plain sums thousands of items without evidence would share
    nearly all of the probability, and a semantic ID of two such items would rank above all others.
    """

    continues, revision = False, 1

    popularity: np.ndarray
    """float64 (items,): ``least_j``, by which items without evidence are ordered (:func:`least`)."""

    @abstractmethod
    def sums(self, cases: Cases) -> np.ndarray:
        """float (n, items): the evidence for each item; what is negative speaks against it."""

    def scores(self, cases: Cases) -> np.ndarray:
        return np.log(np.maximum(self.sums(cases), 0.0) + self.popularity).astype(np.float32)

    @abstractmethod
    def counts(self, stages: Sequence[Stage]) -> Any:
        """What every setting starts from."""

    @abstractmethod
    def fit(self, counts: Any, setting: Mapping[str, Any]) -> dict[str, Any]:
        """Take a setting. Returns figures to record. Does not change ``counts``."""

    def try_out(self, counts: Any, setting: Mapping[str, Any]) -> None:
        """Take a setting to compare it with others, where this can be done faster."""
        self.fit(counts, setting)

    def learn(self, stages: Sequence[Stage], observer: Observer) -> dict[str, Any]:
        counts, settings, tried = self.counts(stages), self.settings(), []
        self.chosen = settings[0]
        if len(settings) > 1:
            validation = self.validation(stages)
            observer.begin(f"{self.name}: tune on validation of stage {stages[-1].number}", len(settings), "")
            for done, setting in enumerate(settings, 1):
                self.try_out(counts, setting)
                tried.append({**setting, "ndcg": validation.ndcg_of(self)})
                observer.advance(done)
            observer.end()
            self.chosen = settings[best_of(tried)]
            observer.note(f"{self.name}: {told(self.chosen)}, the best of {len(settings)} on validation")
        return {**self.fit(counts, self.chosen), **record(self.chosen, tried)}

    def save(self, directory: Path) -> None:
        write_json(directory / CHOSEN, self.chosen)

    def restore(self, directory: Path, stages: Sequence[Stage]) -> None:
        """As it was saved; by an earlier version, which tuned nothing, without a file."""
        file = directory / CHOSEN
        self.chosen = dict(read_json_object(file)) if file.exists() else self.settings()[0]
        self.fit(self.counts(stages), self.chosen)


class Validation:
    """Cases on which settings are compared: the mean NDCG@depth of their targets.

    Args:
        repeats: whether items that a user has had are ranked like others.
    """

    def __init__(self, cases: Cases, depth: int, repeats: bool) -> None:
        self.cases, self.depth, self.repeats = cases, depth, repeats

    def ndcg_of(self, baseline: Baseline) -> float:
        """0 where there are no cases."""
        if not len(self.cases):
            return 0.0
        ranks = [self._ranks(baseline.scores(part), part) for part in batches(self.cases)]
        return float(ndcg(np.concatenate(ranks), self.depth).mean())

    def _ranks(self, scores: np.ndarray, part: Cases) -> np.ndarray:
        if not self.repeats:
            for row, seen in zip(scores, part.seen, strict=True):
                row[seen] = -np.inf
        return target_ranks(scores, part.targets)


def least(counts: np.ndarray) -> np.ndarray:
    """float64 (items,): a hundredth of each item's share of the counts, to all of which one is added."""
    return LEAST * (counts + 1) / (counts.sum() + len(counts))


def target_ranks(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """int64 (n,): place of each target by its score among all items, from 1; ties go to the smaller item.

    >>> target_ranks(np.array([[1.0, 3.0, 3.0, 2.0]] * 2), np.array([2, 0])).tolist()
    [2, 4]
    """
    own = scores[np.arange(len(scores)), targets][:, None]
    before = np.arange(scores.shape[1]) < targets[:, None]
    return 1 + ((scores > own) | ((scores == own) & before)).sum(axis=1)


def best_of(tried: Sequence[Mapping[str, Any]]) -> int:
    """The number of the one with the highest ``ndcg``, the first among equals."""
    return max(range(len(tried)), key=lambda number: (tried[number]["ndcg"], -number))


def told(setting: Mapping[str, Any]) -> str:
    """``neighbours 100, shrinkage 10``"""
    return ", ".join(f"{name} {value:g}" for name, value in setting.items())


def record(chosen: Mapping[str, Any], tried: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of a choice."""
    return {"chosen": dict(chosen), "tried": json.loads(json.dumps(list(tried)))}
