"""The interface of a baseline: it learns stage after stage and scores every item for a user."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from pydantic import Field

from peso.config.baselines import BASELINES, BaselineOptions
from peso.config.parsing import Repeats
from peso.events.histories import Cases, Stage
from peso.runtime.progress import Observer, Silent

if TYPE_CHECKING:
    import torch

    from peso.items.semantic_ids import ItemTrie


@dataclass(frozen=True)
class Setting:
    """What a baseline is made for.

    ``trie``: the catalog; ``window``: how many items of a history are used; ``device``: for the networks, the
    other baselines use NumPy.
    """

    trie: ItemTrie
    window: int
    seed: int = 0
    device: torch.device | str = "cpu"

    @property
    def items(self) -> int:
        return len(self.trie.leaf_of)


class Part:
    """What a configuration can name under `baselines`: a :class:`Baseline` or a
    :class:`~peso.baselines.answers.Fusion`.

    The options are the fields of the nested class ``Options``: their types, bounds and defaults hold for a
    configuration and for the constructor alike.
    """

    name: ClassVar[str] = ""
    random: ClassVar[bool] = False
    """Whether what it learns depends on the seed."""

    class Options(BaselineOptions):
        pass

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if name := cls.__dict__.get("name"):
            BASELINES.add(name, cls)


class Baseline(Part, ABC):
    """A recommender in its state after some stage.

    Args:
        setting: what it is made for.
        options: of this baseline, as keywords.

    Raises:
        ConfigError: an unknown or impossible option.
    """

    probabilistic: ClassVar[bool] = False
    """Whether softmax over the scores is the model's own distribution over the next item. If not, a
    temperature is fitted to the validation cases."""

    class Options(BaselineOptions):
        repeats: Repeats = Field(
            "auto",
            description="items that a user has had, as answers; auto: left out where no training target was "
            "one",
        )

    options: Any

    def __init__(self, setting: Setting, **options: Any) -> None:
        self.setting = setting
        self.items, self.window = setting.items, setting.window
        self.options = type(self).Options.checked(self.name or type(self).__name__, options)

    @classmethod
    def of(cls, options: BaselineOptions, setting: Setting) -> Self:
        """One with these options that has not learned anything yet."""
        return cls(setting, **options.given())

    @abstractmethod
    def learn(self, stages: Sequence[Stage], observer: Observer) -> dict[str, Any]:
        """Learn the last of these stages, after the others. Returns figures to record."""

    @abstractmethod
    def scores(self, cases: Cases) -> np.ndarray:
        """float32 (n, items): larger is better. Reads users and histories, never targets."""

    def save(self, directory: Path) -> None:
        """Write to an empty directory what cannot be recomputed from the stages in seconds."""

    def restore(self, directory: Path, stages: Sequence[Stage]) -> None:
        """Restore the state saved here, after learning these stages."""
        self.learn(stages, Silent())


def known_histories(stages: Sequence[Stage]) -> dict[str, np.ndarray]:
    """The items that each user is known to have had after training on the last of these stages, oldest first.

    Of the last stage only what models train on counts: ``current[:-2]`` of the users who take part. All other
    events of it become known with the next stage.
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
    """Whether any user is known to have had an item twice, after training on the last of these stages."""
    *past, latest = stages
    for stage in past:
        if _has_repeat([np.concatenate(pair) for pair in zip(stage.previous, stage.current, strict=True)]):
            return True
    return _has_repeat([*latest.previous, *(one.items for one in latest.training_sequences())])


def _has_repeat(sequences: Sequence[np.ndarray]) -> bool:
    """Whether some item is twice in one of the sequences."""
    owners = np.repeat(np.arange(len(sequences)), [len(items) for items in sequences])
    items = np.concatenate([np.empty(0, dtype=np.int64), *sequences])
    keys = owners * (items.max(initial=0) + 1) + items
    return len(np.unique(keys)) < len(keys)


def padded(histories: Sequence[np.ndarray], window: int, padding: int) -> np.ndarray:
    """int64 (n, window): the last ``window`` items of each history, padded on the right."""
    result = np.full((len(histories), window), padding, dtype=np.int64)
    for row, history in zip(result, histories, strict=True):
        last = history[-window:]
        row[: len(last)] = last
    return result


Matrix = Any  # scipy.sparse.csr_array, which has no type stubs


def interactions(histories: Sequence[np.ndarray], items: int) -> Matrix:
    """float64 (n, items): 1 where an item is in a history, however often.

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
