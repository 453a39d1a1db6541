"""Popularity: the same list for every user, the items that most events were about.

Knows stages and semantic IDs; knows nothing of models. The least that a recommender has to beat.

What counts, for a list made at stage t: every event of the stages before t, and of stage t the part that
models train on: the items of ``current[:-2]`` of users with at least three items in the stage. The events
that stage t holds back for validation and test are not counted, nor those of users whom its protocol leaves
out. With ``last`` = n only stages t - n + 1 … t count: a recent window, or with 1 stage t alone.

An event before stage t that only a ``previous`` list tells of is not counted, except those of the first stage
given: later ``previous`` lists repeat what earlier stages hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peso.errors import ConfigError
from peso.evaluation.predictions import Predictions, make_predictions
from peso.evaluation.segments import CaseLabels
from peso.events.histories import Cases, Stage
from peso.items.semantic_ids import SemanticIds
from peso.items.trie import ItemTrie
from peso.runtime.progress import Observer


class Popularity:
    """The list as a baseline (:class:`~peso.baselines.baseline.Baseline`). There is nothing to save.

    Every semantic ID is counted once more than it was seen, shared evenly by the items that carry it, so
    that the probabilities of semantic IDs are those of :func:`leaf_log_probabilities`.
    """

    probabilistic = True

    def __init__(self, trie: ItemTrie, last: int | None = None) -> None:
        self.last = last
        self.added = (1 / np.bincount(trie.leaf_of))[trie.leaf_of]
        self.log_counts = np.log(self.added)

    def learn(self, stages: Sequence[Stage], observer: Observer) -> dict[str, Any]:
        counts = item_counts(stages, len(self.added), self.last)
        self.log_counts = np.log(counts + self.added)
        return {"events": int(counts.sum())}

    def scores(self, cases: Cases) -> np.ndarray:
        return np.tile(self.log_counts.astype(np.float32), (len(cases), 1))

    def save(self, directory: Path) -> None: ...

    def restore(self, directory: Path, stages: Sequence[Stage]) -> None:
        self.log_counts = np.log(item_counts(stages, len(self.added), self.last) + self.added)


def item_counts(stages: Sequence[Stage], items: int, last: int | None = None) -> np.ndarray:
    """How many events each item had, as known when the last of these stages has been learnt.

    Args:
        stages: consecutive, the last one being the stage that the list is made at.
        items: size of the catalogue.
        last: count the newest so many of them only; None: all.

    Returns: int64 (items,).
    """
    *past, latest = stages
    seen = [sequence.items[sequence.first_target :] for sequence in latest.training_sequences()]
    if last is None:
        seen += [stages[0].previous.values, *(stage.current.values for stage in past)]
    elif last > 1:
        seen += [stage.current.values for stage in past[-(last - 1) :]]
    return np.bincount(np.concatenate([np.empty(0, dtype=np.int32), *seen]), minlength=items)


def leaf_log_probabilities(counts: np.ndarray, semantic_ids: SemanticIds) -> np.ndarray:
    """Add-one smoothed log-frequency of each semantic ID, float64 (leaves,).

    log p(leaf) = log( (Σ_{items of leaf} count + 1) / (Σ count + leaves) ), so that it sums to one over the
    semantic IDs of the catalogue.
    """
    trie = semantic_ids.trie
    per_leaf = np.bincount(trie.leaf_of, weights=counts, minlength=trie.leaves)
    return np.log(per_leaf + 1) - np.log(per_leaf.sum() + trie.leaves)


def predict_popularity(
    stages: Sequence[Stage],
    on: Stage,
    labels: CaseLabels,
    semantic_ids: SemanticIds,
    depth: int = 10,
    last: int | None = None,
) -> Predictions:
    """Answer the test cases of a stage with the most popular semantic IDs.

    Items that a user already has are not left out: the models of the protocol do not leave them out either.
    Ties go to the semantic ID with the smaller codes.

    Args:
        stages: 0 … t, what the list is made from (see the module's opening); usually up to ``on``, fewer for
            a list that is no longer kept up to date.
        on: the stage whose test cases are answered.
        labels: of those cases (segments.label_cases).
        depth: semantic IDs in the list.
        last: see :func:`item_counts`.

    Raises:
        ConfigError: ``depth`` is more than the catalogue has semantic IDs.
    """
    log_probabilities = leaf_log_probabilities(
        item_counts(stages, len(semantic_ids.item_ids), last), semantic_ids
    )
    if depth > len(log_probabilities):
        raise ConfigError(
            f"a list of {depth} is asked for, but the catalogue has {len(log_probabilities)} semantic IDs; "
            "set decoding.beams lower"
        )
    best = np.argsort(-log_probabilities, kind="stable")[:depth]
    cases = on.test_cases(window=1)
    everyone = (len(cases), 1)
    return make_predictions(
        cases,
        labels,
        leaves=np.tile(best, everyone),
        scores=np.tile(log_probabilities[best], everyone),
        target_log_probability=log_probabilities[semantic_ids.trie.leaf_of[cases.targets]],
        semantic_ids=semantic_ids,
    )
