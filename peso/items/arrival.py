"""Items that arrive at frozen codebooks: what they want, what they get, how well they fit.

Knows vectors and codes; knows nothing of item tables or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peso.items import collisions, fitness
from peso.items.quantizers.residual import ResidualCodebooks
from peso.items.vectors import ItemVectors

Group = tuple[int, np.ndarray]  # a stage, the rows of the items that it brings


@dataclass(frozen=True)
class Arrival:
    """What is frozen, and what it says of every item: its vector and the codes nearest to it.

    Attributes:
        extra: codes of the extra level, where the rule has one.
        wanted: int32 (items, levels), before items are told apart.
    """

    codebooks: ResidualCodebooks
    rule: collisions.Rule
    extra: int
    vectors: ItemVectors
    wanted: np.ndarray

    def place(self, rows: np.ndarray, taken: np.ndarray) -> np.ndarray:
        """Final codes, int32 (rows, levels), of items that arrive together, beside those that are there."""
        latent = self.codebooks.latent(self.vectors.vectors[rows])
        return collisions.resolve(self.rule, self.codebooks, latent, self.wanted[rows], taken, self.extra)

    def place_stages(
        self, groups: Sequence[Group], codes: np.ndarray, done: np.ndarray
    ) -> list[dict[str, Any]]:
        """Place the new items of stage after stage. Returns the measures of each.

        Args:
            codes: int32 (items, levels), filled here for the rows of the groups.
            done: bool (items,), which rows of ``codes`` are final; brought up to date.
        """
        measured = []
        for stage, rows in groups:
            taken = codes[done]
            codes[rows] = self.place(rows, taken)
            done[rows] = True
            more = {
                "without_vector": int((~self.vectors.known[rows]).sum()),
                "sharing": fitness.already_wanted(codes[rows], taken),
            }
            measured.append({"stage": int(stage), **self.measure(rows, taken), **more})
        return measured

    def measure(self, rows: np.ndarray, taken: np.ndarray) -> dict[str, Any]:
        """How many items, the error with which their nearest codes write them (None: no vector is known),
        how many want an ID that an item before them has."""
        vectors, wanted = self.vectors.take(rows), self.wanted[rows]
        return {
            "items": len(rows),
            "error": fitness.quantisation_error(self.codebooks, vectors.vectors, wanted, vectors.known),
            "wanted_taken": fitness.already_wanted(wanted, taken[:, : wanted.shape[1]]),
        }


def groups_of(first_stage: np.ndarray, arriving: np.ndarray) -> list[Group]:
    """The arriving items by the stage in which they first occur, earlier stages first.

    Args:
        first_stage: int (items,).
        arriving: bool (items,).
    """
    numbers = np.unique(first_stage[arriving]).tolist()
    return [(stage, np.flatnonzero(arriving & (first_stage == stage))) for stage in numbers]
