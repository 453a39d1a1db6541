"""Telling apart items whose nearest codes are the same.

Three rules:

``reassign``: of the items that want one ID the one nearest to it keeps it. Each other one, in row order,
    takes the nearest free code of the last level; where all of that prefix are taken, the nearest code of the
    level above that still has room, and so on upward. Every item so has an ID of its own as long as there are
    as many IDs as items; beyond that the rest keep the ID they wanted and share it.
``extra-level``: one more level numbers the items that share an ID, in row order (as in TIGER); when its codes
    run out, the rest share the last of them.
``allow``: nothing is done; items of one ID are told apart by their row order.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from peso.items import quality
from peso.items.codebooks import ResidualCodebooks, squared_distances
from peso.items.vectors import ItemVectors

Rule = Literal["reassign", "extra-level", "allow"]


def resolve(
    rule: Rule,
    codebooks: ResidualCodebooks,
    latent: np.ndarray,
    wanted: np.ndarray,
    taken: np.ndarray,
    extra: int = 0,
) -> np.ndarray:
    """Final codes of items that arrive together. Codes that others have already are never touched.

    Args:
        latent: float32 (n, width), the items in the codebooks' space.
        wanted: int32 (n, levels), their own nearest codes.
        taken: int32 (m, levels), final codes of the items before them; with an extra level that one too.
        extra: codes of the extra level.

    Returns:
        int32 (n, levels), with ``extra-level`` one level more.
    """
    if rule == "reassign":
        return _reassign(codebooks, latent, wanted, taken)
    if rule == "extra-level":
        return _number(wanted, taken, extra)
    return wanted


class Occupancy:
    """Which IDs are taken, and which prefixes have no free ID below them.

    An ID and each of its prefixes is written as one integer, the codes being its digits. ``taken[l]`` counts
    the distinct IDs below each prefix of l + 1 codes; a prefix is full when it has ``below[l]`` of them.
    """

    def __init__(self, sizes: tuple[int, ...], codes: np.ndarray) -> None:
        self.sizes = sizes
        self.below = [math.prod(sizes[level + 1 :]) for level in range(len(sizes))]
        self.taken: list[dict[int, int]] = [defaultdict(int) for _ in sizes]
        self._full: dict[tuple[int, int], np.ndarray] = {}
        # distinct IDs first; beyond 2^62 the numbers are Python's own
        number = np.int64 if math.prod(sizes) < 2**62 else object
        prefix = np.zeros(len(np.unique(codes, axis=0)), number)
        for level, column in enumerate(np.unique(codes, axis=0).T):
            prefix = prefix * sizes[level] + column.astype(number)
            keys, counts = np.unique(prefix, return_counts=True)
            self.taken[level].update(zip(keys.tolist(), counts.tolist(), strict=True))

    def full(self, level: int, prefix: int) -> np.ndarray:
        """bool (codes of the level,): which codes under this prefix (of `level` codes) have no free ID."""
        known = self._full.get((level, prefix))
        if known is None:
            first, counts = prefix * self.sizes[level], self.taken[level]
            known = np.array(
                [counts.get(first + code, 0) >= self.below[level] for code in range(self.sizes[level])]
            )
            self._full[level, prefix] = known
        return known

    def take(self, codes: list[int]) -> None:
        """Mark a free ID as taken."""
        prefix = 0
        for level, code in enumerate(codes):
            parent, prefix = prefix, prefix * self.sizes[level] + code
            self.taken[level][prefix] += 1
            if (level, parent) in self._full:
                self._full[level, parent][code] = self.taken[level][prefix] >= self.below[level]

    def nearest_free(self, codebooks: ResidualCodebooks, latent: np.ndarray, wanted: list[int]) -> list[int]:
        """The free ID that keeps most of the wanted prefix, nearest codes first; none free: the wanted one.

        latent: float32 (width,).
        """
        prefixes = [0]
        for size, code in zip(self.sizes, wanted, strict=True):
            prefixes.append(prefixes[-1] * size + code)
        for keep in reversed(range(len(wanted))):
            if self.full(keep, prefixes[keep]).all():
                continue
            codes, prefix = wanted[:keep], prefixes[keep]
            rest = latent - sum(
                (codebooks.codebooks[level][code] for level, code in enumerate(codes)),
                start=np.zeros_like(latent),
            )
            for level in range(keep, len(wanted)):
                distances = squared_distances(rest[None], codebooks.codebooks[level])[0]
                code = int(np.where(self.full(level, prefix), np.inf, distances).argmin())
                codes = [*codes, code]
                prefix = prefix * self.sizes[level] + code
                rest = rest - codebooks.codebooks[level][code]
            return codes
        return wanted


def _reassign(
    codebooks: ResidualCodebooks, latent: np.ndarray, wanted: np.ndarray, taken: np.ndarray
) -> np.ndarray:
    codes = wanted.copy()
    keeps = _first_choice(codebooks, latent, wanted, taken)
    occupancy = Occupancy(codebooks.sizes, np.concatenate([taken, wanted[keeps]]))
    capacity, used = math.prod(codebooks.sizes), occupancy.taken[0]
    free = capacity - sum(used.values())
    for row in np.flatnonzero(~keeps)[:free]:
        codes[row] = chosen = occupancy.nearest_free(codebooks, latent[row], wanted[row].tolist())
        occupancy.take(list(chosen))
    return codes


def _first_choice(
    codebooks: ResidualCodebooks, latent: np.ndarray, wanted: np.ndarray, taken: np.ndarray
) -> np.ndarray:
    """bool (n,): the item nearest to each wanted ID (of equally near ones the first), if it is not taken."""
    distance = np.square(codebooks.residuals(latent, wanted)).sum(1)
    everything = np.concatenate([taken, wanted])
    group = np.unique(everything, axis=0, return_inverse=True)[1].reshape(-1)
    order = np.concatenate([np.full(len(taken), -1, np.float32), distance])  # who has an ID keeps it
    by_group = np.lexsort((np.arange(len(group)), order, group))
    first = np.ones(len(group), bool)
    first[1:] = group[by_group][1:] != group[by_group][:-1]
    winners = by_group[first] - len(taken)
    keeps = np.zeros(len(wanted), bool)
    keeps[winners[winners >= 0]] = True
    return keeps


def _number(wanted: np.ndarray, taken: np.ndarray, extra: int) -> np.ndarray:
    """Append to each ID its number among the items that have the same codes, items before included."""
    base = taken[:, : wanted.shape[1]]
    group = np.unique(np.concatenate([base, wanted]), axis=0, return_inverse=True)[1].reshape(-1)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    rank = np.empty(len(group), np.int64)
    rank[order] = np.arange(len(group)) - np.repeat(starts, np.diff(starts, append=len(group)))
    numbers = np.minimum(rank[len(base) :], extra - 1).astype(np.int32)
    return np.concatenate([wanted, numbers[:, None]], axis=1)


Group = tuple[int, np.ndarray]  # a stage, the rows of the items that it brings


@dataclass(frozen=True)
class Arrival:
    """What is frozen, and what it says of every item: its vector and the codes nearest to it.

    Attributes:
        extra: codes of the extra level, where the rule has one.
        wanted: int32 (items, levels), before items are told apart.
    """

    codebooks: ResidualCodebooks
    rule: Rule
    extra: int
    vectors: ItemVectors
    wanted: np.ndarray

    def place(self, rows: np.ndarray, taken: np.ndarray) -> np.ndarray:
        """Final codes, int32 (rows, levels), of items that arrive together, beside those that are there."""
        latent = self.codebooks.latent(self.vectors.vectors[rows])
        return resolve(self.rule, self.codebooks, latent, self.wanted[rows], taken, self.extra)

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
                "sharing": quality.already_wanted(codes[rows], taken),
            }
            measured.append({"stage": int(stage), **self.measure(rows, taken), **more})
        return measured

    def measure(self, rows: np.ndarray, taken: np.ndarray) -> dict[str, Any]:
        """How many items, the error with which their nearest codes write them (None: no vector is known),
        how many want an ID that an item before them has."""
        vectors, wanted = self.vectors.take(rows), self.wanted[rows]
        return {
            "items": len(rows),
            "error": quality.quantisation_error(self.codebooks, vectors.vectors, wanted, vectors.known),
            "wanted_taken": quality.already_wanted(wanted, taken[:, : wanted.shape[1]]),
        }


def groups_of(first_stage: np.ndarray, arriving: np.ndarray) -> list[Group]:
    """The arriving items by the stage in which they first occur, earlier stages first.

    Args:
        first_stage: int (items,).
        arriving: bool (items,).
    """
    numbers = np.unique(first_stage[arriving]).tolist()
    return [(stage, np.flatnonzero(arriving & (first_stage == stage))) for stage in numbers]
