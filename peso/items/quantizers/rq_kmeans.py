"""RQ-KMeans: k-means level by level on what the levels before leave over (faiss)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from peso.items.quantizers.residual import BATCH, Fitted, ResidualCodebooks, squared_distances
from peso.runtime.progress import Observer

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


BALANCED_ITERATIONS = 10


def fit_balanced_rq_kmeans(
    vectors: np.ndarray, sizes: Sequence[int], seed: int, observer: Observer
) -> Fitted:
    """Fit codebooks of ``sizes`` to float32 (n, width) vectors."""
    observer.begin("balanced residual k-means", len(sizes), "levels")
    rest = np.ascontiguousarray(vectors, dtype=np.float32)
    codebooks, codes = [], []
    for level, size in enumerate(sizes):
        centroids = kmeans(rest, size, seed + level)
        for _ in range(BALANCED_ITERATIONS):
            chosen = balanced_assignment(rest, centroids)
            centroids = _means(rest, chosen, size)
        chosen = balanced_assignment(rest, centroids)
        rest = rest - centroids[chosen]
        codebooks.append(centroids)
        codes.append(chosen)
        observer.advance(level + 1)
    return Fitted(ResidualCodebooks(tuple(codebooks)), np.stack(codes, axis=1))


def balanced_assignment(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """int32 (n,): a centroid for each point, every centroid ⌊n/k⌋ or ⌈n/k⌉ times.

    In rounds: each point left asks the nearest centroid that has room, which accepts its nearest askers.
    """
    points_count, size = len(points), len(centroids)
    room = np.full(size, points_count // size)
    chosen = np.full(points_count, -1, np.int32)
    left = np.arange(points_count)
    while len(left):
        if not room.any():
            room[:] = 1  # only the remainder of n / k is left
        asked, distance = _nearest_open(points[left], centroids, room > 0)
        order = np.lexsort((left, distance, asked))
        starts = np.searchsorted(asked[order], np.arange(size))
        rank = np.arange(len(order)) - starts[asked[order]]
        accepted = order[rank < room[asked[order]]]
        chosen[left[accepted]] = asked[accepted]
        room -= np.bincount(asked[accepted], minlength=size)
        left = np.delete(left, accepted)
    return chosen


def _nearest_open(
    points: np.ndarray, centroids: np.ndarray, is_open: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    numbers = np.flatnonzero(is_open)
    asked = np.empty(len(points), np.int32)
    distance = np.empty(len(points), np.float32)
    for start in range(0, len(points), BATCH):
        part = points[start : start + BATCH]
        distances = squared_distances(part, centroids[numbers])
        best = distances.argmin(1)
        asked[start : start + BATCH] = numbers[best]
        nearest = np.take_along_axis(distances, best[:, None], 1)[:, 0]
        distance[start : start + BATCH] = nearest + np.square(part).sum(1)
    return asked, distance


def _means(points: np.ndarray, chosen: np.ndarray, size: int) -> np.ndarray:
    sums = np.zeros((size, points.shape[1]), np.float64)
    np.add.at(sums, chosen, points)
    return (sums / np.maximum(np.bincount(chosen, minlength=size), 1)[:, None]).astype(np.float32)
