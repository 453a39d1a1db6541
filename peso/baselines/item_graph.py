"""The item graph counts transitions between items, with decay. It is not trained.

It recommends the items that followed the newest items of the history in other users' sequences. The three
decays are those of STAN (Garg et al. 2019, SIGIR, "Sequence and Time Aware Neighborhood for Session-based
Recommendations"). STAN sums over the nearest sessions. Here the sum is over all sequences, so it is a sparse
item-to-item matrix, as in the sequential rules (SR) of Ludewig and Jannach 2018 (arXiv 1803.09587).

For all pairs (x, y) with x at most ``reach`` places before y in the sequence of a user:

    edge(i, j) = Σ_{pairs} age^a · distance^(places apart − 1) · ([x = i, y = j] + backward · [x = j, y = i])
    score(history, j) = Σ_n recency^n · edge(h_n, j)

where a is the number of stages since the event y, h_0 is the newest item of the history, and h_1 the one
before it. Items without an edge from the history are ordered by popularity, with the same decay by age.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field

from peso.baselines.baseline import Matrix
from peso.baselines.tuning import Counted, least
from peso.events.histories import Cases, Stage
from peso.model.transitions import weighted


class ItemGraph(Counted):
    """Transitions between items, weighted by recency, computed at every stage on all events so far."""

    name = "item-graph"
    SETTINGS = tuple(
        {"recency": recency, "age": age, "backward": backward}
        for recency, age, backward in (
            (0.7, 0.1, 0.3),
            (0.5, 0.1, 0.3),
            (0.5, 0.1, 0.1),
            (0.7, 0.3, 0.1),
            (0.8, 0.3, 0.6),
            (0.9, 0.3, 1.0),
            (0.5, 1.0, 0.1),
            (0.7, 1.0, 0.3),
        )
    )

    class Options(Counted.Options):
        reach: int = Field(10, ge=1, description="maximum distance of two items in a sequence")
        distance: float = Field(0.9, gt=0, le=1, description="decay of a pair's weight per place of distance")
        recency: float | None = Field(
            None,
            gt=0,
            le=1,
            description="decay of an item's weight per newer item in the history; default: chosen on "
            "validation",
        )
        age: float | None = Field(
            None,
            gt=0,
            le=1,
            description="decay of an event's weight per stage of age; default: chosen on validation",
        )
        backward: float | None = Field(
            None,
            ge=0,
            le=1,
            description="weight of the reverse edge, from the later item of a pair to the earlier; default: "
            "chosen on validation",
        )

    options: Options

    def counts(self, stages: Sequence[Stage]) -> Sequences:
        return known_sequences(stages)

    def fit(self, counts: Sequences, setting: Mapping[str, Any]) -> dict[str, Any]:
        self.recency = setting["recency"]
        age, backward = setting["age"], setting["backward"]
        self.edges = edges(counts, self.items, self.options.reach, self.options.distance, age, backward)
        recent = np.bincount(counts.items, weights=age**counts.ages, minlength=self.items)
        self.popularity = least(recent)
        return {"events": len(counts.items), "edges": int(self.edges.nnz)}

    def sums(self, cases: Cases) -> np.ndarray:
        result: np.ndarray = (
            weighted(cases.histories, self.recency, self.window, self.items) @ self.edges
        ).toarray()
        return result


@dataclass(frozen=True)
class Sequences:
    """The events of all users, user by user, oldest first.

    Attributes:
        items: int64 (events,), the item rows.
        owners: int64 (events,), the index of each event's user.
        ages: int64 (events,), the number of stages since each event.
    """

    items: np.ndarray
    owners: np.ndarray
    ages: np.ndarray


def known_sequences(stages: Sequence[Stage]) -> Sequences:
    """The events that may be used when training on the last of these stages.

    Of the last stage, these are the training targets. Events that occur only in a ``previous`` list have the
    age of the first given stage.
    """
    *past, latest = stages
    parts: dict[str, list[tuple[np.ndarray, int]]] = {}
    oldest = latest.number - stages[0].number

    def add(user: str, previous: np.ndarray, new: np.ndarray, age: int) -> None:
        own = parts.setdefault(user, [])
        if not own:
            own.append((previous, oldest))
        own.append((new, age))

    for stage in past:
        for user, previous, current in zip(stage.users, stage.previous, stage.current, strict=True):
            add(user, previous, current, latest.number - stage.number)
    for sequence in latest.training_sequences():
        first = sequence.first_target
        add(sequence.user, sequence.items[:first], sequence.items[first:], 0)
    pieces = [(owner, *part) for owner, own in enumerate(parts.values()) for part in own]
    lengths = [len(items) for _, items, _ in pieces]
    return Sequences(
        np.concatenate([np.empty(0, dtype=np.int64), *(items for _, items, _ in pieces)]),
        np.repeat(np.array([owner for owner, *_ in pieces], dtype=np.int64), lengths),
        np.repeat(np.array([age for *_, age in pieces], dtype=np.int64), lengths),
    )


def edges(known: Sequences, items: int, reach: int, distance: float, age: float, backward: float) -> Matrix:
    """The edges of the module's formula: sparse (items, items). No item has an edge to itself."""
    from scipy import sparse

    result = sparse.csr_array((items, items))
    for apart in range(1, min(reach, len(known.items) - 1) + 1):
        earlier, later = known.items[:-apart], known.items[apart:]
        pairs = (known.owners[:-apart] == known.owners[apart:]) & (earlier != later)
        if not pairs.any():
            continue
        weights = distance ** (apart - 1) * age ** known.ages[apart:][pairs].astype(np.float64)
        steps = sparse.csr_array((weights, (earlier[pairs], later[pairs])), shape=(items, items))
        result = result + steps
    return (result + backward * result.T).tocsr() if backward else result.tocsr()
