"""Turns a baseline's scores of items into ranked semantic IDs, as a model of the protocol gives them.

Scores become probabilities of items, p(i) = softmax(s_i / τ). τ is 1 for a model whose softmax is its own
distribution; otherwise it maximizes the likelihood of the validation targets. A semantic ID is ranked by the
total probability of its items, and items that share an ID keep the order of the catalog, as in every model's
answer. So ranks and log-probabilities of baselines and models mean the same.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from peso.baselines.baseline import Baseline, Part
from peso.events.histories import Cases
from peso.items.semantic_ids import ItemTrie

if TYPE_CHECKING:
    from peso.model.generative import GenerativeModel

BATCH = 64  # cases scored together: 13 MB in float64 with 26,000 items, small enough for a cache
# added to ln p of items that the user has had where items never repeat; finite, since a repeat may still come
REPEAT = np.log(1e-6)
FITTED_ON = 1024  # validation cases for fitting the temperature
INVERSE_TEMPERATURES = (1e-3, 1e6)  # search range of 1 / τ


@dataclass(frozen=True)
class Answers:
    """The ranked answers to n cases.

    ``leaves``: int64 (n, depth), semantic IDs, best first, padded with -1. ``scores``: float64 (n, depth),
    their log-probabilities. ``target_log_probability``: float64 (n,), of the targets' semantic IDs.
    """

    leaves: np.ndarray
    scores: np.ndarray
    target_log_probability: np.ndarray


class Answerer(Protocol):
    """What can be tested: a baseline after a stage, or a fusion of models."""

    @property
    def settings(self) -> dict[str, Any]:
        """What was chosen on the validation cases, for the record."""

    def answer(self, cases: Cases, depth: int, advance: Callable[[int], None]) -> Answers:
        """Rank ``depth`` semantic IDs for each case, or all where the catalog has fewer.

        ``advance`` is called with the number of cases done.
        """


class Fusion(Part, Answerer):
    """A baseline that learns nothing itself: it answers with another one and the run's own model."""

    tunes: bool
    """Whether something is left to choose on validation cases."""

    @classmethod
    @abstractmethod
    def of(
        cls,
        options: Any,
        partner: Answerer,
        model: GenerativeModel,
        settings: dict[str, Any],
        batch_size: int | None,
    ) -> Self:
        """Both as they stand after a stage. ``settings``: what :meth:`tuned` chose then, or {}."""

    @abstractmethod
    def tuned(self, validation: Cases, depth: int, advance: Callable[[int], None]) -> Self:
        """With what ranks the validation targets best."""


@dataclass(frozen=True)
class BaselineAnswers:
    """A baseline, and how its scores become probabilities.

    ``inverse_temperature``: 1 / τ. ``repeats``: whether items that the user has had are recommended like
    others.
    """

    baseline: Baseline
    trie: ItemTrie
    inverse_temperature: float = 1.0
    repeats: bool = True

    @classmethod
    def fitted(
        cls, baseline: Baseline, trie: ItemTrie, validation: Cases, *, repeats: bool
    ) -> BaselineAnswers:
        """With the temperature that maximizes the likelihood of the validation targets, if one is needed."""
        from scipy.optimize import minimize_scalar

        plain = cls(baseline, trie, repeats=repeats)
        if baseline.probabilistic or not len(validation):
            return plain
        rows = np.linspace(0, len(validation) - 1, min(len(validation), FITTED_ON)).astype(np.int64)
        cases = validation.take(np.unique(rows))
        scores = [(part, baseline.scores(part)) for part in batches(cases)]

        def loss(log_inverse: float) -> float:
            return -sum(
                _item_log_probabilities(some, part, np.exp(log_inverse), repeats)[
                    np.arange(len(part)), part.targets
                ].sum()
                for part, some in scores
            )

        low, high = np.log(INVERSE_TEMPERATURES)
        found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 0.01})
        return cls(baseline, trie, float(np.exp(found.x)), repeats)

    @property
    def settings(self) -> dict[str, Any]:
        return {"inverse_temperature": self.inverse_temperature, "repeats": self.repeats}

    def log_probabilities(self, cases: Cases) -> np.ndarray:
        """float64 (n, leaves): log-probability of every semantic ID."""
        items = _item_log_probabilities(
            self.baseline.scores(cases), cases, self.inverse_temperature, self.repeats
        )
        return _of_leaves(items, self.trie)

    def answer(self, cases: Cases, depth: int, advance: Callable[[int], None]) -> Answers:
        found, done, depth = [], 0, min(depth, self.trie.leaves)
        for part in batches(cases):
            log_probabilities = self.log_probabilities(part)
            best = top(log_probabilities, depth)
            targets = self.trie.leaf_of[part.targets]
            found.append(
                Answers(
                    best,
                    np.take_along_axis(log_probabilities, best, axis=1),
                    log_probabilities[np.arange(len(part)), targets],
                )
            )
            done += len(part)
            advance(done)
        return Answers(
            np.concatenate([one.leaves for one in found]),
            np.concatenate([one.scores for one in found]),
            np.concatenate([one.target_log_probability for one in found]),
        )


def batches(cases: Cases) -> Iterator[Cases]:
    """The cases in order, ``BATCH`` at a time."""
    for begin in range(0, len(cases), BATCH):
        yield cases.take(np.arange(begin, min(begin + BATCH, len(cases))))


def top(scores: np.ndarray, depth: int) -> np.ndarray:
    """int64 (n, depth): columns of the largest scores, best first; ties go to the smaller column.

    >>> top(np.array([[1.0, 3.0, 3.0, 2.0]]), depth=3).tolist()
    [[1, 2, 3]]
    """
    result = np.empty((len(scores), depth), dtype=np.int64)
    for row, values in zip(result, scores, strict=True):
        least = np.partition(values, -depth)[-depth]
        above = np.flatnonzero(values > least)  # fewer than depth, ascending
        row[: len(above)] = above[np.argsort(-values[above], kind="stable")]
        row[len(above) :] = np.flatnonzero(values == least)[: depth - len(above)]
    return result


def _of_leaves(items: np.ndarray, trie: ItemTrie) -> np.ndarray:
    """(n, leaves): log of the total probability of each leaf's items. Few leaves have more than one."""
    result = items[:, trie.items[trie.item_starts[:-1]]]
    counts = np.diff(trie.item_starts)
    for place in range(1, counts.max()):
        shared = np.flatnonzero(counts > place)
        other = items[:, trie.items[trie.item_starts[shared] + place]]
        result[:, shared] = np.logaddexp(result[:, shared], other)
    return result


def _item_log_probabilities(
    scores: np.ndarray, cases: Cases, inverse_temperature: float, repeats: bool
) -> np.ndarray:
    scaled = scores.astype(np.float64) * inverse_temperature
    if not repeats:
        for row, seen in zip(scaled, cases.seen, strict=True):
            row[seen] += REPEAT
    scaled -= scaled.max(axis=1, keepdims=True)
    scaled -= np.log(np.exp(scaled).sum(axis=1, keepdims=True))
    return scaled
