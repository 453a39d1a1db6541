"""Semantic IDs that evolve: items whose behavior has drifted get new codes at a stage, others keep theirs.

An item's behavior is its vector from the training events up to a stage, in the space of the fitted items
(:meth:`peso.items.behavior.Behavior.vectors_of`). Its drift is the squared distance between its part of the
fused vector now and at its last coding, divided by the share of behavior. So 1 is the mean squared distance
of the fitted items from their center, and about the drift of an item that had no behavior before. An item
gets new codes if

1. it has at least ``support`` training events since its last coding,
2. its drift is at least ``drift``,
3. the nearest codes of its vector now and at its last coding differ in one of the first ``depth`` levels,
4. it is among the ``share`` of the items with the largest drift.

The new codes are the nearest ones in the frozen codebooks. Collisions are resolved among these items only,
and an ID that any item has or had is never given to another.
The changes are stored and read by :mod:`peso.items.ids_by_stage`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peso.config import ItemsConfig
from peso.items.behavior import cooccurrences, shifted_ppmi
from peso.items.ids_by_stage import REFRESH, Changes
from peso.items.placement import CodeAssigner, Group, resolve
from peso.items.vectors import ItemEncoder
from peso.runtime.progress import Observer


@dataclass(frozen=True)
class TrainingLog:
    """The training events of a stream.

    Attributes:
        stages: the number of its stages.
        events: a function from stages to the item rows of each user in each of them, oldest first, without
            validation and test events.
    """

    stages: int
    events: Callable[[Iterable[int]], Iterable[np.ndarray]]


class Refresher:
    """Follows the behavior of all items from stage to stage, and gives drifted ones new codes.

    Args:
        item_ids: the item ids, in the order of the item table.
        assigner: the frozen codebooks, and the vectors of all items with the fitted behavior.
        changes: the changes so far; None if there are none.
        earlier: the entry of the manifest about these changes; None at first. The events of the earlier
            stages are counted again.
    """

    def __init__(
        self,
        item_ids: Sequence[str],
        config: ItemsConfig,
        encoder: ItemEncoder,
        assigner: CodeAssigner,
        log: TrainingLog,
        changes: Changes | None = None,
        earlier: Mapping[str, Any] | None = None,
    ) -> None:
        assert config.refresh is not None
        assert config.behavior is not None
        assert encoder.behavior is not None
        self._rule, self._options, self._log = config.refresh, config.behavior, log
        self._encoder, self._behavior, self._assigner = encoder, encoder.behavior, assigner
        levels = assigner.wanted.shape[1] + bool(assigner.extra)
        width = self._behavior.vectors.shape[1]
        self.changes = Changes.none(levels, width) if changes is None else changes
        self.found: list[dict[str, Any]] = list(earlier["stages"]) if earlier else []
        self._item_ids, self._items = item_ids, len(item_ids)
        self._since = np.zeros(self._items, np.int64)  # training events since the last coding
        self._events = np.zeros(self._items, np.int64)  # training events so far
        self._counts: Any = None
        self._through = 0
        for _ in range(earlier["through"] if earlier else 1):
            self._count_next()

    @classmethod
    def of(
        cls,
        item_ids: Sequence[str],
        config: ItemsConfig,
        encoder: ItemEncoder,
        assigner: CodeAssigner,
        log: TrainingLog | None,
        changes: Changes | None = None,
        manifest: Mapping[str, Any] | None = None,
    ) -> Refresher | None:
        """A refresher, or None without ``items.refresh``.

        Args:
            item_ids, config, encoder, assigner, log, changes: see the class.
            manifest: the manifest of the semantic IDs to continue; None if they are made now.
        """
        if config.refresh is None:
            return None
        if log is None:
            raise ValueError("items.refresh needs the training events of all stages (log)")
        earlier = None if manifest is None else manifest[REFRESH]
        return cls(item_ids, config, encoder, assigner, log, changes, earlier)

    @property
    def left(self) -> range:
        """The stages that are not refreshed yet."""
        return range(self._through, self._log.stages)

    def write(self, directory: Path) -> dict[str, Any]:
        """Write the changes, and return the entry of the manifest about them."""
        self.changes.write(directory, self._item_ids)
        return {REFRESH: {"through": self._through, "stages": self.found}}

    def refresh(self, codes: np.ndarray, done: np.ndarray, observer: Observer) -> None:
        """Test all items at the next stage, and give new codes to those that have drifted.

        The new codes are added to ``changes``. An entry is added to ``found``: the numbers of tested, drifted
        and changed items, the median drift of the tested ones, and the ids of the changed ones.

        Args:
            codes: int32 (items, levels), the first codes of all items.
            done: bool (items,), which rows of ``codes`` are known; only these items are tested.
        """
        stage = self._through
        self._count_next()
        if not self._rule.is_due(stage):
            return
        raw = self._behavior.vectors_of(shifted_ppmi(self._counts, self._options.shift))
        now, present = self._part(raw)
        then = self._part(self._coded())[0]
        drift = np.square(now - then).sum(1) / self._options.weight
        tested = done & present & (self._since >= self._rule.support)
        drifted = np.flatnonzero(tested & (drift >= self._rule.drift))
        latent, nearest = self._nearest(drifted, now)
        before, depth = self._nearest(drifted, then)[1], self._rule.depth
        moved = np.flatnonzero((nearest[:, :depth] != before[:, :depth]).any(1))
        most = math.ceil(self._rule.share * np.count_nonzero(self._events))
        chosen = np.sort(moved[np.argsort(-drift[drifted[moved]], kind="stable")][:most])
        rows, held = drifted[chosen], np.concatenate([codes[done], self.changes.codes])
        assigner = self._assigner
        new = resolve(
            assigner.rule, assigner.codebooks, latent[chosen], nearest[chosen], held, assigner.extra
        )
        numbers = np.full(len(rows), stage, np.int32)
        self.changes = self.changes.then(Changes(numbers, rows.astype(np.int32), new, raw[rows]))
        self._since[rows] = 0
        self.found.append(
            {
                "stage": stage,
                "tested": int(tested.sum()),
                "drifted": len(drifted),
                "changed": len(rows),
                "beyond_share": len(moved) - len(rows),
                "median_drift": float(np.median(drift[tested])) if tested.any() else None,
                "items": [self._item_ids[row] for row in rows],
            }
        )
        observer.note(
            f"stage {stage}: items with new codes: {len(rows):,}; drifted: {len(drifted):,} of "
            f"{int(tested.sum()):,} with enough new events"
        )

    def _count_next(self) -> None:
        """Add the events of the next stage. The codes of fitted items are made from stage 0, those of changed
        items from the stages up to their change."""
        stage = self._through
        self._through += 1
        events = np.zeros(self._items, np.int64)

        def counted() -> Iterator[np.ndarray]:
            for sequence in self._log.events([stage]):
                np.add.at(events, sequence, 1)
                yield sequence

        together = cooccurrences(counted(), self._items, self._options.window)
        self._counts = together if self._counts is None else self._counts + together
        self._events += events
        self._since += events
        if stage == 0:
            self._since[self._behavior.rows] = 0
        self._since[self.changes.rows[self.changes.stages == stage]] = 0

    def _coded(self) -> np.ndarray:
        """float32 (items, width): the vectors of behavior at the last coding; zero for none."""
        vectors = self._behavior.spread(self._items)
        vectors[self.changes.rows] = self.changes.behavior
        return vectors

    def _part(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        fusion = self._encoder.fusion
        return fusion.part(len(fusion.centers) - 1, vectors)

    def _nearest(self, rows: np.ndarray, part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The latents and nearest codes of items with these parts of behavior, float32 (items, width)."""
        vectors, books = self._assigner.vectors.vectors[rows].copy(), self._assigner.codebooks
        vectors[:, vectors.shape[1] - part.shape[1] :] = part[rows]
        latent = books.latent(vectors)
        return latent, books.nearest(latent)


def by_stage(
    assigner: CodeAssigner,
    groups: Sequence[Group],
    codes: np.ndarray,
    done: np.ndarray,
    refresher: Refresher | None,
    observer: Observer,
) -> list[dict[str, Any]]:
    """Give codes to the new items of one stage after another, and after each also to drifted items.

    Args:
        groups, codes, done: see :meth:`peso.items.placement.CodeAssigner.place_stages`.
        refresher: None without ``items.refresh``.

    Returns:
        The measures of the new items of each stage.
    """
    if refresher is None:
        return assigner.place_stages(groups, codes, done)
    new, left, measured = dict(groups), refresher.left, list[dict[str, Any]]()
    for stage in sorted({*new, *left}):
        if stage in new:
            measured += assigner.place_stages([(stage, new[stage])], codes, done, refresher.changes.codes)
        if stage in left:
            refresher.refresh(codes, done, observer)
    return measured
