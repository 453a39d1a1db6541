"""The semantic IDs of each stage, if items get new codes at later stages (``items.refresh``).

semantic_ids/refreshed.parquet   stage, row, item_id, codes, behavior: all changes, by stage
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from peso.errors import WorkspaceError
from peso.items.names import NONE_RENAMED, ItemNames
from peso.items.semantic_ids import CODES, FORMAT, ITEM_ID, SemanticIds, read_semantic_ids
from peso.runtime.manifest import intact, read_manifest

REFRESHED_FILE = "refreshed.parquet"
REFRESH = "refresh"  # a key of the manifest: the number of stages that were refreshed, and what changed
STAGE, ROW, BEHAVIOR = "stage", "row", "behavior"  # columns of the file, beside item_id and codes


@dataclass(frozen=True)
class Changes:
    """The new codes that items got at later stages, in the order of the stages.

    Attributes:
        stages: int32 (n,), the stage of each change; its model is the first with the new codes.
        rows: int32 (n,), the rows of the items in the item table.
        codes: int32 (n, levels), their new codes.
        behavior: float32 (n, width), the vectors of behavior from which the codes were made.
    """

    stages: np.ndarray
    rows: np.ndarray
    codes: np.ndarray
    behavior: np.ndarray

    @classmethod
    def none(cls, levels: int, width: int) -> Changes:
        """No changes, of codes with so many levels and vectors of this width."""
        none = np.zeros(0, np.int32)
        return cls(none, none, np.zeros((0, levels), np.int32), np.zeros((0, width), np.float32))

    def __len__(self) -> int:
        return len(self.stages)

    def until(self, stage: int) -> Changes:
        """The changes at this stage and before."""
        kept = self.stages <= stage
        return Changes(self.stages[kept], self.rows[kept], self.codes[kept], self.behavior[kept])

    def then(self, later: Changes) -> Changes:
        """These changes and later ones."""
        pairs = ((getattr(self, name), getattr(later, name)) for name in self.__dataclass_fields__)
        return Changes(*(np.concatenate(pair) for pair in pairs))

    def applied(self, first: np.ndarray) -> np.ndarray:
        """int32 (items, levels): the codes after these changes, from the first codes of all items."""
        codes = first.copy()
        codes[self.rows] = self.codes  # of several changes of an item, the last one counts
        return codes

    def write(self, directory: Path, item_ids: Sequence[str]) -> None:
        """Write ``refreshed.parquet``."""

        def lists(values: np.ndarray, kind: pa.DataType) -> pa.Array:
            return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel(), kind), values.shape[1])

        columns = {
            STAGE: pa.array(self.stages, pa.int32()),
            ROW: pa.array(self.rows, pa.int32()),
            ITEM_ID: pa.array([item_ids[row] for row in self.rows], pa.string()),
            CODES: lists(self.codes, pa.int32()),
            BEHAVIOR: lists(self.behavior, pa.float32()),
        }
        pq.write_table(pa.table(columns), directory / REFRESHED_FILE)

    @classmethod
    def read(cls, directory: Path, manifest: Mapping[str, Any]) -> Changes | None:
        """Read the changes that :meth:`write` wrote; None if the codes are not refreshed.

        Raises:
            WorkspaceError: the file is missing or damaged.
        """
        if REFRESHED_FILE not in manifest["files"]:
            return None
        path = intact(directory, REFRESHED_FILE, manifest)

        def matrix(column: pa.ChunkedArray) -> np.ndarray:
            values = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
            return values.reshape(len(column), column.type.list_size)

        try:
            table = pq.read_table(path)
            numbers = (table[name].to_numpy() for name in (STAGE, ROW))
            return cls(*numbers, *(matrix(table[name]) for name in (CODES, BEHAVIOR)))
        except (pa.ArrowException, OSError, KeyError, AttributeError, ValueError) as error:
            raise WorkspaceError(
                f"{path} does not match its manifest ({type(error).__name__}: {error}); restore it from a "
                "copy"
            ) from None


class IdsByStage:
    """The semantic IDs that the models of the stages use.

    Args:
        first: the IDs as the items first got them.
        changes: the later changes; None without ``items.refresh``.
    """

    def __init__(self, first: SemanticIds, changes: Changes | None) -> None:
        self._first, self._changes = first, changes
        self._made: dict[int, SemanticIds] = {0: first}  # by the number of changes

    @classmethod
    def read(cls, directory: Path, names: ItemNames = NONE_RENAMED) -> IdsByStage:
        """Read the IDs in a directory, with the current names of the items. Raises WorkspaceError if a file
        is missing or damaged."""
        first = read_semantic_ids(directory).named(names)
        return cls(first, Changes.read(directory, read_manifest(directory, FORMAT)))

    def at(self, stage: int | None) -> SemanticIds:
        """The IDs at a stage, with the changes up to it; None: with all changes."""
        if self._changes is None:
            return self._first
        changes = self._changes if stage is None else self._changes.until(stage)
        if len(changes) not in self._made:
            codes = changes.applied(self._first.codes)
            self._made[len(changes)] = replace(self._first, codes=codes)
        return self._made[len(changes)]
