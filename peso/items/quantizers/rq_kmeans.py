"""RQ-KMeans: k-means level by level on what the levels before leave over (faiss).

Knows vectors; knows nothing of items.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from peso.items.quantizers.residual import Fitted, ResidualCodebooks
from peso.progress import Observer

ITERATIONS = 25
POINTS_PER_CENTROID = 256  # more are sampled down: a mean is known well enough by then


def fit_rq_kmeans(vectors: np.ndarray, sizes: Sequence[int], seed: int, observer: Observer) -> Fitted:
    """Fit codebooks of ``sizes`` to float32 (n, width) vectors."""
    observer.begin("residual k-means", len(sizes), "levels")
    rest = np.ascontiguousarray(vectors, dtype=np.float32)
    codebooks = []
    for level, size in enumerate(sizes):
        centroids = kmeans(rest, size, seed + level)
        one = ResidualCodebooks((centroids,))
        rest = one.residuals(rest, one.nearest(rest))
        codebooks.append(centroids)
        observer.advance(level + 1)
    fitted = ResidualCodebooks(tuple(codebooks))
    return Fitted(fitted, fitted.nearest(vectors))


def kmeans(points: np.ndarray, size: int, seed: int) -> np.ndarray:
    """float32 (size, width) centroids of float32 (n, width) points. The same for the same seed.

    Fewer points than centroids: they are repeated, and so are centroids.
    """
    import faiss

    points = points if len(points) >= size else np.resize(points, (size, points.shape[1]))

    clustering = faiss.Kmeans(
        points.shape[1],
        size,
        niter=ITERATIONS,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=POINTS_PER_CENTROID,
    )
    clustering.train(points)
    return np.array(clustering.centroids, dtype=np.float32)
