"""One vector an item from several sources (text, images, …), each given its equal share.

The rule, frozen once fitted: each row is scaled to length 1; of each source the mean of the fitted rows is
taken off and the rest divided by its root mean square length, so that no source outweighs another by its
scale or by how far its vectors lie from the origin (those of language models share a large common part); the
S sources are concatenated and divided by √S. A fused vector so has mean 0 and mean square length 1 over the
fitted items. Where an item misses a source, that part is 0: the centre of the fitted items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# Shorter than this, a vector has no direction worth the name (a text without a known word gives 0).
SHORTEST = 1e-6


@dataclass(frozen=True)
class Fusion:
    """``centres``: per source float32 (width,); ``spreads``: float (sources,), root mean square lengths."""

    centres: tuple[np.ndarray, ...]
    spreads: np.ndarray

    @classmethod
    def fit(cls, sources: Sequence[np.ndarray], rows: np.ndarray) -> Fusion:
        """Args:
        sources: float32 (items, width) each; a row of zeros stands for a missing vector.
        rows: the items to fit to.
        """
        centres, spreads = [], []
        for source in sources:
            directions, present = _directions(source[rows])
            known = directions[present].astype(np.float64)
            centre = known.mean(0) if len(known) else np.zeros(source.shape[1])
            spread = np.sqrt(np.square(known - centre).sum(1).mean()) if len(known) else 0.0
            centres.append(centre.astype(np.float32))
            # all vectors alike: nothing to scale, and nothing that differs
            spreads.append(spread if spread > SHORTEST else 1.0)
        return cls(tuple(centres), np.array(spreads))

    def apply(self, sources: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Fuse. Returns the vectors, float32 (items, sum of widths), and whether an item had any source."""
        parts, known = [], np.zeros(len(sources[0]), bool)
        for source, centre, spread in zip(sources, self.centres, self.spreads, strict=True):
            directions, present = _directions(source)
            part = (directions - centre) / np.float32(spread * np.sqrt(len(sources)))
            part[~present] = 0
            parts.append(part.astype(np.float32))
            known |= present
        return np.concatenate(parts, axis=1), known

    def arrays(self) -> dict[str, np.ndarray]:
        """What :meth:`from_arrays` needs to fuse identically."""
        centres = {f"centre.{number}": centre for number, centre in enumerate(self.centres)}
        return {**centres, "spreads": self.spreads}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Fusion:
        spreads = arrays["spreads"]
        return cls(tuple(arrays[f"centre.{number}"] for number in range(len(spreads))), spreads)


def _directions(source: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.linalg.norm(source, axis=1, keepdims=True)
    present = lengths[:, 0] > SHORTEST
    return source / np.where(present[:, None], lengths, 1), present
