"""Metrics of ranked lists, transfer and forgetting between stages, and checks for models that have learned
too little.

A metric is a pure function from ranks (or log-probabilities) to one value per case; :class:`Metric` gives it
a name. Values are then averaged over cases and stages. With one relevant item per case, the usual definitions
are functions of its rank r (1 = first, 0 = not in the list).

For transfer and forgetting, R[i, j] is the result of the model after stage i on the test cases of stage j
(larger is better; nan where it was not tested), and T is the last stage. Each figure is a mean over stages j
of R[a, j] − R[b, j], the difference between models a and b on the cases of j; the figures differ in a and b.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from peso.errors import ConfigError
from peso.evaluation.intervals import Estimate, Panel
from peso.evaluation.predictions import Predictions

# semantic_id: items that share an ID count as one (the paper's protocol). item: items that share an ID are
# ranked by a fixed rule (ItemTrie.items_of).
Ranking = Literal["semantic_id", "item"]


def hit(ranks: np.ndarray, k: int) -> np.ndarray:
    """Hit@k per case: 1 if 1 ≤ r ≤ k, else 0. Its mean is the hit rate (here equal to Recall@k).

    Args:
        ranks: int (n,), the rank of each target, 0 if it is not in the list.
        k: the length at which lists are cut.

    Returns: float64 (n,).

    >>> hit(np.array([1, 3, 6, 0]), k=5).tolist()
    [1.0, 1.0, 0.0, 0.0]
    """
    return ((ranks > 0) & (ranks <= k)).astype(np.float64)


def ndcg(ranks: np.ndarray, k: int) -> np.ndarray:
    """NDCG@k per case: 1 / log2(1 + r) if 1 ≤ r ≤ k, else 0.

    The normalized discounted cumulative gain (Järvelin and Kekäläinen 2002) with one relevant item, whose
    ideal gain is 1.

    >>> ndcg(np.array([1, 3, 6, 0]), k=5).tolist()
    [1.0, 0.5, 0.0, 0.0]
    """
    return hit(ranks, k) / np.log2(1.0 + np.maximum(ranks, 1))


def reciprocal_rank(ranks: np.ndarray, k: int) -> np.ndarray:
    """Reciprocal rank at k per case: 1 / r if 1 ≤ r ≤ k, else 0. Its mean is MRR@k.

    >>> reciprocal_rank(np.array([1, 2, 4, 0]), k=3).tolist()
    [1.0, 0.5, 0.0, 0.0]
    """
    return hit(ranks, k) / np.maximum(ranks, 1)


def level_log_probability(by_level: np.ndarray, level: int) -> np.ndarray:
    """Log-probability of one level per case: ln p(c_l | history, c_1 … c_{l-1}), where c_l is the target's
    code at level l.

    By the chain rule, the levels sum to the log-probability of the ID's codes. So they show where a model
    loses probability: at the first level, which is the coarse kind of item, or at the last, which
    distinguishes similar items. The log-probability of an answer that also uses an item head is another one.

    Args:
        by_level: float (n, levels), the log-probability of each code of the target.
        level: the level, counted from 1.

    Returns: float64 (n,).

    >>> by_level = np.log([[0.5, 0.25], [0.1, 1.0]])
    >>> np.exp(level_log_probability(by_level, level=2)).round(3).tolist()
    [0.25, 1.0]
    >>> total = level_log_probability(by_level, 1) + level_log_probability(by_level, 2)
    >>> np.exp(total).round(3).tolist()
    [0.125, 0.1]
    """
    return by_level[:, level - 1].astype(np.float64)


@dataclass(frozen=True)
class Metric:
    """A named function from predictions to one value per case. Larger values are better.

    Attributes:
        name: the key in ``metrics.json``, such as ``ndcg@10``.
        label: the name that readers see, such as ``NDCG@10``.
        decimals: the number of decimals to show.
        values: the function from predictions to one value per case.
    """

    name: str
    label: str
    decimals: int
    values: Callable[[Predictions], np.ndarray]


def hit_at(k: int, ranking: Ranking = "semantic_id") -> Metric:
    """The metric Hit@k, see :func:`hit`."""
    return Metric(f"hit@{k}", f"Hit@{k}", 4, lambda predictions: hit(_ranks(predictions, ranking, k), k))


def ndcg_at(k: int, ranking: Ranking = "semantic_id") -> Metric:
    """The metric NDCG@k, see :func:`ndcg`."""
    return Metric(f"ndcg@{k}", f"NDCG@{k}", 4, lambda predictions: ndcg(_ranks(predictions, ranking, k), k))


def mrr_at(k: int, ranking: Ranking = "semantic_id") -> Metric:
    """The metric MRR@k, see :func:`reciprocal_rank`."""
    return Metric(
        f"mrr@{k}", f"MRR@{k}", 4, lambda predictions: reciprocal_rank(_ranks(predictions, ranking, k), k)
    )


LOG_PROBABILITY = "log_probability"


def log_probability() -> Metric:
    """The metric log-probability: the mean of ln p(target | history), in nats per item.

    It uses every case, not only the few whose target is in the list, so it shows changes much sooner than
    Hit@k.
    """
    return Metric(
        LOG_PROBABILITY,
        "Log-probability",
        3,
        lambda predictions: predictions.target_log_probability.astype(np.float64),
    )


def level_log_probability_at(level: int) -> Metric:
    """The metric log-probability of one level, see :func:`level_log_probability`.

    Computing the metric raises a ConfigError if the predictions have no such level.
    """

    def values(predictions: Predictions) -> np.ndarray:
        by_level = predictions.target_level_log_probabilities
        if by_level is None or not 1 <= level <= by_level.shape[1]:
            raise ConfigError(f"the predictions have no log-probability for level {level}; evaluate again")
        return level_log_probability(by_level, level)

    return Metric(f"log_probability_level_{level}", f"Level {level}", 3, values)


def level_metrics(predictions: Predictions) -> list[Metric]:
    """The log-probability of each level in the predictions. Predictions of baselines have no levels."""
    by_level = predictions.target_level_log_probabilities
    levels = 0 if by_level is None else by_level.shape[1]
    return [level_log_probability_at(level) for level in range(1, levels + 1)]


def default_metrics(ks: Sequence[int], ranking: Ranking = "semantic_id") -> list[Metric]:
    """Hit@k and NDCG@k for each k, MRR at the largest k, and the target's log-probability."""
    hits = [hit_at(k, ranking) for k in ks]
    gains = [ndcg_at(k, ranking) for k in ks]
    return [*hits, *gains, mrr_at(max(ks), ranking), log_probability()]


