"""A hybrid: the two-tower model and a language model vote by their log-probabilities.

For a semantic ID c and a weight w:

    score(c) = w · ln p_towers(c) + (1 − w) · ln p_llm(c)

Candidates are the best of each model together, and both models score all of them, so nothing is guessed. The
weight is the one with the highest NDCG on the validation cases. The scores are a logarithmic pool, which is
not normalised: by Hölder's inequality Σ_c p_towers^w p_llm^(1−w) ≤ 1, so the score of the target is a lower
bound of its log-probability under the normalised pool.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import BeforeValidator, Field

from peso.baselines.baseline import Answerer, Answers, BaselineAnswers, Fusion, batches, top
from peso.baselines.two_tower import TwoTower
from peso.config.baselines import BASELINES, BaselineOptions
from peso.config.model import MOST_BEAMS
from peso.events.histories import Cases
from peso.runtime.machine import threads

if TYPE_CHECKING:
    from peso.decoding import Beams
    from peso.model.generative import GenerativeModel

WEIGHTS = tuple(round(0.05 * step, 2) for step in range(21))


def _two_tower(value: Any) -> Any:
    return BASELINES.read({"name": TwoTower.name, **value}) if isinstance(value, Mapping) else value


@dataclass(frozen=True)
class Hybrid(Fusion):
    """The two-tower model and the run's own language model, fused.

    ``towers``, ``llm``: the two after a stage; ``weight``: of the towers.
    """

    name = "hybrid"
    random = True

    class Options(BaselineOptions):
        candidates: int = Field(
            50, ge=1, le=MOST_BEAMS, description="semantic IDs that each of the two proposes"
        )
        weight: float | None = Field(
            None,
            ge=0,
            le=1,
            description="of the two-tower's log-probability; none given: tuned on validation",
        )
        two_tower: Annotated[TwoTower.Options, BeforeValidator(_two_tower)] = TwoTower.Options(
            name=TwoTower.name
        )

        @property
        def partner(self) -> BaselineOptions:
            return self.two_tower

        def memory(self, items: int, users: int, window: int) -> int:
            return self.two_tower.memory(items, users, window)

    towers: BaselineAnswers
    llm: GenerativeModel
    candidates: int
    weight: float
    search_batch: int | None = None
    tunes: bool = False

    @classmethod
    def of(
        cls,
        options: Hybrid.Options,
        partner: Answerer,
        model: GenerativeModel,
        settings: dict[str, Any],
        batch_size: int | None,
    ) -> Hybrid:
        assert isinstance(partner, BaselineAnswers)
        weight = settings.get("weight", options.weight)
        given = 0.5 if weight is None else weight
        return cls(partner, model, options.candidates, given, batch_size, tunes=weight is None)

    def tuned(self, validation: Cases, depth: int, advance: Callable[[int], None]) -> Hybrid:
        """With the weight that ranks the validation targets best."""
        found, *_ = self._propose(validation, advance)
        targets = self.towers.trie.leaf_of[validation.targets]
        return replace(self, weight=best_weight(found, targets, depth)[0], tunes=False)

    @property
    def settings(self) -> dict[str, Any]:
        return {"weight": self.weight, "repeats": self.towers.repeats}

    def answer(self, cases: Cases, depth: int, advance: Callable[[int], None]) -> Answers:
        found, towers, llm = self._propose(cases, advance)
        leaves, scores = pooled(found, self.weight, depth)
        return Answers(leaves, scores, pool(towers, llm, self.weight))

    def _propose(
        self, cases: Cases, advance: Callable[[int], None]
    ) -> tuple[Candidates, np.ndarray, np.ndarray]:
        """The candidates of all cases, and the log-probability of each target: the towers' and the LLM's."""
        from peso.decoding import search

        parts, of_targets, of_llm, done = [], [], [], 0
        trie = self.towers.trie
        count = min(self.candidates, trie.leaves)
        for part in batches(cases):
            every = self.towers.log_probabilities(part)  # (n, leaves)
            seen = None if self.towers.repeats else part.seen
            mine = top(every, count)
            # as many beams as candidates: none of them is lost on the way
            with threads(self.llm):
                judged = search(
                    self.llm,
                    part.histories,
                    beams=count,
                    batch_size=self.search_batch,
                    exclude=seen,
                    allow=[np.concatenate([trie.items_of(leaf) for leaf in row]) for row in mine],
                )
                theirs = search(
                    self.llm,
                    part.histories,
                    beams=count,
                    batch_size=self.search_batch,
                    exclude=seen,
                    targets=part.targets,
                )
            assert theirs.target_scores is not None
            of_llm.append(theirs.target_scores.astype(np.float64))
            parts.append(joined(_scored(every, theirs), _scored(every, judged)))
            of_targets.append(every[np.arange(len(part)), trie.leaf_of[part.targets]])
            done += len(part)
            advance(done)
        columns = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("leaves", "towers", "llm")
        }
        return Candidates(**columns), np.concatenate(of_targets), np.concatenate(of_llm)


@dataclass(frozen=True)
class Candidates:
    """leaves: int64 (n, candidates), distinct in each row but for -1, where there is none; towers, llm:
    float (n, candidates), log-probabilities, -inf where there is no candidate."""

    leaves: np.ndarray
    towers: np.ndarray
    llm: np.ndarray


def joined(first: Candidates, second: Candidates) -> Candidates:
    """The candidates of both, each once."""
    leaves = np.concatenate([first.leaves, second.leaves], axis=1)
    order = np.argsort(leaves, axis=1, kind="stable")
    ascending = np.take_along_axis(leaves, order, axis=1)
    again = np.zeros_like(leaves, dtype=bool)
    np.put_along_axis(again, order[:, 1:], ascending[:, 1:] == ascending[:, :-1], axis=1)
    towers = np.concatenate([first.towers, second.towers], axis=1)
    llm = np.concatenate([first.llm, second.llm], axis=1)
    gone = again | (leaves < 0)
    return Candidates(
        np.where(gone, -1, leaves), np.where(gone, -np.inf, towers), np.where(gone, -np.inf, llm)
    )


def pooled(candidates: Candidates, weight: float, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """The best candidates by the formula above: leaves int64 (n, depth), -1 where there are fewer, and their
    scores float64. Of equal ones the smaller leaf comes first."""
    scores = pool(candidates.towers, candidates.llm, weight)
    order = np.lexsort((candidates.leaves, -scores), axis=1)[:, :depth]
    leaves = np.take_along_axis(candidates.leaves, order, axis=1)
    return leaves, np.take_along_axis(scores, order, axis=1)


def pool(towers: np.ndarray, llm: np.ndarray, weight: float) -> np.ndarray:
    """The formula above; -inf where either is."""
    if weight in (0.0, 1.0):  # 0 · (−inf) is no number
        return np.where(np.isneginf(towers) | np.isneginf(llm), -np.inf, towers if weight else llm)
    return weight * towers + (1 - weight) * llm


def best_weight(candidates: Candidates, targets: np.ndarray, depth: int) -> tuple[float, list[float]]:
    """The weight of ``WEIGHTS`` with the highest mean NDCG@depth, the most even one among equals, and the
    means.

    Args:
        targets: int (n,), leaves.
    """
    from peso.evaluation.metrics import ndcg
    from peso.evaluation.predictions import semantic_id_ranks

    means = []
    for weight in WEIGHTS:
        leaves, _ = pooled(candidates, weight, depth)
        means.append(float(ndcg(semantic_id_ranks(leaves, targets), depth).mean()))
    best = max(range(len(WEIGHTS)), key=lambda i: (means[i], -abs(WEIGHTS[i] - 0.5)))
    return WEIGHTS[best], means


def _scored(every: np.ndarray, found: Beams) -> Candidates:
    towers = np.take_along_axis(every, np.maximum(found.leaves, 0), axis=1)
    absent = found.leaves < 0
    return Candidates(found.leaves, np.where(absent, -np.inf, towers), found.scores.astype(np.float64))
