"""Explains the score of an item: its codes under two stages, its events, and similar items."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from peso.runs.workspace import Workspace
from peso.runtime.machine import threads
from peso.serving.snapshot import Identity, Snapshot

if TYPE_CHECKING:
    from scipy import sparse

NEAREST = 5  # number of similar items
WORDS = 32_768  # size of the TF-IDF vocabulary
SAME = 0.005  # change of a log-probability below which it counts as unchanged
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
By = Literal["item head", "texts", "codes"]
Near = list[tuple[str, float]]


@dataclass(frozen=True)
class Likelihood:
    """The log-probability of an item after a history, under one stage.

    Attributes:
        score: the log-probability, as in recommendations by the model alone.
        codes: the conditional log-probability of each code of the item's semantic ID.
        has_head: whether the score includes an item head.
    """

    score: float
    codes: list[float]
    has_head: bool

    @property
    def head(self) -> float | None:
        """What the item head adds to the sum of the codes; None without one."""
        return self.score - sum(self.codes) if self.has_head else None


def likelihood(snapshot: Snapshot, history: Sequence[str], item: str) -> Likelihood | None:
    """The likelihood of an item; None if the stage has no model yet, does not know the item, or knows no item
    of the history. Call it in the engine's thread."""
    model, ids = snapshot.model, snapshot.semantic_ids
    known = snapshot.known(history)[0]
    if model is None or item not in ids or not known:
        return None
    from peso.decoding import search

    with threads(model, snapshot.threads):
        found = search(model, [ids.rows(known)], beams=1, targets=ids.rows([item]))
    assert found.targets is not None
    assert found.target_scores is not None
    return Likelihood(float(found.target_scores[0]), found.targets[0].tolist(), bool(model.has_item_head))


def near_by_head(snapshot: Snapshot, item: str) -> Near | None:
    """The items with the most similar vectors (cosine) of the item head; None without a head. Call it in the
    engine's thread."""
    if snapshot.model is None or not snapshot.model.has_item_head or item not in snapshot.semantic_ids:
        return None
    head = getattr(snapshot.model.vocabulary, "item_head", None)
    if head is None:
        return None
    import torch
    from torch.nn import functional as F

    with torch.no_grad():
        vectors = F.normalize(head.vectors().float(), dim=-1)  # (items, width)
        similar = (vectors @ vectors[snapshot.semantic_ids.row(item)]).cpu().numpy()
    return _best(snapshot, item, similar)


def near_by_codes(snapshot: Snapshot, item: str) -> Near:
    """The items that share the longest prefix of codes; the similarity is the share of common codes."""
    codes = snapshot.semantic_ids.codes
    same = (codes == codes[snapshot.semantic_ids.row(item)]).cumprod(axis=1).sum(axis=1)
    return _best(snapshot, item, same / codes.shape[1])


class ItemTexts:
    """TF-IDF vectors (words and word pairs) of item texts, computed on demand and cached until the catalog
    changes. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of: Identity | None = None
        self._vectors: sparse.csr_matrix | None = None

    def near(self, workspace: Workspace, snapshot: Snapshot, item: str) -> Near | None:
        """The items with the most similar texts (cosine); None if there is no text with common words."""
        with self._lock:
            if self._of != snapshot.identity:
                self._vectors = self._computed(workspace, len(snapshot.semantic_ids.item_ids))
                self._of = snapshot.identity
            vectors = self._vectors
        if vectors is None:
            return None
        similar = (vectors @ vectors[snapshot.semantic_ids.row(item)].T).toarray()[:, 0]
        near = [(other, score) for other, score in _best(snapshot, item, similar) if score > 0]
        return near or None

    def _computed(self, workspace: Workspace, items: int) -> sparse.csr_matrix | None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        from peso.items.vectors import item_texts

        texts = item_texts(workspace.stream.items, workspace.config.items.template)[:items]
        words = TfidfVectorizer(
            ngram_range=(1, 2), max_features=WORDS, sublinear_tf=True, dtype=np.float32, min_df=2
        )
        try:
            return words.fit_transform([text or "" for text in texts])
        except ValueError:  # no words
            return None


def _best(snapshot: Snapshot, item: str, similar: np.ndarray) -> Near:
    """The ``NEAREST`` most similar other items; ties in the order of the catalog."""
    similar = similar.astype(np.float64, copy=True)
    similar[snapshot.semantic_ids.row(item)] = -np.inf
    count = min(NEAREST, len(similar) - 1)
    if count < 1:
        return []
    least = np.partition(similar, -count)[-count]
    rows = np.flatnonzero(similar >= least)
    rows = rows[np.argsort(-similar[rows], kind="stable")][:count]
    return [(snapshot.semantic_ids.item_ids[row], float(similar[row])) for row in rows]


def reason(
    item: str,
    now: tuple[Snapshot, Likelihood | None],
    before: tuple[Snapshot, Likelihood | None],
    events: dict[int, int],
) -> str:
    """A few sentences on why the score of an item differs from that under the previous stage.

    Args:
        now, before: the serving and the previous stage, each with the likelihood of the item.
        events: the number of events of the item, by stage of the stream.
    """
    (stage, likely), (earlier, then) = now, before
    seen = ", ".join(f"{count:,} in stage {number}" for number, count in sorted(events.items()))
    counts = f" Events of the item: {seen}." if events else ""
    if item not in earlier.semantic_ids:
        return f"Stage {earlier.stage} does not know the item.{counts}"
    if item not in stage.semantic_ids:
        return f"Stage {stage.stage} does not know the item.{counts}"
    if likely is None or then is None:
        return counts.strip()
    change = likely.score - then.score
    place = f"Its place also depends on the other items.{counts}"
    if abs(change) < SAME:
        return f"Its log-probability stayed the same ({likely.score:.2f}). {place}"
    moved = "rose" if change > 0 else "fell"
    text = f"Its log-probability {moved} by {abs(change):.2f} (from {then.score:.2f} to {likely.score:.2f})"
    names, former_names = (snapshot.semantic_ids.semantic_id(item) for snapshot in (stage, earlier))
    if names != former_names:  # levels with other codes cannot be compared
        return f"{text}. Its codes changed from {''.join(former_names)} to {''.join(names)}. {place}"
    parts = {
        f"the {_ordinal(level)} code {token}": after - former
        for level, (token, after, former) in enumerate(zip(names, likely.codes, then.codes, strict=True))
    }
    if likely.has_head or then.has_head:
        parts["the item head"] = (likely.head or 0.0) - (then.head or 0.0)
    name, most = max(parts.items(), key=lambda part: part[1] if change > 0 else -part[1])
    if most * change > 0:
        text += f", mostly through {name} ({most:+.2f})"
    return f"{text}. {place}"


def _ordinal(level: int) -> str:
    return ORDINALS[level] if level < len(ORDINALS) else f"{level + 1}th"
