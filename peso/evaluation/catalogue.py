"""What is known of items and users beside the answers: how often an item was seen, its codes, its columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from peso.errors import ConfigError
from peso.events.histories import Cases
from peso.events.stream import Stream
from peso.items.semantic_ids import SemanticIds

WINDOW = 20  # items of a history that a report may show


@dataclass(frozen=True, eq=False)
class Catalogue:
    """Items in the order of the stream's item table.

    Attributes:
        item_ids: the log's own ids.
        seen: by stage, int64 (items known at that stage,): events of each item that the stage's model may
            have learned from, those of earlier stages included. What is held back for validation and test of
            the stage is not.
        codes: int32 (items, levels).
        item_columns: by name, one value an item: title, category and the like; None where unknown.
        user_columns: by name, the value of each user that has one.
        cases: the test cases of a stage with their histories, read when they are asked for.
    """

    item_ids: Sequence[str]
    seen: Mapping[int, np.ndarray]
    codes: np.ndarray
    item_columns: Mapping[str, Sequence[str | None]] = field(default_factory=dict)
    user_columns: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    cases: Callable[[int], Cases] | None = None

    @classmethod
    def of(
        cls,
        stream: Stream,
        semantic_ids: SemanticIds,
        user_columns: Mapping[str, Mapping[str, str]] | None = None,
    ) -> Catalogue:
        """Of a stream and its index, for the stages whose items all have IDs."""
        seen, before = {}, np.zeros(len(stream.item_ids), dtype=np.int64)
        for number in range(stream.stages):
            if stream.items_known(number) > len(semantic_ids.item_ids):
                break
            stage = stream.stage(number)
            if number == 0:  # what happened before the stream
                before += np.bincount(stage.previous.values, minlength=len(before))
            learnt = np.concatenate([stage.current[row][:-2] for row in stage.eligible()])
            now = before + np.bincount(learnt, minlength=len(before))
            seen[number] = now[: stream.items_known(number)]
            before += np.bincount(stage.current.values, minlength=len(before))

        def cases(stage: int) -> Cases:
            return stream.stage(stage).test_cases(WINDOW)

        columns = {
            name: stream.items[name].to_pylist() for name in stream.items.column_names if name != "item_id"
        }
        return cls(semantic_ids.item_ids, seen, semantic_ids.codes, columns, user_columns or {}, cases)

    @cached_property
    def rows(self) -> dict[str, int]:
        """Row of each item id."""
        return {item: row for row, item in enumerate(self.item_ids)}

    def require_column(self, name: str) -> None:
        """
        Raises:
            ConfigError: neither the item nor the user table has this column (names those they have).
        """
        known = [*self.item_columns, *self.user_columns]
        if name not in known:
            raise ConfigError(
                f"segment {name!r}: neither the item table nor the user table has this column; "
                f"they have {', '.join(known) or 'none'}"
            )

    def percentiles(self, stage: int) -> np.ndarray:
        """float64 (items known,): share of the items that were seen less often at the stage, ties half.

        >>> catalogue = Catalogue([], {1: np.array([0, 5, 5, 9])}, np.zeros((4, 1)))
        >>> catalogue.percentiles(1).tolist()
        [0.125, 0.5, 0.5, 0.875]
        """
        counts = self.seen[stage]
        ordered = np.sort(counts)
        below, up_to = (np.searchsorted(ordered, counts, side) for side in ("left", "right"))
        return (below + up_to) / (2 * len(counts))

    def popularity_thirds(self, stage: int) -> np.ndarray:
        """int (items known,): 0 for the most popular items that together make up a third of the events that
        were seen, 1 for the next third, 2 for all others, the never seen ones among them.

        >>> Catalogue([], {0: np.array([1, 6, 0, 2, 2, 1])}, np.zeros((6, 1))).popularity_thirds(0).tolist()
        [2, 0, 2, 1, 2, 2]
        """
        counts = self.seen[stage]
        order = np.argsort(-counts, kind="stable")
        before = np.cumsum(counts[order]) - counts[order]  # events of all more popular items
        thirds = np.empty(len(counts), dtype=np.int64)
        thirds[order] = np.minimum(3 * before // max(1, counts.sum()), 2)
        thirds[counts == 0] = 2
        return thirds
