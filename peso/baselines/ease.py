"""EASE models every item as a linear function of all others, in closed form (Steck 2019, arXiv 1905.03375).

For X (users, items) of zeros and ones:

    min_B ‖X − X B‖² + λ ‖B‖²,  diag(B) = 0   ⟹   B_ij = −P_ij / P_jj (i ≠ j),  P = (XᵀX + λI)⁻¹
    score(history, j) = Σ_{i ∈ history} B_ij

P is dense: with 25,935 items it would take 5.4 GB and 17·10¹² multiplications in float64. So the model has
only the ``items`` items with the most users (5,000 take 0.2 GB and seconds). For items with few users, P is
mostly the regularizer. λ is chosen on validation cases with at most 2,500 items, which takes an eighth of the
time. Items outside the model, and items with a score of zero or less, are ordered by popularity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import Field

from peso.baselines.baseline import Matrix, interactions, known_histories
from peso.baselines.tuning import Counted, least
from peso.events.histories import Cases, Stage
from peso.runtime.progress import Observer

TRIED_WITH = 2500  # the number of items when settings are compared
COPIES = 3  # the number of copies of the dense matrix that are in memory at the same time


class Ease(Counted):
    """A linear item-to-item model with a closed-form solution, computed at every stage from all events so
    far."""

    name = "ease"
    SETTINGS = tuple({"regularisation": x} for x in (50.0, 5.0, 10.0, 20.0, 100.0, 200.0, 500.0, 1000.0))

    class Options(Counted.Options):
        items: int = Field(
            5000, ge=1, description="number of items in the model, by users; memory grows quadratically"
        )
        regularisation: float | None = Field(
            None, gt=0, description="added to the diagonal; default: chosen on validation"
        )

        def memory(self, items: int, users: int, window: int) -> int:
            return COPIES * 8 * min(self.items, items) ** 2

    options: Options

    def learn(self, stages: Sequence[Stage], observer: Observer) -> dict[str, Any]:
        figures = super().learn(stages, observer)
        if figures["items_taking_part"] < figures["items_known"]:
            observer.note(
                f"{self.name}: uses the {figures['items_taking_part']:,} items with the most users, of "
                f"{figures['items_known']:,} ({figures['events_covered']:.0%} of all events); for more, set "
                "its option `items`"
            )
        return figures

    def counts(self, stages: Sequence[Stage]) -> Matrix:
        return interactions(list(known_histories(stages).values()), self.items)

    def fit(self, counts: Matrix, setting: Mapping[str, Any]) -> dict[str, Any]:
        users_of = self._solve(counts, setting, self.options.items)
        covered = users_of[self.rows].sum() / users_of.sum()
        return {
            "users": counts.shape[0],
            "items_known": int((users_of > 0).sum()),
            "items_taking_part": len(self.rows),
            "events_covered": float(covered),
        }

    def try_out(self, counts: Matrix, setting: Mapping[str, Any]) -> None:
        """Solve with fewer items, because the time grows with the cube of their number."""
        self._solve(counts, setting, min(self.options.items, TRIED_WITH))

    def _solve(self, had: Matrix, setting: Mapping[str, Any], items: int) -> np.ndarray:
        """Solve with the ``items`` items with the most users. Returns the number of users of every item."""
        users_of = np.asarray(had.sum(axis=0))
        supported = int((users_of > 0).sum())
        self.rows = np.sort(np.argsort(-users_of, kind="stable")[: min(items, supported)])
        own = had[:, self.rows]
        self.weights = ease_weights((own.T @ own).toarray(), setting["regularisation"]).astype(np.float32)
        self.popularity = least(users_of)
        return users_of

    def sums(self, cases: Cases) -> np.ndarray:
        had = interactions([history[-self.window :] for history in cases.histories], self.items)
        result = np.zeros((len(cases), self.items))
        result[:, self.rows] = had[:, self.rows].astype(np.float32) @ self.weights
        return result


def ease_weights(gram: np.ndarray, regularisation: float) -> np.ndarray:
    """B of the module's formula, float64 (items, items).

    Args:
        gram: float64 (items, items), XᵀX. It is overwritten.
        regularisation: λ.
    """
    from scipy import linalg

    gram[np.diag_indices_from(gram)] += regularisation
    factor, _ = linalg.lapack.dpotrf(gram, lower=True, overwrite_a=True)
    inverse, _ = linalg.lapack.dpotri(factor, lower=True, overwrite_c=True)  # lower triangle only
    inverse = np.tril(inverse) + np.tril(inverse, -1).T
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0.0)
    return weights
