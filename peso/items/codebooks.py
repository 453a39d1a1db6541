"""Residual codebooks, the frozen quantizer that all methods produce, and RQ-KMeans, which fits them with
k-means (faiss), one level after another on the residuals of the previous levels.

A vector x is mapped to a latent z = encoder(x) (a small network, or the identity). Level 1 chooses the code
whose row is nearest to z, level 2 the one nearest to the residual, and so on:

    c_l = argmin_c ‖r_l − e_l[c]‖²,   r_1 = z,   r_{l+1} = r_l − e_l[c_l],   x̂ = decoder(Σ_l e_l[c_l])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from peso.runtime.progress import Observer

BATCH = 16_384  # vectors at a time, to limit the size of the distance matrix

Layers = tuple[tuple[np.ndarray, np.ndarray], ...]


@dataclass(frozen=True)
class ResidualCodebooks:
    """Codebooks with an encoder and a decoder.

    Attributes:
        codebooks: for each level, float32 (codes, latent width).
        encoder: linear layers (weight (out, in), bias (out,)) with ReLU between them. Without layers it is
            the identity.
        decoder: the same for the decoder.
    """

    codebooks: tuple[np.ndarray, ...]
    encoder: Layers = ()
    decoder: Layers = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(len(codebook) for codebook in self.codebooks)

    def latent(self, vectors: np.ndarray) -> np.ndarray:
        """Encode vectors, float32 (n, width), as latents, float32 (n, latent width)."""
        return _through(self.encoder, vectors)

    def nearest(self, latent: np.ndarray) -> np.ndarray:
        """int32 (n, levels): the nearest codes of each latent, level by level. Of equally near codes, the
        first is chosen."""
        codes = np.empty((len(latent), len(self.codebooks)), np.int32)
        for start in range(0, len(latent), BATCH):
            rest = latent[start : start + BATCH].copy()
            for level, codebook in enumerate(self.codebooks):
                chosen = squared_distances(rest, codebook).argmin(1)
                codes[start : start + BATCH, level] = chosen
                rest -= codebook[chosen]
        return codes

    def residuals(self, latent: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """float32 (n, latent width): the residual of each latent after subtracting its codes."""
        rest = latent.copy()
        for level, codebook in enumerate(self.codebooks):
            rest -= codebook[codes[:, level]]
        return rest

    def reconstruct(self, codes: np.ndarray) -> np.ndarray:
        """float32 (n, width): the vectors that the codes represent."""
        total = sum(codebook[codes[:, level]] for level, codebook in enumerate(self.codebooks))
        return _through(self.decoder, np.asarray(total))

    def arrays(self) -> dict[str, np.ndarray]:
        """The named arrays that are stored in ``codebooks.safetensors``."""
        named = {f"codebook.{level}": codebook for level, codebook in enumerate(self.codebooks)}
        for side, layers in (("encoder", self.encoder), ("decoder", self.decoder)):
            for number, (weight, bias) in enumerate(layers):
                named |= {f"{side}.{number}.weight": weight, f"{side}.{number}.bias": bias}
        return named

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> ResidualCodebooks:
        def layers(side: str) -> Layers:
            count = sum(name.startswith(f"{side}.") and name.endswith(".weight") for name in arrays)
            return tuple((arrays[f"{side}.{i}.weight"], arrays[f"{side}.{i}.bias"]) for i in range(count))

        levels = sum(name.startswith("codebook.") for name in arrays)
        codebooks = tuple(arrays[f"codebook.{level}"] for level in range(levels))
        return cls(codebooks, layers("encoder"), layers("decoder"))


@dataclass(frozen=True)
class Fitted:
    """Fitted codebooks, and the codes of the fitted vectors, int32 (n, levels), before collisions are
    resolved."""

    codebooks: ResidualCodebooks
    codes: np.ndarray


def squared_distances(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Squared distances, float32 (n, k), between points (n, d) and centroids (k, d). The term ‖p‖² of each
    point is left out, because it is the same for all centroids."""
    return np.square(centroids).sum(1) - 2 * points @ centroids.T


def fillable(codes: int, items: int, levels: int) -> int:
    """The number of codes of a level: the configured number, but not more than the catalog can fill.

    A code is worth a row of the vocabulary if several items share it: at least four on average at the first
    level. A smaller catalog gets as many codes as its items need for distinct IDs, codes^levels ≥ items.

    Args:
        codes: the configured number of codes.
        items: the number of items.
    """
    enough = 1
    while enough**levels < items:
        enough += 1
    return min(codes, items, max(enough, items // 4))


def _through(layers: Layers, values: np.ndarray) -> np.ndarray:
    for number, (weight, bias) in enumerate(layers):
        values = (np.maximum(values, 0) if number else values) @ weight.T + bias
    return np.array(values, dtype=np.float32)


ITERATIONS = 25
POINTS_PER_CENTROID = 256  # larger sets are sampled down, because this is enough for a good mean


def fit_rq_kmeans(vectors: np.ndarray, sizes: Sequence[int], seed: int, observer: Observer) -> Fitted:
    """Fit codebooks with these numbers of codes to vectors, float32 (n, width), with k-means."""
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
    """The centroids, float32 (size, width), of points, float32 (n, width). They depend only on the points and
    the seed.

    If there are fewer points than centroids, points are repeated, and so are centroids.
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
    """Fit codebooks with these numbers of codes to vectors, float32 (n, width), with balanced k-means."""
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
    """int32 (n,): a centroid for each point, with every centroid used ⌊n/k⌋ or ⌈n/k⌉ times.

    In each round, every unassigned point asks the nearest centroid that has room, and each centroid accepts
    the nearest points that ask.
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
