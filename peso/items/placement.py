"""Resolve collisions: items whose nearest codes are the same.

There are three rules:

``reassign``: of the items that want the same ID, the nearest one keeps it. The others, in row order, take the
    nearest free code of the last level. If all codes under that prefix are taken, they take the nearest code
    of the level above that has room, and so on. So every item has a unique ID as long as there are as many
    IDs as items; the remaining items share the ID that they want.
``extra-level``: one more level numbers the items that share an ID, in row order (as in TIGER). When its codes
    run out, the remaining items share the last one.
``allow``: items may share an ID; they are ordered by their row.
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
    """The final codes of items that are added together. The codes of other items never change.

    Args:
        rule: the rule for collisions.
        latent: float32 (n, width), the items in the latent space of the codebooks.
        wanted: int32 (n, levels), the nearest codes of the items.
        taken: int32 (m, levels), the final codes of earlier items, including an extra level.
        extra: the number of codes of the extra level.

    Returns:
        int32 (n, levels); with ``extra-level`` there is one more level.
    """
    if rule == "reassign":
        return _reassign(codebooks, latent, wanted, taken)
    if rule == "extra-level":
        return _number(wanted, taken, extra)
    return wanted


class Occupancy:
    """The IDs that are taken, and the prefixes that have no free IDs left.

    IDs and prefixes are represented as integers whose digits are the codes. ``taken[l]`` counts the distinct
    IDs below each prefix of l + 1 codes. A prefix is full when it has ``below[l]`` of them.
    """

    def __init__(self, sizes: tuple[int, ...], codes: np.ndarray) -> None:
        self.sizes = sizes
        self.below = [math.prod(sizes[level + 1 :]) for level in range(len(sizes))]
        self.taken: list[dict[int, int]] = [defaultdict(int) for _ in sizes]
        self._full: dict[tuple[int, int], np.ndarray] = {}
        # int64 is too small for 2^62 IDs or more; then use Python's integers
        number = np.int64 if math.prod(sizes) < 2**62 else object
        prefix = np.zeros(len(np.unique(codes, axis=0)), number)
        for level, column in enumerate(np.unique(codes, axis=0).T):
            prefix = prefix * sizes[level] + column.astype(number)
            keys, counts = np.unique(prefix, return_counts=True)
            self.taken[level].update(zip(keys.tolist(), counts.tolist(), strict=True))

    def full(self, level: int, prefix: int) -> np.ndarray:
        """bool (codes of the level,): the codes after this prefix (``level`` codes) that have no free ID."""
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
        """The free ID that shares the longest prefix with the wanted one, with the nearest codes after it.

        Args:
            latent: float32 (width,), the item in the latent space.
            wanted: the nearest codes of the item. They are returned if no ID is free.
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
    """bool (n,): whether an item keeps the ID it wants. The nearest item does, if the ID is not taken; of
    equally near ones, the first."""
    distance = np.square(codebooks.residuals(latent, wanted)).sum(1)
    everything = np.concatenate([taken, wanted])
    group = np.unique(everything, axis=0, return_inverse=True)[1].reshape(-1)
    order = np.concatenate([np.full(len(taken), -1, np.float32), distance])  # earlier items come first
    by_group = np.lexsort((np.arange(len(group)), order, group))
    first = np.ones(len(group), bool)
    first[1:] = group[by_group][1:] != group[by_group][:-1]
    winners = by_group[first] - len(taken)
    keeps = np.zeros(len(wanted), bool)
    keeps[winners[winners >= 0]] = True
    return keeps


def _number(wanted: np.ndarray, taken: np.ndarray, extra: int) -> np.ndarray:
    """Append to each ID its number among the items with the same codes, including earlier items."""
    base = taken[:, : wanted.shape[1]]
    group = np.unique(np.concatenate([base, wanted]), axis=0, return_inverse=True)[1].reshape(-1)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    rank = np.empty(len(group), np.int64)
    rank[order] = np.arange(len(group)) - np.repeat(starts, np.diff(starts, append=len(group)))
    numbers = np.minimum(rank[len(base) :], extra - 1).astype(np.int32)
    return np.concatenate([wanted, numbers[:, None]], axis=1)


Group = tuple[int, np.ndarray]  # a stage, and the rows of its new items


@dataclass(frozen=True)
class CodeAssigner:
    """Assigns codes to items that are added together, from the frozen codebooks and the items' vectors.

    Attributes:
        codebooks: the codebooks.
        rule: the rule for collisions.
        extra: the number of codes of the extra level, if the rule has one.
        vectors: the vector of every item.
        wanted: int32 (items, levels), the nearest codes before collisions are resolved.
    """

    codebooks: ResidualCodebooks
    rule: Rule
    extra: int
    vectors: ItemVectors
    wanted: np.ndarray

    def place(self, rows: np.ndarray, taken: np.ndarray) -> np.ndarray:
        """The final codes, int32 (rows, levels), of items that are added together.

        Args:
            rows: the rows of the items.
            taken: int32 (m, levels), the final codes of earlier items.
        """
        latent = self.codebooks.latent(self.vectors.vectors[rows])
        return resolve(self.rule, self.codebooks, latent, self.wanted[rows], taken, self.extra)

    def place_stages(
        self,
        groups: Sequence[Group],
        codes: np.ndarray,
        done: np.ndarray,
        refreshed: np.ndarray | None = None,
    ) -> list[dict[str, Any]]:
        """Assign codes to the new items of one stage after another.

        Args:
            groups: the new items of each stage.
            codes: int32 (items, levels); the rows of the groups are filled in.
            done: bool (items,), which rows of ``codes`` are final; the rows of the groups are set.
            refreshed: int32 (n, levels), further codes that are taken.

        Returns:
            The measures of each stage.
        """
        measured = []
        for stage, rows in groups:
            taken = codes[done] if refreshed is None else np.concatenate([codes[done], refreshed])
            codes[rows] = self.place(rows, taken)
            done[rows] = True
            more = {
                "without_vector": int((~self.vectors.known[rows]).sum()),
                "sharing": quality.already_wanted(codes[rows], taken),
            }
            measured.append({"stage": int(stage), **self.measure(rows, taken), **more})
        return measured

    def measure(self, rows: np.ndarray, taken: np.ndarray) -> dict[str, Any]:
        """Measure how well the codes fit some items.

        Args:
            rows: the rows of the items.
            taken: int32 (m, levels), the final codes of earlier items.

        Returns:
            The number of items (``items``), the error of their nearest codes (``error``; None if no vector is
            known), and how many of them want an ID that an earlier item has (``wanted_taken``).
        """
        vectors, wanted = self.vectors.take(rows), self.wanted[rows]
        return {
            "items": len(rows),
            "error": quality.quantization_error(self.codebooks, vectors.vectors, wanted, vectors.known),
            "wanted_taken": quality.already_wanted(wanted, taken[:, : wanted.shape[1]]),
        }


def groups_of(first_stage: np.ndarray, arriving: np.ndarray) -> list[Group]:
    """Group new items by the stage in which they first occur, in the order of the stages.

    Args:
        first_stage: int (items,), the stage in which each item first occurs.
        arriving: bool (items,), which items are new.
    """
    numbers = np.unique(first_stage[arriving]).tolist()
    return [(stage, np.flatnonzero(arriving & (first_stage == stage))) for stage in numbers]
