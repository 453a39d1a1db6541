"""Hyperparameter search on validation cases, with the same budget for every baseline.

The values of options that the configuration leaves open are taken from ``SETTINGS``, a list of candidate
settings of the baseline, of which the first is the default. The setting with the highest mean NDCG of the
validation targets is chosen; of equal ones, the first. All results are recorded with the stage.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from peso.baselines.baseline import Baseline, batches, repeats_occur
from peso.config.parsing import new_key
from peso.evaluation.metrics import ndcg
from peso.events.histories import Cases, Stage
from peso.runtime.files import read_json_object, write_json
from peso.runtime.progress import Observer

MOST_TRIALS = 8  # the largest number of settings of a baseline
TUNED_ON = 2048  # the largest number of validation cases of a stage, evenly spaced
LEAST = (
    1e-2  # the weight of popularity; with less, only items without evidence would determine the temperature
)
CHOSEN = "chosen.json"


class Tuned(Baseline):
    """A baseline whose open options are chosen on validation cases."""

    SETTINGS: ClassVar[Sequence[Mapping[str, Any]]]
    """At most ``MOST_TRIALS`` settings, each with a value for every option that can be left open."""

    class Options(Baseline.Options):
        trials: int = new_key(
            MOST_TRIALS,
            ge=1,
            le=MOST_TRIALS,
            description="number of settings compared on validation for options without a value; 1: use "
            "the defaults",
        )

    chosen: dict[str, Any] | None = None
    """The chosen setting; None before the first stage is learned."""

    def save(self, directory: Path) -> None:
        write_json(directory / CHOSEN, self.chosen)

    def saved_setting(self, directory: Path) -> dict[str, Any]:
        """The setting that :meth:`save` wrote. Older versions wrote none, because they used the default."""
        file = directory / CHOSEN
        return dict(read_json_object(file)) if file.exists() else self.settings()[0]

    def settings(self) -> list[dict[str, Any]]:
        """The settings to compare: those of ``SETTINGS`` with the given options, without duplicates."""
        given = {name: value for name, value in self.options.given().items() if value is not None}
        found: list[dict[str, Any]] = []
        for setting in self.SETTINGS[: self.options.trials]:
            own = {name: given.get(name, value) for name, value in setting.items()}
            if own not in found:
                found.append(own)
        return found

    def validation(self, stages: Sequence[Stage]) -> Validation:
        """The validation cases on which settings for the last of these stages are compared."""
        cases = stages[-1].validation_cases(self.window)
        option = self.options.repeats
        repeats = repeats_occur(stages) if option == "auto" else option == "keep"
        return Validation(cases.spread(TUNED_ON), self.setting.depth, repeats)


class Counted(Tuned):
    """A tuned baseline that is computed from all stages at once, in seconds. Only its setting is saved.

    It sums the evidence for each item, and the score is the logarithm of the sum, so that a softmax at the
    temperature τ gives P(j) ∝ (sum_j + least_j)^(1/τ). If the sums themselves were the scores, the thousands
    of items without evidence would have nearly all of the probability, and a semantic ID of two such items
    would rank above all others.
    """

    continues, revision = False, 1

    popularity: np.ndarray
    """float64 (items,), ``least_j`` (:func:`least`), by which items without evidence are ordered."""

    @abstractmethod
    def sums(self, cases: Cases) -> np.ndarray:
        """The evidence for each item: float (n, items). Negative values count as 0."""

    def scores(self, cases: Cases) -> np.ndarray:
        return np.log(np.maximum(self.sums(cases), 0.0) + self.popularity).astype(np.float32)

    @abstractmethod
    def counts(self, stages: Sequence[Stage]) -> Any:
        """The statistics of the stages that are the same for all settings."""

    @abstractmethod
    def fit(self, counts: Any, setting: Mapping[str, Any]) -> dict[str, Any]:
        """Compute the model for a setting, without changing ``counts``. Returns values to record, as JSON."""

    def try_out(self, counts: Any, setting: Mapping[str, Any]) -> None:
        """Compute the model for a comparison of settings. A subclass may use a faster approximation."""
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
            best = described(self.chosen)
            observer.note(f"{self.name}: {best}, the best of {len(settings)} on validation")
        return {**self.fit(counts, self.chosen), **record(self.chosen, tried)}

    def restore(self, directory: Path, stages: Sequence[Stage]) -> None:
        self.chosen = self.saved_setting(directory)
        self.fit(self.counts(stages), self.chosen)


class Validation:
    """The validation cases of a stage, and the metric by which settings are compared.

    Args:
        depth: the length of the lists.
        repeats: whether items that a user has had are ranked like others.
    """

    def __init__(self, cases: Cases, depth: int, repeats: bool) -> None:
        self.cases, self.depth, self.repeats = cases, depth, repeats

    def ndcg_of(self, baseline: Baseline) -> float:
        """The mean NDCG@depth of the targets; 0 if there are no cases."""
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
    """Each item's share of the counts after add-one smoothing, times ``LEAST``: float64 (items,)."""
    return LEAST * (counts + 1) / (counts.sum() + len(counts))


def target_ranks(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The rank of each target's score among all items, from 1, with ties in ascending order: int64 (n,).

    >>> target_ranks(np.array([[1.0, 3.0, 3.0, 2.0]] * 2), np.array([2, 0])).tolist()
    [2, 4]
    """
    own = scores[np.arange(len(scores)), targets][:, None]
    before = np.arange(scores.shape[1]) < targets[:, None]
    return 1 + ((scores > own) | ((scores == own) & before)).sum(axis=1)


def best_of(tried: Sequence[Mapping[str, Any]]) -> int:
    """The index of the entry with the highest ``ndcg``; of equal ones, the first."""
    return max(range(len(tried)), key=lambda number: (tried[number]["ndcg"], -number))


def described(setting: Mapping[str, Any]) -> str:
    """A setting as text.

    >>> described({"neighbours": 100, "shrinkage": 10.0})
    'neighbours 100, shrinkage 10'
    """
    return ", ".join(f"{name} {value:g}" for name, value in setting.items())


def record(chosen: Mapping[str, Any], tried: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The chosen setting and the results of all settings, as JSON."""
    return {"chosen": dict(chosen), "tried": json.loads(json.dumps(list(tried)))}
