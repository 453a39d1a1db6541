"""The interface of a baseline: it learns stage after stage and scores every item for a user.

Scores are converted to item probabilities, p(i) = softmax(s_i / τ). τ is 1 for a baseline whose softmax is
its own distribution; otherwise it maximizes the likelihood of the validation targets. A semantic ID is ranked
by the total probability of its items, and items that share an ID keep the order of the catalog. So the ranks
and log-probabilities of baselines are comparable with those of the language model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import numpy as np
from pydantic import Field

from peso.config.baselines import BASELINES, BaselineOptions
from peso.config.model import Repeats
from peso.events.histories import Cases, Stage
from peso.items.semantic_ids import ItemTrie
from peso.runtime.progress import Observer, Silent

if TYPE_CHECKING:
    import torch

    from peso.model.generative import GenerativeModel


@dataclass(frozen=True)
class Setting:
    """The data and environment of a baseline.

    Attributes:
        trie: the catalog.
        window: the number of items of a history that are used.
        seed: the seed of everything random.
        device: the device of networks. Other baselines use NumPy.
        depth: the length of the lists by which values of options are compared.
    """

    trie: ItemTrie
    window: int
    seed: int = 0
    device: torch.device | str = "cpu"
    depth: int = 10

    @property
    def items(self) -> int:
        """The number of items of the catalog."""
        return len(self.trie.leaf_of)


class Part:
    """An entry of the section ``baselines`` of a configuration: a :class:`Baseline` or a :class:`Fusion`.

    The options are the fields of the nested class ``Options``, whose types, bounds and defaults apply to both
    the configuration and the constructor.
    """

    name: ClassVar[str] = ""
    revision: ClassVar[int] = 0
    """A number that is increased when the same options give other results, so that stored results are
    computed again."""
    random: ClassVar[bool] = False
    """Whether the result depends on the seed."""

    class Options(BaselineOptions):
        pass

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if name := cls.__dict__.get("name"):
            BASELINES.add(name, cls)


class Baseline(Part, ABC):
    """A recommender in its state after some stage.

    Args:
        setting: the catalog, the window and the device.
        options: the fields of ``Options``, as keywords.

    Raises:
        ConfigError: an unknown option or an invalid value.
    """

    probabilistic: ClassVar[bool] = False
    """Whether softmax over the scores is the model's own distribution over the next item. If not, a
    temperature is fitted to the validation cases."""
    continues: ClassVar[bool] = True
    """Whether learning a stage starts from the state after the previous one, which is restored first."""

    class Options(BaselineOptions):
        repeats: Repeats = Field(
            "auto",
            description="whether items that a user has had are recommended; auto: only if training targets "
            "repeat",
        )

    options: Any

    def __init__(self, setting: Setting, **options: Any) -> None:
        self.setting = setting
        self.items, self.window = setting.items, setting.window
        self.options = type(self).Options.checked(self.name or type(self).__name__, options)

    @classmethod
    def of(cls, options: BaselineOptions, setting: Setting) -> Self:
        """Create an untrained baseline with these options."""
        return cls(setting, **options.given())

    @abstractmethod
    def learn(self, stages: Sequence[Stage], observer: Observer) -> dict[str, Any]:
        """Learn the last of these stages; the others come before it. Returns values to record, as JSON."""

    @abstractmethod
    def scores(self, cases: Cases) -> np.ndarray:
        """A score of every item for each case: float32 (n, items), where larger is better. It depends on the
        users and histories of the cases, not on their targets."""

    def save(self, directory: Path) -> None:
        """Write the state to an empty directory, except what :meth:`restore` computes again in seconds."""

    def restore(self, directory: Path, stages: Sequence[Stage]) -> None:
        """Restore the state that was saved after learning these stages."""
        self.learn(stages, Silent())


def known_histories(stages: Sequence[Stage]) -> dict[str, np.ndarray]:
    """The items of each user, oldest first, that may be used when training on the last of these stages.

    Of the last stage, these are the training targets. Its other events may be used from the next stage on.
    """
    *past, latest = stages
    known: dict[str, np.ndarray] = {}
    for stage in past:
        for user, previous, current in zip(stage.users, stage.previous, stage.current, strict=True):
            known[user] = np.concatenate([previous, current])
    known.update(zip(latest.users, latest.previous, strict=True))
    known.update({sequence.user: sequence.items for sequence in latest.training_sequences()})
    return {user: items for user, items in known.items() if len(items)}


def repeats_occur(stages: Sequence[Stage]) -> bool:
    """Whether any user has an item twice in the data for training on the last of these stages."""
    *past, latest = stages
    return any(map(has_repeats, past)) or has_repeats(latest, trained_on=True)


def has_repeats(stage: Stage, *, trained_on: bool = False) -> bool:
    """Whether a user of a stage has an item twice.

    Args:
        stage: the stage.
        trained_on: whether to ignore the events that the stage holds out for validation and testing.
    """
    if trained_on:
        return _has_repeat([*stage.previous, *(one.items for one in stage.training_sequences())])
    return _has_repeat([np.concatenate(pair) for pair in zip(stage.previous, stage.current, strict=True)])


def _has_repeat(sequences: Sequence[np.ndarray]) -> bool:
    """Whether any of the sequences contains an item twice."""
    owners = np.repeat(np.arange(len(sequences)), [len(items) for items in sequences])
    items = np.concatenate([np.empty(0, dtype=np.int64), *sequences])
    keys = owners * (items.max(initial=0) + 1) + items
    return len(np.unique(keys)) < len(keys)


def padded(histories: Sequence[np.ndarray], window: int, padding: int) -> np.ndarray:
    """The last ``window`` items of each history, padded on the right: int64 (n, window)."""
    result = np.full((len(histories), window), padding, dtype=np.int64)
    for row, history in zip(result, histories, strict=True):
        last = history[-window:]
        row[: len(last)] = last
    return result


Matrix = Any  # scipy.sparse.csr_array, which has no type stubs


def interactions(histories: Sequence[np.ndarray], items: int) -> Matrix:
    """A sparse matrix with 1 where an item is in a history, once or more often: float64 (n, items).

    >>> interactions([np.array([2, 0, 2]), np.array([1])], items=3).toarray().tolist()
    [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    """
    from scipy import sparse

    lengths = [len(history) for history in histories]
    rows = np.repeat(np.arange(len(histories)), lengths)
    columns = np.concatenate([np.empty(0, dtype=np.int32), *histories])
    matrix = sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=(len(histories), items))
    matrix.sum_duplicates()
    matrix.data[:] = 1.0
    return matrix


BATCH = 64  # cases to score together: 13 MB in float64 with 26,000 items, which fits in a cache
# added to ln p of items that the user has had, if items do not repeat; finite, because a target may repeat
REPEAT = np.log(1e-6)
FITTED_ON = 1024  # the number of validation cases to fit the temperature on
INVERSE_TEMPERATURES = (1e-3, 1e6)  # the range of 1 / τ


@dataclass(frozen=True)
class Answers:
    """The ranked answers to n cases.

    Attributes:
        leaves: int64 (n, depth), the semantic IDs as leaves of the trie, best first, padded with -1.
        scores: float64 (n, depth), their log-probabilities.
        target_log_probability: float64 (n,), the log-probability of each target's semantic ID.
    """

    leaves: np.ndarray
    scores: np.ndarray
    target_log_probability: np.ndarray


class Answerer(Protocol):
    """A baseline after a stage, or a fusion of models, that ranks semantic IDs."""

    @property
    def settings(self) -> dict[str, Any]:
        """The values that were chosen on the validation cases, as JSON."""

    def answer(self, cases: Cases, depth: int, advance: Callable[[int], None]) -> Answers:
        """Rank the best semantic IDs for each case.

        Args:
            cases: the cases.
            depth: the number of semantic IDs; if the catalog has fewer, all are ranked.
            advance: called with the number of cases done so far.
        """


class Fusion(Part, Answerer):
    """A combination of the language model with baselines, which has no parameters to train."""

    tunes: bool
    """Whether options must still be chosen on validation cases."""

    @classmethod
    @abstractmethod
    def of(
        cls,
        options: Any,
        partners: Sequence[Answerer],
        model: GenerativeModel,
        settings: dict[str, Any],
        batch_size: int | None,
    ) -> Self:
        """Combine models in their states after a stage.

        Args:
            options: the options of the combination.
            partners: the baselines to combine with the model.
            model: the language model.
            settings: the values that :meth:`tuned` chose; empty before it.
            batch_size: the largest number of users in a batch of the model's search; None for the default.
        """

    @abstractmethod
    def tuned(self, validation: Cases, depth: int, advance: Callable[[int], None]) -> Self:
        """The combination with the options that rank the validation targets best.

        Args:
            validation: the validation cases.
            depth: the length of the lists by which options are compared.
            advance: called with the number of cases done so far.
        """


@dataclass(frozen=True)
class BaselineAnswers:
    """A baseline, and the parameters that convert its scores to probabilities.

    Attributes:
        baseline: the baseline after a stage.
        trie: the catalog.
        inverse_temperature: 1 / τ.
        repeats: whether items that the user has had are recommended like others.
    """

    baseline: Baseline
    trie: ItemTrie
    inverse_temperature: float = 1.0
    repeats: bool = True

    @classmethod
    def fitted(
        cls, baseline: Baseline, trie: ItemTrie, validation: Cases, *, repeats: bool
    ) -> BaselineAnswers:
        """Fit the temperature by maximum likelihood of the validation targets, if the baseline needs one."""
        from scipy.optimize import minimize_scalar

        plain = cls(baseline, trie, repeats=repeats)
        if baseline.probabilistic or not len(validation):
            return plain
        scores = [(part, baseline.scores(part)) for part in batches(validation.spread(FITTED_ON))]

        def loss(log_inverse: float) -> float:
            total = 0.0
            for part, some in scores:
                found = _item_log_probabilities(some, part, np.exp(log_inverse), repeats)
                total -= float(found[np.arange(len(part)), part.targets].sum())
            return total

        low, high = np.log(INVERSE_TEMPERATURES)
        found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 0.01})
        return cls(baseline, trie, float(np.exp(found.x)), repeats)

    @property
    def settings(self) -> dict[str, Any]:
        return {"inverse_temperature": self.inverse_temperature, "repeats": self.repeats}

    def log_probabilities(self, cases: Cases) -> np.ndarray:
        """The log-probability of every semantic ID: float64 (n, leaves)."""
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
    """The columns of the largest scores, best first, with ties in ascending order: int64 (n, depth).

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
    """The logarithm of the total probability of each leaf's items: (n, items) → (n, leaves)."""
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
    """The log-probability of every item: float64 (n, items)."""
    scaled = scores.astype(np.float64) * inverse_temperature
    if not repeats:
        for row, seen in zip(scaled, cases.seen, strict=True):
            row[seen] += REPEAT
    scaled -= scaled.max(axis=1, keepdims=True)
    scaled -= np.log(np.exp(scaled).sum(axis=1, keepdims=True))
    return scaled
