"""Item vectors without a pretrained model: hashed TF-IDF, reduced by truncated SVD.

The fitted parts (the features that occur, their idf, and the SVD) are stored, so that new texts are encoded
in the same way as the fitted ones: latent semantic analysis with a frozen space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from sklearn.preprocessing import normalize

FEATURES = 2**20  # hashed words and word pairs; collisions are rare up to a few hundred thousand of them
MOST_FEATURES = 32_768  # limits the size of the stored SVD (16 MiB at 128 dimensions) and its time
BATCH = 16_384  # texts that are counted at a time


@dataclass(frozen=True)
class HashingEncoder:
    """Words and word pairs, weighted by sublinear TF × idf and projected on the leading directions of the
    fitted texts.

    Attributes:
        features: int64 (f,), the hashed features in use, ascending: the ``MOST_FEATURES`` most common of
            those that occur in at least two of the fitted texts.
        idf: float32 (f,), log((1 + n) / (1 + document frequency)) + 1 of each feature.
        components: float32 (dimensions, f), the right singular vectors.
    """

    features: np.ndarray
    idf: np.ndarray
    components: np.ndarray

    @classmethod
    def fit(cls, texts: Sequence[str], dimensions: int, seed: int) -> HashingEncoder:
        """Fit the encoder to the distinct texts, so that a text that many items share counts once.

        Args:
            dimensions: the number of directions to keep. There are fewer if the texts span fewer.
            seed: the seed of the SVD.
        """
        counts = _counts(sorted(set(texts)) or [""])
        features = _frequent(counts)
        if not len(features):  # there are no words: every vector is zero, which means "no text"
            return cls(features, np.empty(0, np.float32), np.empty((1, 0), np.float32))
        counts = counts[:, features]
        weights = TfidfTransformer(sublinear_tf=True).fit(counts)
        tfidf = weights.transform(counts)
        if min(tfidf.shape) == 1:  # only one text or one word, but scikit-learn needs two
            components = np.linalg.svd(tfidf.toarray(), full_matrices=False)[2]
        else:
            rank = min(dimensions, *tfidf.shape)
            components = TruncatedSVD(rank, random_state=seed).fit(tfidf).components_
        return cls(features, weights.idf_.astype(np.float32), components.astype(np.float32))

    @property
    def dimensions(self) -> int:
        return len(self.components)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """float32 (texts, dimensions): the vector of each text; zero if none of its words is known."""
        result = np.zeros((len(texts), self.dimensions), np.float32)
        for start in range(0, len(texts) if len(self.features) else 0, BATCH):
            counts = _counts(texts[start : start + BATCH])[:, self.features]
            counts.data = np.log(counts.data) + 1  # sublinear TF, as TfidfTransformer computes it
            tfidf = normalize(counts @ sparse.diags(self.idf))
            result[start : start + BATCH] = tfidf @ self.components.T
        return result

    def arrays(self) -> dict[str, np.ndarray]:
        """The named arrays from which :meth:`from_arrays` restores the encoder."""
        return {"features": self.features, "idf": self.idf, "components": self.components}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> HashingEncoder:
        return cls(arrays["features"], arrays["idf"], arrays["components"])


def _frequent(counts: sparse.csr_matrix) -> np.ndarray:
    features, texts = np.unique(counts.indices, return_counts=True)
    if (texts > 1).any():  # a word that occurs in only one text says nothing about similar texts
        features, texts = features[texts > 1], texts[texts > 1]
    commonest = np.argsort(-texts, kind="stable")[:MOST_FEATURES]
    return np.sort(features[commonest]).astype(np.int64)


def _counts(texts: Sequence[str]) -> sparse.csr_matrix:
    """Sparse counts of words and word pairs (texts, FEATURES). The hash has no seed, so it is the same
    everywhere."""
    vectorizer = HashingVectorizer(
        n_features=FEATURES,
        ngram_range=(1, 2),
        token_pattern=r"(?u)\b\w+\b",
        alternate_sign=False,
        norm=None,
        dtype=np.float32,
    )
    return vectorizer.transform(texts)
