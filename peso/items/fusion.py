"""Fuse several sources of vectors (text, images, behavior) into one vector per item.

Each row is scaled to length 1. For each source, the mean of the fitted rows is subtracted, and the rest is
divided by its root mean square length. So no source dominates because of its scale or because its vectors are
far from the origin (those of language models share a large common part). Then each source is multiplied by
the square root of its share, and all are concatenated. So fused vectors have mean 0 and mean squared length 1
over the fitted items, and the squared distance of two items is the sum of share × squared distance in each
source. If an item lacks a source, that part is 0. The means and lengths are frozen after fitting.

All sources have the same share. With ``items.behavior`` of weight w, vectors of behavior have the share w,
and the other sources have equal parts of 1 − w. The sources are not added, because the axes of two
spaces have nothing to do with each other: a sum would mix them at random.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# A shorter vector has no meaningful direction (a text without known words gives 0).
SHORTEST = 1e-6


@dataclass(frozen=True)
class Fusion:
    """The center of each source, float32 (width,), and the root mean square lengths, float (sources,).

    ``weight`` is the share of the last source, which is behavior; None if all sources have the same share.
    """

    centers: tuple[np.ndarray, ...]
    spreads: np.ndarray
    weight: float | None = None

    @classmethod
    def fit(cls, sources: Sequence[np.ndarray], rows: np.ndarray, weight: float | None = None) -> Fusion:
        """Fit the centers and lengths.

        Args:
            sources: the vectors of each source, float32 (items, width); a row of zeros is a missing vector.
            rows: the rows of the items to fit to.
            weight: the share of the last source; None if all sources have the same share.
        """
        centers, spreads = [], []
        for source in sources:
            directions, present = _directions(source[rows])
            known = directions[present].astype(np.float64)
            center = known.mean(0) if len(known) else np.zeros(source.shape[1])
            spread = np.sqrt(np.square(known - center).sum(1).mean()) if len(known) else 0.0
            centers.append(center.astype(np.float32))
            # all vectors are the same, so there is nothing to scale
            spreads.append(spread if spread > SHORTEST else 1.0)
        return cls(tuple(centers), np.array(spreads), weight)

    def apply(self, sources: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Fuse sources. Returns the vectors, float32 (items, sum of widths), and which sources each item has,
        bool (sources, items)."""
        assert len(sources) == len(self.centers)
        parts, has = zip(*(self.part(number, source) for number, source in enumerate(sources)), strict=True)
        return np.concatenate(parts, axis=1), np.stack(has)

    def part(self, number: int, source: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The part of one source, by its number, in the fused vectors, float32 (items, width), and which
        items have it, bool (items,)."""
        directions, present = _directions(source)
        part = (directions - self.centers[number]) / np.float32(self._lengths()[number])
        part[~present] = 0
        return part.astype(np.float32), present

    def _lengths(self) -> np.ndarray:
        """float (sources,): what the vectors of each source are divided by, spread / √share."""
        count = len(self.spreads)
        if self.weight is None:
            return self.spreads * np.sqrt(count)
        shares = np.append(np.full(count - 1, (1 - self.weight) / (count - 1)), self.weight)
        return np.asarray(self.spreads / np.sqrt(shares))

    def arrays(self) -> dict[str, np.ndarray]:
        """The named arrays from which :meth:`from_arrays` restores the fusion."""
        named = {f"centre.{number}": center for number, center in enumerate(self.centers)}
        if self.weight is not None:
            named["weight"] = np.array([self.weight])
        return {**named, "spreads": self.spreads}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Fusion:
        spreads = arrays["spreads"]
        weight = float(arrays["weight"][0]) if "weight" in arrays else None
        return cls(tuple(arrays[f"centre.{number}"] for number in range(len(spreads))), spreads, weight)


def _directions(source: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.linalg.norm(source, axis=1, keepdims=True)
    present = lengths[:, 0] > SHORTEST
    return source / np.where(present[:, None], lengths, 1), present
