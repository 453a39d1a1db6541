"""Metrics of ranked lists: one value per case, then means over cases and stages; transfer and forgetting;
signs that a model has learned too little.

A metric is a pure function from ranks (or log-probabilities) to one value per case; :class:`Metric` gives it
a name. With one relevant item per case the usual definitions reduce to functions of its rank r (1 = first,
0 = not in the list).

For transfer and forgetting, R[i, j] is the result of the model after stage i on the test cases of stage j
(larger is better; nan where it was not tested), and T is the last stage. Each figure is a mean over stages j
of R[a, j] − R[b, j], the difference between models a and b on the cases of j; the figures differ in a and b.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from peso.errors import ConfigError
from peso.evaluation.intervals import Estimate, Panel
from peso.evaluation.predictions import Predictions

# semantic_id: items that share an ID count as one (the paper's protocol); item: told apart by the stated rule
Ranking = Literal["semantic_id", "item"]


def hit(ranks: np.ndarray, k: int) -> np.ndarray:
    """Hit@k per case: 1 if 1 ≤ r ≤ k, else 0. Its mean is the hit rate (here equal to Recall@k).

    Args:
        ranks: int (n,), 0 where the target is not in the list.

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
    """Log-probability of one level per case: ln p(c_l | history, c_1 … c_{l-1}), c_l the target's code there.

    By the chain rule the levels sum to the log-probability of the semantic ID, so a level tells where the
    nats are lost: at the first, which is the coarse kind of item, or at the last, which tells neighbors
    apart.

    Args:
        by_level: float (n, levels).
        level: from 1.

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
    """A named function from predictions to one value per case; larger is better.

    ``name`` is its key in metrics.json (``ndcg@10``), ``label`` what a reader sees (``NDCG@10``).
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
    """The metric log-probability: mean of ln p(target | history), in nats per item.

    It sees every case, not only the few whose target is in the list, and so moves long before Hit@k does.
    """
    return Metric(
        LOG_PROBABILITY,
        "Log-probability",
        3,
        lambda predictions: predictions.target_log_probability.astype(np.float64),
    )


def level_log_probability_at(level: int) -> Metric:
    """The metric log-probability of one level, see :func:`level_log_probability`.

    Raises (where it is computed):
        ConfigError: the predictions hold no levels.
    """

    def values(predictions: Predictions) -> np.ndarray:
        by_level = predictions.target_level_log_probabilities
        if by_level is None or not 1 <= level <= by_level.shape[1]:
            raise ConfigError(f"the predictions hold no log-probability of level {level}; evaluate again")
        return level_log_probability(by_level, level)

    return Metric(f"log_probability_level_{level}", f"Level {level}", 3, values)


def level_metrics(predictions: Predictions) -> list[Metric]:
    """The log-probability of each level that predictions hold; none of a baseline's, which has no levels."""
    by_level = predictions.target_level_log_probabilities
    levels = 0 if by_level is None else by_level.shape[1]
    return [level_log_probability_at(level) for level in range(1, levels + 1)]


def default_metrics(ks: Sequence[int], ranking: Ranking = "semantic_id") -> list[Metric]:
    """Hit@k and NDCG@k for each k, MRR at the largest and the target's log-probability."""
    hits = [hit_at(k, ranking) for k in ks]
    gains = [ndcg_at(k, ranking) for k in ks]
    return [*hits, *gains, mrr_at(max(ks), ranking), log_probability()]


def headline_metrics(ks: Sequence[int], ranking: Ranking = "semantic_id") -> list[Metric]:
    """The main ones, the first of which decides: NDCG and Hit at the largest k, and the log-probability."""
    return [ndcg_at(max(ks), ranking), hit_at(max(ks), ranking), log_probability()]


def stage_metrics(predictions: Predictions, metrics: Sequence[Metric]) -> dict[str, Estimate]:
    """The mean of each metric over the cases of one stage, see :func:`average_metrics`."""
    return average_metrics([predictions], metrics)


def average_metrics(
    stages: Sequence[Predictions], metrics: Sequence[Metric], average: Literal["macro", "micro"] = "macro"
) -> dict[str, Estimate]:
    """The mean of each metric over several stages, by name (the paper averages stages 1 … T, not stage 0).

    ``macro``: the mean of the stages' means, as the paper; ``micro``: the mean over all cases, which is the
    mean of the stages' means weighted by their counts. Intervals take the cases of one user together.

    Raises:
        ConfigError: a metric looks further down than the stored list reaches.
    """
    panel = Panel.of([np.array(predictions.users) for predictions in stages], average)
    return {
        metric.name: Estimate.of(np.concatenate([metric.values(each) for each in stages]), panel)
        for metric in metrics
    }