def headline_metrics(ks: Sequence[int], ranking: Ranking = "semantic_id") -> list[Metric]:
    """The main metrics: NDCG and Hit at the largest k, and log-probability. The first decides which system is
    best."""
    return [ndcg_at(max(ks), ranking), hit_at(max(ks), ranking), log_probability()]


def stage_metrics(predictions: Predictions, metrics: Sequence[Metric]) -> dict[str, Estimate]:
    """The mean of each metric over the cases of one stage, see :func:`average_metrics`."""
    return average_metrics([predictions], metrics)


def average_metrics(
    stages: Sequence[Predictions], metrics: Sequence[Metric], average: Literal["macro", "micro"] = "macro"
) -> dict[str, Estimate]:
    """The mean of each metric over several stages, by name (the paper averages stages 1 … T, not stage 0).

    Intervals treat all cases of one user as one unit.

    Args:
        stages: the predictions of each stage.
        metrics: the metrics to average.
        average: ``macro`` for the mean of the stages' means, as in the paper; ``micro`` for the mean over all
            cases, which is the mean of the stages' means weighted by their numbers of cases.

    Raises:
        ConfigError: the k of a metric is larger than the stored lists.
    """
    panel = Panel.of([np.array(predictions.users) for predictions in stages], average)
    return {
        metric.name: Estimate.of(np.concatenate([metric.values(each) for each in stages]), panel)
        for metric in metrics
    }


