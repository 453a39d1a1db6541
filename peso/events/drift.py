"""How a stream drifts: new and returning users and items in each stage, and how far tastes moved.

Terms are as in ``peso.evaluation.predictions``: *continuing* users were seen in the previous stage, *new*
ones never before. Known users without events in a stage are *dormant* in it, and *returning* when they have
events again. The same terms apply to items.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from peso.events.histories import Stage

QUANTILES = (0.1, 0.5, 0.9)


def drift(stages: Iterable[Stage], items: int, first_codes: np.ndarray | None = None) -> list[dict[str, Any]]:
    """Compare each stage with those before it.

    Args:
        stages: the stages in order, from stage 0; only one at a time is needed.
        items: the number of rows of the item table.
        first_codes: int (items,), the first-level code of each item; None if it is not known.

    Returns:
        One dictionary per stage:

        - ``stage``, ``events``, ``users``, ``new_users``, ``continuing_users``, ``returning_users``,
          ``dormant_users``, and the same for ``items``;
        - ``item_divergence`` and ``code_divergence``: :func:`jensen_shannon` between the events of this
          stage and of the previous one, over items and over first-level codes; None in stage 0 or without
          codes;
        - ``new_item_targets``: the share of targets, including those of validation and test, whose item
          nobody had before the stage;
        - ``history_lengths``: the mean and the ``QUANTILES`` of the number of items that the users of the
          stage had before it.
    """
    seen = np.zeros(items, dtype=bool)
    seen_users: set[str] = set()
    last_users: set[str] = set()
    last_counts: np.ndarray | None = None
    result = []
    for stage in stages:
        present = np.flatnonzero(stage.current.lengths)
        here = {stage.users[i] for i in present}
        brought = stage.previous.lengths[present]
        seen[stage.previous.values] = True  # items that are only in histories count as earlier
        seen_users |= {stage.users[i] for i in present[brought > 0]}
        counts = np.bincount(stage.current.values, minlength=items)
        there = counts > 0
        lately = last_counts > 0 if last_counts is not None else np.zeros(items, dtype=bool)
        result.append(
            {
                "stage": stage.number,
                "events": int(counts.sum()),
                "users": len(here),
                "new_users": len(here - seen_users - last_users),
                "continuing_users": len(here & last_users),
                "returning_users": len((here & seen_users) - last_users),
                "dormant_users": len((seen_users | last_users) - here),
                "items": int(there.sum()),
                "new_items": int((there & ~seen).sum()),
                "continuing_items": int((there & lately).sum()),
                "returning_items": int((there & seen & ~lately).sum()),
                "dormant_items": int((seen & ~there).sum()),
                "item_divergence": None if last_counts is None else jensen_shannon(last_counts, counts),
                "code_divergence": _code_divergence(last_counts, counts, first_codes),
                "new_item_targets": _new_targets(stage, seen),
                "history_lengths": _lengths(brought),
            }
        )
        seen |= there
        seen_users |= here
        last_users, last_counts = here, counts
    return result


def jensen_shannon(first: np.ndarray, second: np.ndarray) -> float:
    """Jensen-Shannon divergence of two count vectors in bits: 0 for equal shares, 1 for nothing in common.

    JS(p, q) = ½ KL(p ‖ m) + ½ KL(q ‖ m), m = ½ (p + q) (Lin, 1991).

    >>> jensen_shannon(np.array([1, 1, 0]), np.array([2, 2, 0]))
    0.0
    >>> jensen_shannon(np.array([1, 0]), np.array([0, 5]))
    1.0
    """
    from scipy.special import rel_entr  # slow to load

    p, q = first / first.sum(), second / second.sum()
    middle = (p + q) / 2
    nats = float(rel_entr(p, middle).sum() + rel_entr(q, middle).sum()) / 2
    return max(0.0, nats / math.log(2))  # rounding may give less than 0, where SciPy's distance would be nan


def _code_divergence(last: np.ndarray | None, counts: np.ndarray, codes: np.ndarray | None) -> float | None:
    if last is None or codes is None:
        return None
    size = int(codes.max()) + 1
    return jensen_shannon(
        np.bincount(codes, weights=last, minlength=size), np.bincount(codes, weights=counts, minlength=size)
    )


def _new_targets(stage: Stage, seen: np.ndarray) -> float | None:
    """The share of new items among the targets: all items of eligible users, in training, validation or
    test."""
    rows = stage.eligible()
    if not len(rows):
        return None
    targets = np.concatenate([stage.current[i] for i in rows])
    return float(np.mean(~seen[targets]))


def _lengths(brought: np.ndarray) -> dict[str, float]:
    if not len(brought):
        return {"mean": 0.0, **{f"p{q * 100:.0f}": 0.0 for q in QUANTILES}}
    return {
        "mean": float(brought.mean()),
        **{f"p{q * 100:.0f}": float(np.quantile(brought, q)) for q in QUANTILES},
    }