def _ranks(predictions: Predictions, ranking: Ranking, k: int) -> np.ndarray:
    if k > predictions.depth:
        raise ConfigError(
            f"evaluation.k: {k} goes beyond the stored lists, which hold {predictions.depth} semantic IDs; "
            f"use a smaller k, or set decoding.beams to at least {k} and evaluate again"
        )
    return predictions.rank_semantic_id if ranking == "semantic_id" else predictions.rank_item


Term = tuple[int, int, int]  # stage j, models a and b


def backward_terms(results: np.ndarray) -> list[Term]:
    """(j, T, j) for j < T: how much later learning changed the result on earlier stages (Lopez-Paz and
    Ranzato 2017), BWT = 1/T Σ_{j<T} (R[T, j] − R[j, j]). Negative: it forgot."""
    last = len(results) - 1
    return [(j, last, j) for j in range(last)]


def forward_terms(results: np.ndarray) -> list[Term]:
    """(j, j − 1, 0) for 2 ≤ j ≤ T: how much stages up to j − 1 help on stage j before it is learned, after
    Lopez-Paz and Ranzato (2017), FWT = 1/(T − 1) Σ_{j=2…T} (R[j − 1, j] − R[0, j]).

    They compare with a model that has learned nothing; here it is the model of the base stage, without which
    there is no recommender, so j begins at 2.
    """
    return [(j, j - 1, 0) for j in range(2, len(results))]


def forgetting_terms(results: np.ndarray) -> list[Term]:
    """(j, argmax_{i<T} R[i, j], T) for j < T: how far the last model is below the best there was on each
    earlier stage (Chaudhry et al. 2018), F = 1/T Σ_{j<T} (max_{i<T} R[i, j] − R[T, j]). None where an entry
    is missing."""
    last = len(results) - 1
    if np.isnan(results[:, :last]).any():
        return []
    return [(j, int(results[:last, j].argmax()), last) for j in range(last)]


FEWEST = 30  # cases; fewer say nothing
FEW_FIRST_ITEMS = 3.0  # effective number of first items below which everyone is given the same


def first_items(predictions: Predictions) -> tuple[float, float]:
    """The effective number of first items, e^H with H the entropy of their shares in nats, and the share of
    users whose list begins with the most common one.

    >>> from types import SimpleNamespace
    >>> first_items(SimpleNamespace(items=[["a", "b"], ["a"], ["b"], ["b", "c"]]))
    (2.0, 0.5)
    """
    counts = Counter(items[0] for items in predictions.items if items)
    shares = np.array(list(counts.values())) / max(1, sum(counts.values()))
    entropy = -float((shares * np.log(shares)).sum())
    return round(math.exp(entropy), 6), float(shares.max(initial=0.0))


def warnings(
    predictions: Predictions, popular_ranks: np.ndarray, code_log_frequencies: np.ndarray | None
) -> list[str]:
    """What is wrong with a model's answers, each with the likely cure; nothing where nothing is.

    Args:
        popular_ranks: int (n,), rank of each target in the list of the stage's most popular items, 0 where it
            is not in it.
        code_log_frequencies: float (n,), ln of the share that the first code of each target has among the
            stage's training targets.
    """
    if len(predictions) < FEWEST:
        return []
    found = []
    effective, share = first_items(predictions)
    if effective < FEW_FIRST_ITEMS:
        found.append(
            f"{share:.0%} of all users get the same first item: the model has learned what is popular, not "
            "what a user wants. Train longer (training.epochs) or at a higher training.learning_rate, and "
            "look at the quality of the semantic IDs that `peso tokenize` prints"
        )
    levels = predictions.target_level_log_probabilities
    if levels is not None and code_log_frequencies is not None:
        own, frequency = float(levels[:, 0].mean()), float(code_log_frequencies.mean())
        if own <= frequency:
            found.append(
                f"the first code of the next item is predicted no better ({own:.3f} nats) than by how often "
                f"each code occurs ({frequency:.3f}): the model does not use the history. Train longer, or "
                "at a higher training.learning_rate"
            )
    k = min(10, predictions.depth)
    own, popular = (float(ndcg(ranks, k).mean()) for ranks in (predictions.rank_semantic_id, popular_ranks))
    if own <= popular:
        found.append(
            f"the same list for everyone, the most popular items of the newest stage, is at least as good "
            f"(NDCG@{k} {popular:.4f}, the model {own:.4f}). Try `head: items`, more epochs with "
            "training.patience, or a smaller backbone"
        )
    return found
