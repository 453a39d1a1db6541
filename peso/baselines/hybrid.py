"""A hybrid is the weighted mean of the log-probabilities of the run's language model and of baselines.

For a semantic ID c and baselines m = 1 … M with weights w_m ≥ 0, Σ w_m ≤ 1:

    score(c) = Σ_m w_m · ln p_m(c) + (1 − Σ_m w_m) · ln p_llm(c)

The candidates are the union of each model's best semantic IDs, and every model scores all of them. The
weights maximize NDCG on the validation cases. For one baseline, they are found by grid search; for several,
by coordinate descent on this grid, with the other weights rescaled in proportion, until none improves. The
scores are a logarithmic opinion pool without normalization. By Hölder's inequality Σ_c Π_m p_m(c)^w_m ≤ 1, so
the score of the target is a lower bound of its log-probability under the normalized pool.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import (
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from peso.baselines.baseline import Answerer, Answers, BaselineAnswers, Fusion, batches, top
from peso.baselines.two_tower import TwoTower
from peso.config.baselines import BASELINES, BaselineOptions, baseline_label
from peso.config.model import MOST_BEAMS
from peso.events.histories import Cases
from peso.runtime.machine import threads

if TYPE_CHECKING:
    from peso.model.generative import GenerativeModel

WEIGHTS = tuple(round(0.05 * step, 2) for step in range(21))
MOST_ROUNDS = 5  # of coordinate descent


@dataclass(frozen=True)
class Hybrid(Fusion):
    """The run's language model and baselines, combined.

    Attributes:
        partners: the baselines after a stage.
        llm: the language model after the stage.
        candidates: the number of semantic IDs that each model proposes.
        weights: the weights of the partners. The language model has the rest.
        search_batch: the largest number of users in a batch of the model's search; None for the default.
        tunes: whether the weights must still be chosen on validation cases.
    """

    name = "hybrid"
    random = True

    class Options(BaselineOptions):
        candidates: int = Field(50, ge=1, le=MOST_BEAMS, description="semantic IDs that each model proposes")
        weight: float | list[float] | None = Field(
            None,
            description="weight of the partner's log-probability, or a list with one for each partner; "
            "default: tuned on validation",
        )
        # parsed by _read and not by type, because a hybrid is itself a baseline, so that a schema of all keys
        # would be infinite
        partners: list[SerializeAsAny[BaselineOptions]] = Field(
            [TwoTower.Options(name=TwoTower.name)],
            min_length=1,
            description="baselines to combine with the model, as under `baselines` (default: two-tower)",
        )

        @model_validator(mode="before")
        @classmethod
        def _accept_two_tower(cls, tree: Any) -> Any:
            """Accept the older key ``two_tower``."""
            if not isinstance(tree, Mapping) or "two_tower" not in tree:
                return tree
            if "partners" in tree:
                raise ValueError(
                    "`two_tower` and `partners` exclude each other; name two-tower with its options among "
                    "`partners`, and remove `two_tower`"
                )
            result = dict(tree)
            options = result.pop("two_tower")
            if not isinstance(options, Mapping):
                raise ValueError(
                    "two_tower takes the options of two-tower; name other partners in `partners`"
                )
            return {**result, "partners": [{**options, "name": TwoTower.name}]}

        @field_validator("partners", mode="before")
        @classmethod
        def _read(cls, value: Any) -> Any:
            listed = [value] if isinstance(value, str | Mapping) else value
            return [BASELINES.read(each) for each in listed] if isinstance(listed, list) else listed

        @model_validator(mode="after")
        def _fits(self) -> Hybrid.Options:
            labels = [baseline_label(partner) for partner in self.partners]
            if any(partner.fused for partner in self.partners):
                raise ValueError("a hybrid cannot be a partner of a hybrid; name its partners instead")
            if len(set(labels)) < len(labels):
                raise ValueError(f"hybrid: a partner is named twice ({', '.join(labels)}); remove one")
            if self.weight is not None:
                weights = self.weight if isinstance(self.weight, list) else [self.weight]
                if len(weights) != len(labels):
                    raise ValueError(
                        f"hybrid: {len(weights)} weights for {len(labels)} partners ({', '.join(labels)}); "
                        "give one for each, or none"
                    )
                if min(weights) < 0 or sum(weights) > 1 + 1e-9:
                    raise ValueError("hybrid: weights are at least 0, and their sum at most 1")
            return self

        @model_serializer(mode="wrap")
        def _write_two_tower(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
            """Write the older key ``two_tower`` where possible, so that stored results keep their digests."""
            tree: dict[str, Any] = handler(self)
            if "partners" in tree and [partner.name for partner in self.partners] == [TwoTower.name]:
                tree["two_tower"] = tree.pop("partners")[0]
            return tree

        @property
        def fused(self) -> Sequence[BaselineOptions]:
            return self.partners

        def memory(self, items: int, users: int, window: int) -> int:
            return sum(partner.memory(items, users, window) for partner in self.partners)

    partners: Sequence[BaselineAnswers]
    llm: GenerativeModel
    candidates: int
    weights: tuple[float, ...]
    search_batch: int | None = None
    tunes: bool = False

    @classmethod
    def of(
        cls,
        options: Hybrid.Options,
        partners: Sequence[Answerer],
        model: GenerativeModel,
        settings: dict[str, Any],
        batch_size: int | None,
    ) -> Hybrid:
        own = [partner for partner in partners if isinstance(partner, BaselineAnswers)]
        assert len(own) == len(partners)
        weight = settings.get("weight", options.weight)
        even = (1 / (len(own) + 1),) * len(own)
        weights = even if weight is None else tuple(weight) if isinstance(weight, list) else (weight,)
        return cls(own, model, options.candidates, weights, batch_size, tunes=weight is None)

    def tuned(self, validation: Cases, depth: int, advance: Callable[[int], None]) -> Hybrid:
        """The hybrid with the weights that rank the validation targets best."""
        found, _ = self._propose(validation, advance)
        targets = self.partners[0].trie.leaf_of[validation.targets]
        return replace(self, weights=best_weights(found, targets, depth)[0], tunes=False)

    @property
    def repeats(self) -> bool:
        """Whether items that the user has had are recommended: only if all partners recommend them."""
        return all(partner.repeats for partner in self.partners)

    @property
    def settings(self) -> dict[str, Any]:
        weight = self.weights[0] if len(self.weights) == 1 else list(self.weights)
        return {"weight": weight, "repeats": self.repeats}

    def with_repeats(self, repeats: bool) -> Hybrid:
        """A copy with another value of ``repeats``."""
        return replace(self, partners=[replace(partner, repeats=repeats) for partner in self.partners])

    def answer(self, cases: Cases, depth: int, advance: Callable[[int], None]) -> Answers:
        found, of_targets = self._propose(cases, advance)
        leaves, scores = pooled(found, self.weights, depth)
        return Answers(leaves, scores, pool(of_targets, self.weights))

    def _propose(self, cases: Cases, advance: Callable[[int], None]) -> tuple[Candidates, np.ndarray]:
        """The candidates of all cases, and the targets' log-probabilities (models, n)."""
        parts, of_targets, done = [], [], 0
        for part in batches(cases):
            candidates, targets = self._candidates(part)
            parts.append(candidates)
            of_targets.append(targets)
            done += len(part)
            advance(done)
        return stacked(parts), np.concatenate(of_targets, axis=1)

    def _candidates(self, part: Cases) -> tuple[Candidates, np.ndarray]:
        """The candidates of a few cases, and the targets' log-probabilities (models, n)."""
        from peso.decoding import search

        trie, targets = self.partners[0].trie, np.arange(len(part))
        count = min(self.candidates, trie.leaves)
        # (partners, n, leaves)
        every = np.stack([partner.log_probabilities(part) for partner in self.partners])
        proposed = [np.unique(leaves) for leaves in np.concatenate([top(of, count) for of in every], axis=1)]
        seen = None if self.repeats else part.seen

        with threads(self.llm):
            scored = search(
                self.llm,
                part.histories,
                beams=max(map(len, proposed)),  # one per candidate, so that none is pruned
                batch_size=self.search_batch,
                exclude=seen,
                allow=[np.concatenate([trie.items_of(leaf) for leaf in row]) for row in proposed],
            )
            generated = search(
                self.llm,
                part.histories,
                beams=count,
                batch_size=self.search_batch,
                exclude=seen,
                targets=part.targets,
            )
        assert generated.target_scores is not None
        of_targets = [
            *every[:, targets, trie.leaf_of[part.targets]],
            generated.target_scores.astype(np.float64),
        ]
        leaves = np.concatenate([generated.leaves, scored.leaves], axis=1)
        of_llm = np.concatenate([generated.scores, scored.scores], axis=1).astype(np.float64)
        of_partners = np.take_along_axis(every, np.maximum(leaves, 0)[None], axis=2)
        return distinct(leaves, np.concatenate([of_partners, of_llm[None]])), np.stack(of_targets)


