"""Do frozen codebooks still fit: how well they write items that came after they were fitted.

Knows vectors and codes; gives plain data, and the warning that a refit is due.

Codebooks write the items they were fitted to better than any other item, drift or no drift. So a part of the
items of stage 0 is held out of the fit, and new items are compared with those.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.stats import fisher_exact

from peso.items.quantizers.residual import ResidualCodebooks

HELD_OUT = 0.05  # share of the items of stage 0 that nothing is fitted to
FEWEST = 20  # fewer items tell nothing: no part is held out, no warning is given
WORSE = 1.25  # times the error of the held-out items
CHANCE = 0.01  # how often a warning of collisions may come from a handful of items by luck
MORE_COLLISIONS = 0.1  # more of the items than of the held-out ones want an ID that is taken

REFIT = "refit the codebooks: ingest and tokenize everything into a new workspace"


def held_out(items: int, seed: int) -> np.ndarray:
    """bool (items,): which are left out of the fit. None of a catalogue too small to spare them."""
    count = int(HELD_OUT * items)
    chosen = np.zeros(items, bool)
    if count >= FEWEST:
        chosen[np.random.default_rng(seed).choice(items, count, replace=False)] = True
    return chosen


def quantisation_error(
    codebooks: ResidualCodebooks, vectors: np.ndarray, codes: np.ndarray, known: np.ndarray
) -> float | None:
    """Mean ‖x − x̂‖² over the items with a known vector; about 1 for codes that say nothing.

    Vectors have mean square length 1 over the fitted items (:mod:`peso.items.encoders.fusion`).
    """
    if not known.any():
        return None
    difference = vectors[known] - codebooks.reconstruct(codes[known])
    return float(np.square(difference).sum(1, dtype=np.float64).mean())


def already_wanted(wanted: np.ndarray, taken: np.ndarray) -> int:
    """How many of the items want an ID that an item before them has or wants."""
    if not len(wanted):
        return 0
    before = len(np.unique(taken, axis=0))
    return len(wanted) - (len(np.unique(np.concatenate([taken, wanted]), axis=0)) - before)


def refit_warnings(fitness: Mapping[str, Any]) -> list[str]:
    """A sentence for every stage whose items the codebooks fit too badly; none: no refit is due.

    Args:
        fitness: the entry of that name in the manifest of the semantic IDs.
    """
    found = []
    expected = fitness.get("held_out")
    for stage in fitness.get("stages", []):
        if expected is None or stage["items"] < FEWEST:
            continue
        error, usual = stage["error"], expected["error"]
        if error is not None and usual is not None and error > WORSE * usual:
            found.append(
                f"stage {stage['stage']}: the codes write its {stage['items']:,} new items with an error of "
                f"{error:.3f}, items of stage 0 that were held out with {usual:.3f}; {REFIT}"
            )
        share, usual = stage["wanted_taken"] / stage["items"], expected["wanted_taken"] / expected["items"]
        if share > usual + MORE_COLLISIONS and _more_often(stage, expected):
            found.append(
                f"stage {stage['stage']}: {share:.0%} of its {stage['items']:,} new items want an ID that is "
                f"taken ({usual:.0%} of the items held out of stage 0 do); {REFIT}"
            )
    return found


def _more_often(stage: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """Whether a stage's items want taken IDs more often than chance explains (Fisher's exact test)."""
    table = [[group["wanted_taken"], group["items"] - group["wanted_taken"]] for group in (stage, expected)]
    return bool(fisher_exact(table, alternative="greater").pvalue < CHANCE)


def rows(fitness: Mapping[str, Any]) -> list[tuple[str, int, float | None, int, int | None]]:
    """The entry of that name in the manifest, a row for each group of items: its name, how many, their error,
    how many want an ID that is taken, how many share one. None at all where nothing was fitted."""
    groups = [("fitted", fitness.get("fit")), ("held out of stage 0", fitness.get("held_out"))]
    groups += [(f"new in stage {stage['stage']}", stage) for stage in fitness.get("stages", [])]
    return [
        (name, group["items"], group["error"], group["wanted_taken"], group.get("sharing"))
        for name, group in groups
        if group is not None
    ]
