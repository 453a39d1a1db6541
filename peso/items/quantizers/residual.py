"""Residual codebooks: the frozen quantiser that every method of this room ends in.

NumPy only.

A vector x is taken to a latent z = encoder(x) (a small network, or the identity). Level 1 takes the code
whose row is nearest to z, level 2 the one nearest to what is left, and so on:

    c_l = argmin_c ‖r_l − e_l[c]‖²,   r_1 = z,   r_{l+1} = r_l − e_l[c_l],   x̂ = decoder(Σ_l e_l[c_l])
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

BATCH = 16_384  # vectors at a time: bounds the matrix of distances

Layers = tuple[tuple[np.ndarray, np.ndarray], ...]


@dataclass(frozen=True)
class ResidualCodebooks:
    """Codebooks, and the network around them.

    Attributes:
        codebooks: per level float32 (codes, latent width).
        encoder: linear layers (weight (out, in), bias (out,)) with ReLU between them; none: the identity.
        decoder: likewise.
    """

    codebooks: tuple[np.ndarray, ...]
    encoder: Layers = ()
    decoder: Layers = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(len(codebook) for codebook in self.codebooks)

    def latent(self, vectors: np.ndarray) -> np.ndarray:
        """float32 (n, latent width) of float32 (n, width)."""
        return _through(self.encoder, vectors)

    def nearest(self, latent: np.ndarray) -> np.ndarray:
        """int32 (n, levels): the codes of each latent, level by level; of equally near ones the first."""
        codes = np.empty((len(latent), len(self.codebooks)), np.int32)
        for start in range(0, len(latent), BATCH):
            rest = latent[start : start + BATCH].copy()
            for level, codebook in enumerate(self.codebooks):
                chosen = squared_distances(rest, codebook).argmin(1)
                codes[start : start + BATCH, level] = chosen
                rest -= codebook[chosen]
        return codes

    def residuals(self, latent: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """float32 (n, latent width): what the codes leave of each latent."""
        rest = latent.copy()
        for level, codebook in enumerate(self.codebooks):
            rest -= codebook[codes[:, level]]
        return rest

    def reconstruct(self, codes: np.ndarray) -> np.ndarray:
        """float32 (n, width): the vectors that the codes stand for."""
        total = sum(codebook[codes[:, level]] for level, codebook in enumerate(self.codebooks))
        return _through(self.decoder, np.asarray(total))

    def arrays(self) -> dict[str, np.ndarray]:
        """Named arrays of a ``codebooks.safetensors``."""
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
    """Fitted codebooks, and the codes of the fitted vectors: int32 (n, levels), not yet told apart."""

    codebooks: ResidualCodebooks
    codes: np.ndarray


def squared_distances(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """float32 (n, k) of float32 (n, d) and (k, d), without the points' own ‖p‖² (the same for all k)."""
    return np.square(centroids).sum(1) - 2 * points @ centroids.T


def fillable(codes: int, items: int, levels: int) -> int:
    """How many codes a level gets: those asked for, but no more than the catalogue can fill.

    A code is worth a row of the vocabulary if several items share it: at least four on average at the first
    level. A catalogue too small for that keeps what its items need to be told apart, codes^levels ≥ items.
    """
    enough = 1
    while enough**levels < items:
        enough += 1
    return min(codes, items, max(enough, items // 4))


def _through(layers: Layers, values: np.ndarray) -> np.ndarray:
    for number, (weight, bias) in enumerate(layers):
        values = (np.maximum(values, 0) if number else values) @ weight.T + bias
    return np.array(values, dtype=np.float32)