def _ranks(predictions: Predictions, ranking: Ranking, k: int) -> np.ndarray:
    if k > predictions.depth:
        raise ConfigError(
            f"evaluation.k: {k} is larger than the stored lists of {predictions.depth} semantic IDs; "
            f"use a smaller k, or set decoding.beams to at least {k} and evaluate again"
        )
    return predictions.rank_semantic_id if ranking == "semantic_id" else predictions.rank_item


Term = tuple[int, int, int]  # (j, a, b): the stage whose cases are used, and the two models


def backward_terms(results: np.ndarray) -> list[Term]:
    """(j, T, j) for j < T: how much later training changed the result on earlier stages (Lopez-Paz and
    Ranzato 2017), BWT = 1/T Σ_{j<T} (R[T, j] − R[j, j]). Negative values mean that the model forgot."""
    last = len(results) - 1
    return [(j, last, j) for j in range(last)]


def forward_terms(results: np.ndarray) -> list[Term]:
    """(j, j − 1, 0) for 2 ≤ j ≤ T: how much stages up to j − 1 help on stage j before it is learned, after
    Lopez-Paz and Ranzato (2017), FWT = 1/(T − 1) Σ_{j=2…T} (R[j − 1, j] − R[0, j]).

    The paper compares with a model that has learned nothing. Here the comparison is with the model of stage
    0, because there is no recommender before it, so j begins at 2.
    """
    return [(j, j - 1, 0) for j in range(2, len(results))]


def forgetting_terms(results: np.ndarray) -> list[Term]:
    """(j, argmax_{i<T} R[i, j], T) for j < T: how far the last model is below the best earlier model on each
    earlier stage (Chaudhry et al. 2018), F = 1/T Σ_{j<T} (max_{i<T} R[i, j] − R[T, j]). The list is empty if
    an entry of R is missing."""
    last = len(results) - 1
    if np.isnan(results[:, :last]).any():
        return []
    return [(j, int(results[:last, j].argmax()), last) for j in range(last)]


FEWEST = 30  # with fewer cases there are no warnings, because they would be unreliable
FEW_FIRST_ITEMS = 3.0  # below this effective number of first items, nearly all users get the same one
# Lists of k items are nearly the same for all if the effective number of items in them is below the first
# number times k, unless the catalog is smaller than the second number times k.
FEW_ITEMS, SMALL_CATALOGUE = 2.0, 5.0


class Answered(Protocol):
    """Answers to test or validation cases, such as :class:`~peso.evaluation.predictions.Predictions`.

    Attributes:
        items: the list of each case, best first.
        rank_semantic_id: int (n,), the rank of each target, 0 if it is not in the list.
        target_level_log_probabilities: float (n, levels) or None.
        target_log_probability: float (n,), that of the answer as a whole.
        depth: the length of the lists.
    """

    @property
    def items(self) -> Sequence[Sequence[Any]]: ...
    @property
    def rank_semantic_id(self) -> np.ndarray: ...
    @property
    def target_level_log_probabilities(self) -> np.ndarray | None: ...
    @property
    def target_log_probability(self) -> np.ndarray: ...
    @property
    def depth(self) -> int: ...
    def __len__(self) -> int: ...


def effective_number(items: Iterable[Hashable]) -> float:
    """e^H, where H is the entropy in nats of the shares of the different items; 0 without items.

    >>> effective_number("abab")
    2.0
    """
    counts = np.array(list(Counter(items).values()), dtype=np.float64)
    shares = counts / max(1.0, counts.sum())
    return round(math.exp(-float((shares * np.log(shares)).sum())), 6) if len(counts) else 0.0


def first_items(answers: Answered) -> tuple[float, float]:
    """The effective number of first items, and the share of users whose list begins with the most common one.

    >>> from types import SimpleNamespace
    >>> first_items(SimpleNamespace(items=[["a", "b"], ["a"], ["b"], ["b", "c"]]))
    (2.0, 0.5)
    """
    first = [items[0] for items in answers.items if len(items)]
    most = max(Counter(first).values(), default=0)
    return effective_number(first), most / max(1, len(first))


