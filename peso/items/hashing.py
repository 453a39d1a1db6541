"""Item vectors without a model and without a network: hashed TF-IDF, reduced by truncated SVD.

What is fitted (which features occur, their idf, the SVD) is kept, so that a text of later is encoded
exactly as if it had been there: latent semantic analysis with a frozen space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from sklearn.preprocessing import normalize

FEATURES = 2**20  # hashed words and word pairs; collisions are rare up to some hundred thousand of them
MOST_FEATURES = 32_768  # bounds the stored SVD (16 MiB at 128 dimensions) and its time
BATCH = 16_384  # texts that are turned into counts at a time


@dataclass(frozen=True)
class HashingEncoder:
    """Words and word pairs, sublinear TF × idf, projected on the leading directions of the fitted texts.

    Attributes:
        features: int64 (f,), ascending: the hashed features in use, those of at least two of the fitted
            texts, the ``MOST_FEATURES`` commonest of them.
        idf: float32 (f,): log((1 + n) / (1 + document frequency)) + 1.
        components: float32 (dimensions, f): right singular vectors.
    """

    features: np.ndarray
    idf: np.ndarray
    components: np.ndarray

    @classmethod
    def fit(cls, texts: Sequence[str], dimensions: int, seed: int) -> HashingEncoder:
        """Fit to the distinct texts: a text that many items share counts once.

        Fewer than ``dimensions`` directions are kept where the texts span no more.
        """
        counts = _counts(sorted(set(texts)) or [""])
        features = _frequent(counts)
        if not len(features):  # not one word, or no text: every vector is zero, which stands for "no text"
            return cls(features, np.empty(0, np.float32), np.empty((1, 0), np.float32))
        counts = counts[:, features]
        weights = TfidfTransformer(sublinear_tf=True).fit(counts)
        tfidf = weights.transform(counts)
        if min(tfidf.shape) == 1:  # one text, or one word: scikit-learn asks for two
            components = np.linalg.svd(tfidf.toarray(), full_matrices=False)[2]
        else:
            rank = min(dimensions, *tfidf.shape)
            components = TruncatedSVD(rank, random_state=seed).fit(tfidf).components_
        return cls(features, weights.idf_.astype(np.float32), components.astype(np.float32))

    @property
    def dimensions(self) -> int:
        return len(self.components)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """float32 (texts, dimensions); zero where a text has no word that occurred in the fitted ones."""
        result = np.zeros((len(texts), self.dimensions), np.float32)
        for start in range(0, len(texts) if len(self.features) else 0, BATCH):
            counts = _counts(texts[start : start + BATCH])[:, self.features]
            counts.data = np.log(counts.data) + 1  # sublinear TF, as TfidfTransformer computes it
            tfidf = normalize(counts @ sparse.diags(self.idf))
            result[start : start + BATCH] = tfidf @ self.components.T
        return result

    def arrays(self) -> dict[str, np.ndarray]:
        """What :meth:`from_arrays` needs to encode identically."""
        return {"features": self.features, "idf": self.idf, "components": self.components}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> HashingEncoder:
        return cls(arrays["features"], arrays["idf"], arrays["components"])


def _frequent(counts: sparse.csr_matrix) -> np.ndarray:
    features, texts = np.unique(counts.indices, return_counts=True)
    if (texts > 1).any():  # a word of one text alone tells nothing of neighbours
        features, texts = features[texts > 1], texts[texts > 1]
    commonest = np.argsort(-texts, kind="stable")[:MOST_FEATURES]
    return np.sort(features[commonest]).astype(np.int64)


def _counts(texts: Sequence[str]) -> sparse.csr_matrix:
    """Sparse (texts, FEATURES) counts of words and pairs. The hash has no seed: the same everywhere."""
    vectorizer = HashingVectorizer(
        n_features=FEATURES,
        ngram_range=(1, 2),
        token_pattern=r"(?u)\b\w+\b",
        alternate_sign=False,
        norm=None,
        dtype=np.float32,
    )
    return vectorizer.transform(texts)