@dataclass(frozen=True)
class Candidates:
    """The candidates of n cases.

    Attributes:
        leaves: int64 (n, candidates), distinct leaves of each case, padded with -1.
        of: float (models, n, candidates), their log-probabilities under each model, of which the language
            model is the last; -inf where there is no candidate.
    """

    leaves: np.ndarray
    of: np.ndarray


def distinct(leaves: np.ndarray, of: np.ndarray) -> Candidates:
    """Candidates without duplicates. Of equal leaves in a row, all but the first become -1.

    Args:
        leaves, of: see :class:`Candidates`, possibly with duplicates.
    """
    order = np.argsort(leaves, axis=1, kind="stable")
    ascending = np.take_along_axis(leaves, order, axis=1)
    again = np.zeros_like(leaves, dtype=bool)
    np.put_along_axis(again, order[:, 1:], ascending[:, 1:] == ascending[:, :-1], axis=1)
    gone = again | (leaves < 0)
    return Candidates(np.where(gone, -1, leaves), np.where(gone, -np.inf, of))


def stacked(parts: Sequence[Candidates]) -> Candidates:
    """The concatenated cases of all parts, padded to the largest number of candidates."""
    width = max(part.leaves.shape[1] for part in parts)

    def wide(values: np.ndarray, fill: float) -> np.ndarray:
        missing = [(0, 0)] * (values.ndim - 1) + [(0, width - values.shape[-1])]
        return np.pad(values, missing, constant_values=fill)

    return Candidates(
        np.concatenate([wide(part.leaves, -1) for part in parts]),
        np.concatenate([wide(part.of, -np.inf) for part in parts], axis=1),
    )


