"""Whether a model has learned enough: a check on the validation cases of its stage, when training ends, and
what the check of its test needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from peso.evaluation.metrics import FEWEST, first_items, ndcg, warnings
from peso.evaluation.predictions import semantic_id_ranks
from peso.events.histories import Cases, Stage
from peso.runs.stage import RunStage
from peso.runtime.processes import current
from peso.runtime.progress import Observer, Silent

if TYPE_CHECKING:
    from peso.model.generative import GenerativeModel
    from peso.model.transitions import Transitions

CHECKED_ON = 500  # validation cases of a stage, evenly spaced, if it has more
EASE_ITEMS = 2500  # with the most users; a solution for more takes longer than some trainings
EASE_PENALTY = 50.0


@dataclass(frozen=True)
class Answers:
    """The answers to validation cases, as :func:`peso.evaluation.metrics.warnings` reads them: ``items`` are
    leaves of the trie."""

    items: Sequence[Sequence[int]]
    rank_semantic_id: np.ndarray
    target_level_log_probabilities: np.ndarray | None
    target_log_probability: np.ndarray
    depth: int

    def __len__(self) -> int:
        return len(self.items)


@dataclass(frozen=True)
class Rivals:
    """Simple recommenders that know the events up to a stage, and their answers to some cases.

    Attributes:
        stage: the stage.
        cases: the cases, with whole prompts as histories.
        depth: the length of the lists.
    """

    stage: RunStage
    cases: Cases
    depth: int

    @cached_property
    def _known(self) -> list[Stage]:
        return [self.stage.workspace.stream.stage(number) for number in range(self.stage.number + 1)]

    @property
    def popular_ranks(self) -> np.ndarray:
        """int (n,): the rank of each target among the stage's most popular items, 0 if it is not listed."""
        from peso.baselines.popularity import Popularity

        return self._ranks(Popularity, last=1)

    @property
    def ease_ranks(self) -> np.ndarray:
        """int (n,): the rank of each target in the list of EASE, 0 if it is not listed."""
        from peso.baselines.ease import Ease

        return self._ranks(Ease, items=EASE_ITEMS, regularisation=EASE_PENALTY)

    def log_frequencies(self, item_head: bool) -> np.ndarray:
        """float (n,): ln of the share that the first code of each target has in the stage's training targets,
        or the target itself for a model with an item head, with add-one smoothing."""
        ids = self.stage.semantic_ids
        found = (s.items[s.first_target :] for s in self._known[-1].training_sequences())
        targets = np.concatenate([np.empty(0, dtype=np.int64), *found])  # all users may have been erased
        numbers, size = ids.codes[:, 0], ids.sizes[0]
        if item_head:
            numbers, size = np.arange(len(ids.item_ids)), len(ids.item_ids)
        counts = np.bincount(numbers[targets], minlength=size) + 1.0
        result: np.ndarray = np.log(counts / counts.sum())[numbers[self.cases.targets]]
        return result

    def count_ranks(self, transitions: Transitions) -> np.ndarray:
        """int (n,): the rank of each target in the list of counted transitions alone, 0 if it is not listed
        or has no evidence. Items with the same evidence are in the order of the catalog."""
        result = np.zeros(len(self.cases), dtype=np.int64)
        for row, (history, target) in enumerate(zip(self.cases.histories, self.cases.targets, strict=True)):
            (evidence,) = transitions.evidence([history])
            rank = 1 + (evidence > evidence[target]).sum() + (evidence[:target] == evidence[target]).sum()
            if evidence[target] and rank <= self.depth:
                result[row] = rank
        return result

    def _ranks(self, kind: Any, **options: Any) -> np.ndarray:
        from peso.baselines.baseline import BaselineAnswers, Setting

        trie, keeps = self.stage.semantic_ids.trie, not self.stage.leaves_out_seen
        rival = kind(Setting(trie, self.stage.workspace.config.prompt.window), **options)
        rival.learn(self._known, Silent())
        answers = BaselineAnswers(rival, trie, repeats=keeps)
        found = answers.answer(self.cases, min(self.depth, trie.leaves), lambda done: None)
        return semantic_id_ranks(found.leaves, trie.leaf_of[self.cases.targets])


def check_health(stage: RunStage, model: GenerativeModel, observer: Observer) -> dict[str, Any]:
    """Compare a trained model with popularity and EASE on validation cases, and look for a collapse.

    Every problem is a note that begins with "warning:".

    Args:
        stage: the stage.
        model: the model after training, in evaluation mode.
        observer: receives progress and notes.

    Returns:
        For ``metrics.json``: the number of ``cases``, the mean NDCG of the model (``ndcg@10``), of the most
        popular items, of EASE and of the model's counts of transitions alone, the effective number of first
        items, and the ``warnings`` by kind. Empty if there are too few cases.
    """
    from peso.runs.validation import search_validation, validation_cases

    trie = stage.semantic_ids.trie
    cases = validation_cases(stage, CHECKED_ON)
    if len(cases) < FEWEST:
        return {}
    found = search_validation(stage, model, cases, "check on validation", observer)
    if not current().is_main:  # only the main process writes figures
        return {}
    assert found.target_scores is not None  # targets were given
    depth = min(10, stage.workspace.config.decoding.beams)
    leaves = found.leaves[:, :depth]
    answers = Answers(
        [row[row >= 0].tolist() for row in leaves],
        semantic_id_ranks(leaves, trie.leaf_of[cases.targets]),
        found.targets,
        found.target_scores,
        depth,
    )
    rivals = Rivals(stage, cases, depth)
    popular, ease = rivals.popular_ranks, rivals.ease_ranks
    counts = None if model.transitions is None else rivals.count_ranks(model.transitions)
    told = warnings(
        answers,
        popular,
        rivals.log_frequencies(model.has_item_head),
        ease_ranks=ease,
        count_ranks=counts,
        catalogue=trie.leaves,
        item_head=model.has_item_head,
    )
    for text in told.values():
        observer.note(f"warning: stage {stage.number}, on {len(cases):,} validation cases: {text}")
    ranks = {f"ndcg@{depth}": answers.rank_semantic_id, "popularity": popular, "ease": ease}
    if counts is not None:
        ranks["counts"] = counts
    return {
        "cases": len(cases),
        **{name: float(ndcg(each, depth).mean()) for name, each in ranks.items()},
        "first_items": first_items(answers)[0],
        "warnings": told,
    }


def known_warnings(stage: RunStage) -> list[str]:
    """The warnings of a tested stage: those of its test, and those of training that the test cannot have, or
    all of training if the test has none."""
    tested = stage.metrics["test"].get("warnings", ())
    trained = stage.training.get("health", {})
    others = {
        kind: text
        for kind, text in trained.get("warnings", {}).items()
        if kind in ("ease", "counts") or not tested
    }
    return [*tested, *(f"on {trained['cases']:,} validation cases, {text}" for text in others.values())]