def warnings(
    answers: Answered,
    popular_ranks: np.ndarray,
    log_frequencies: np.ndarray | None,
    *,
    ease_ranks: np.ndarray | None = None,
    count_ranks: np.ndarray | None = None,
    catalogue: int | None = None,
    item_head: bool = False,
) -> dict[str, str]:
    """Problems with a model's answers by kind, each with a likely remedy. Empty if there are none.

    Args:
        answers: the model's answers at one stage.
        popular_ranks: int (n,), the rank of each target in the list of the stage's most popular items, 0 if
            it is not in the list.
        log_frequencies: float (n,), ln of the share that the first code of each target has in the stage's
            training targets, or the target itself if the model has an item head; None if it is not known.
        ease_ranks: the same as ``popular_ranks`` in the list of EASE; None if it is not known.
        count_ranks: the same in the list of the model's counts of transitions alone; None if it has none.
        catalogue: the number of semantic IDs that a list can have; None if it is not known.
        item_head: whether the model has an item head. Its likelihood is then that of the whole answer, and
            an item head is no remedy.

    Returns:
        Sentences by ``first_items``, ``lists``, ``codes`` (``items`` with an item head), ``popularity``,
        ``counts`` and ``ease``.
    """
    if len(answers) < FEWEST:
        return {}
    found = {}
    cure = (
        "the model has learned what is popular, not what a user wants. Train longer (training.epochs) or "
        "with a higher training.learning_rate, and check the quality of the semantic IDs that `peso "
        "tokenize` prints"
    )
    effective, share = first_items(answers)
    listed = effective_number(item for items in answers.items for item in items)
    if effective < min(FEW_FIRST_ITEMS, math.inf if catalogue is None else catalogue / 2):
        found["first_items"] = f"{share:.0%} of all users get the same first item: {cure}"
    elif (
        catalogue is not None
        and catalogue >= SMALL_CATALOGUE * answers.depth
        and listed < FEW_ITEMS * answers.depth
    ):
        found["lists"] = (
            f"all users get nearly the same list (in effect {listed:.0f} different items in lists of "
            f"{answers.depth}, of {catalogue:,}): {cure}"
        )
    levels = answers.target_level_log_probabilities
    if log_frequencies is not None and (item_head or levels is not None):
        kind, what, each = "codes", "the first code of the next item", "code"
        if item_head:
            kind, what, each = "items", "the next item", "item"
        likelihoods = answers.target_log_probability if levels is None or item_head else levels[:, 0]
        own, frequency = float(likelihoods.mean()), float(log_frequencies.mean())
        if own <= frequency:
            found[kind] = (
                f"{what} is predicted no better ({own:.3f} nats) than by how often each {each} occurs "
                f"({frequency:.3f}): by likelihood, a model without the history would be as good. Train "
                "longer, or with another training.learning_rate"
            )
    k = min(10, answers.depth)
    own, popular = (float(ndcg(ranks, k).mean()) for ranks in (answers.rank_semantic_id, popular_ranks))
    with_head = "" if item_head else "`head: items`, "
    if own <= popular:
        found["popularity"] = (
            f"recommending the newest stage's most popular items to everyone is at least as good "
            f"(NDCG@{k} {popular:.4f}, the model {own:.4f}). Try {with_head}"
            "more epochs with training.patience, or a smaller backbone"
        )
    if count_ranks is not None and own <= (counts := float(ndcg(count_ranks, k).mean())):
        found["counts"] = (
            f"the model's counts of transitions between items alone rank at least as well (NDCG@{k} "
            f"{counts:.4f}, the model {own:.4f}), so what was trained does not improve the first {k} items "
            "here. If the baseline item-graph is as good in the report, too, train longer, or with another "
            "training.learning_rate"
        )
    if ease_ranks is not None and own <= (ease := float(ndcg(ease_ranks, k).mean())):
        found["ease"] = (
            f"EASE, a linear model of which items users have together, is at least as good (NDCG@{k} "
            f"{ease:.4f}, the model {own:.4f}). Combine both: `peso baseline '{{name: hybrid, partners: "
            f"[ease]}}'`, then `peso recommend --with hybrid`; or try {with_head}more epochs, or another "
            "width"
        )
    return found