def pool(of: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """The score of the module's formula: log-probabilities (models, …) → (…). It is -inf where that of any
    model is.

    Args:
        of: the log-probabilities under each model, of which the language model is the last.
        weights: the weights of all models but the last.
    """
    every = np.array([*weights, max(0.0, 1 - sum(weights))])
    impossible = np.isneginf(of).any(axis=0)
    total = np.tensordot(every, np.where(impossible, 0.0, of), axes=1)
    return np.where(impossible, -np.inf, total)


def pooled(candidates: Candidates, weights: Sequence[float], depth: int) -> tuple[np.ndarray, np.ndarray]:
    """The best candidates of each case, with ties in the order of the leaves.

    Returns:
        Their leaves, int64 (n, depth), padded with -1; and their scores, float64 (n, depth).
    """
    scores = pool(candidates.of, weights)
    order = np.lexsort((candidates.leaves, -scores), axis=1)[:, :depth]
    leaves = np.take_along_axis(candidates.leaves, order, axis=1)
    return leaves, np.take_along_axis(scores, order, axis=1)


def mean_ndcg(candidates: Candidates, targets: np.ndarray, weights: Sequence[float], depth: int) -> float:
    """The mean NDCG@depth of the targets, which are leaves, int (n,), in the ranking of :func:`pooled`."""
    from peso.evaluation.metrics import ndcg

    scores = pool(candidates.of, weights)
    own = np.where(candidates.leaves == targets[:, None], scores, -np.inf).max(axis=1, keepdims=True)
    before = (scores == own) & (candidates.leaves < targets[:, None]) & (candidates.leaves >= 0)
    places = 1 + ((scores > own) | before).sum(axis=1)
    return float(ndcg(np.where(np.isneginf(own[:, 0]), 0, places), depth).mean())


def best_weights(
    candidates: Candidates, targets: np.ndarray, depth: int
) -> tuple[tuple[float, ...], list[float]]:
    """Search for the weights of the partners with the highest mean NDCG@depth, as the module describes. Of
    equal ones, the most even are chosen.

    Args:
        candidates: the candidates of the validation cases.
        targets: int (n,), the leaf of each target.
        depth: the length of the lists.

    Returns:
        The weights, and the means of all weights that were tried.
    """
    partners = len(candidates.of) - 1
    even = 1 / (partners + 1)
    best, means = (even,) * partners, list[float]()
    for _ in range(MOST_ROUNDS if partners > 1 else 1):
        before = best
        for place in range(partners):
            line = [_rescaled(best, place, weight) for weight in WEIGHTS]
            found = [mean_ndcg(candidates, targets, weights, depth) for weights in line]
            number = max(range(len(line)), key=lambda n: (found[n], -abs(WEIGHTS[n] - even)))
            best = line[number]
            means += found
        if best == before:
            break
    return best, means


def _rescaled(weights: tuple[float, ...], place: int, weight: float) -> tuple[float, ...]:
    """The weights after that of one partner was changed. Those of the other partners and of the language
    model keep their proportions, or become equal if all of them were zero."""
    others = 1 - weights[place]
    if others > 1e-9:
        shares = [value * (1 - weight) / others for value in weights]
    else:
        shares = [(1 - weight) / len(weights)] * len(weights)
    shares[place] = weight
    return tuple(round(share, 6) for share in shares)
