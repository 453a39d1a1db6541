"""Signs that a model has learned too little to be worth updating, in plain words."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np

from peso.evaluation.metrics import ndcg
from peso.evaluation.predictions import Predictions

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
