"""Item vectors made elsewhere, from text or images: ``.npy``, ``.parquet`` and ``.safetensors`` files.

    .parquet       a column item_id, and either one column of lists or one numeric column per dimension
    .npy           a matrix; item ids are in NAME.ids.txt, one per line, in the order of the rows
    .safetensors   one matrix; item ids are also in NAME.ids.txt

Without a NAME.ids.txt, the matrix must have one row for each row of the item table, in the same order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError
from safetensors.numpy import load_file

from peso.errors import DataError
from peso.runtime.progress import Observer

ITEM_ID = "item_id"


def read_vectors(
    path: str | Path,
    item_ids: Sequence[str],
    observer: Observer | None = None,
    names: Sequence[Sequence[str]] | None = None,
) -> np.ndarray:
    """Read the vectors of items from a file.

    Args:
        path: the file. Vectors of other items are ignored.
        observer: receives a note about items without a vector.
        names: all ids of each item; the first one that the file has counts. None: only those of
            ``item_ids``.

    Returns:
        float32 (items, width), with zeros for items that have no vector.

    Raises:
        DataError: the file is unreadable or has no matrix, an item occurs twice, a vector has NaN or infinity
            (the message names the item), the file has no item ids and another number of rows than there are
            items, or it has none of the items.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} is missing; check items.vectors")
    ids, matrix = _read(path)
    if matrix.ndim != 2 or not matrix.shape[1] or matrix.dtype.kind not in "iuf":
        raise DataError(
            f"{path} contains {matrix.dtype} of shape {matrix.shape} instead of one row of numbers per item"
        )
    if ids is None:
        if len(matrix) != len(item_ids):
            raise DataError(
                f"{path} has {len(matrix)} rows for {len(item_ids)} items; add {_names_of(path).name} with "
                "the ids of its rows, or use one row per item in the order of the item table"
            )
        ids = list(item_ids)
    if len(ids) != len(matrix):
        raise DataError(f"{path} has {len(matrix)} rows but {len(ids)} item ids; give one id per row")
    rows = {item: row for row, item in enumerate(ids)}
    if len(rows) < len(ids):
        twice = next(item for row, item in enumerate(ids) if rows[item] != row)
        raise DataError(f"{path} has item {twice!r} twice; keep one vector per item")
    with np.errstate(over="ignore"):
        matrix = matrix.astype(np.float32)
    finite = np.isfinite(matrix).all(axis=1)
    if not finite.all():
        item = ids[int((~finite).argmax())]
        raise DataError(
            f"{path} has NaN or infinity in the vector of item {item!r} (and of {int((~finite).sum()) - 1} "
            "more); correct the vectors, or remove these items"
        )
    every = [[item] for item in item_ids] if names is None else names
    there = [next((rows[name] for name in known if name in rows), -1) for known in every]
    found = np.array(there, dtype=np.int64)
    if len(item_ids) and (found < 0).all():
        raise DataError(
            f"{path} has no vector for any of the {len(item_ids)} items (its first item is {ids[:1]}, that "
            f"of the catalog {list(item_ids[:1])}); use the item ids of the log"
        )
    vectors = np.zeros((len(item_ids), matrix.shape[1]), np.float32)
    vectors[found >= 0] = matrix[found[found >= 0]]
    without = [item for item, row in zip(item_ids, found, strict=True) if row < 0]
    if without and observer is not None:
        observer.note(f"{path.name}: no vector for {len(without):,} of {len(item_ids):,} items")
        alike = {_folded(item): item for item in rows}
        near = [item for item in without if _folded(item) in alike]
        if near:
            observer.note(
                f"note: {len(near):,} of them differ from an id in the file only in leading zeros, decimals, "
                f"spaces or case, for example {near[0]!r} and {alike[_folded(near[0])]!r}; use one spelling "
                "for each id"
            )
    return vectors


def _folded(item: str) -> str:
    """An id in lower case, without leading zeros, decimals and surrounding spaces."""
    return re.sub(r"\.0+$", "", item.strip().lower()).lstrip("0")


def _read(path: Path) -> tuple[list[str] | None, np.ndarray]:
    try:
        if path.suffix == ".parquet":
            return _parquet(path)
        if path.suffix == ".npy":
            matrix = np.load(path, allow_pickle=False)
        elif path.suffix == ".safetensors":
            arrays = load_file(path)
            if len(arrays) != 1:
                raise DataError(f"{path} contains the tensors {sorted(arrays)}, but one matrix is needed")
            (matrix,) = arrays.values()
        else:
            raise DataError(
                f"{path} is not a .npy, .parquet or .safetensors file; convert the vectors to one of these"
            )
        names = _names_of(path)
        ids = (
            names.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n") if names.is_file() else None
        )
    except (OSError, ValueError, TypeError, EOFError, SafetensorError, pa.ArrowException) as error:
        raise DataError(
            f"{path} is not readable ({type(error).__name__}: {error}); write it again with float32 vectors"
        ) from None
    return ids, matrix


def _parquet(path: Path) -> tuple[list[str], np.ndarray]:
    table = pq.ParquetFile(path).read()
    if ITEM_ID not in table.column_names:
        raise DataError(f"{path} has the columns {table.column_names}, but needs a column {ITEM_ID!r}")
    ids = _ids(path, table[ITEM_ID])
    columns = [name for name in table.column_names if name != ITEM_ID]
    if len(columns) != 1 or not pa.types.is_nested(table.schema.field(columns[0]).type):
        return ids, np.stack([table[name].to_numpy() for name in columns], axis=1) if columns else np.empty(0)
    rows = [np.asarray(row if row is not None else [], float) for row in table[columns[0]].to_pylist()]
    widths = [len(row) for row in rows]
    odd = next((at for at, width in enumerate(widths) if width != widths[0]), None)
    if odd is not None:
        raise DataError(
            f"{path}: the vector of item {ids[odd]!r} has {widths[odd]} values, but that of item {ids[0]!r} "
            f"has {widths[0]}; use the same number for all items"
        )
    return ids, np.array(rows)


def _ids(path: Path, column: pa.ChunkedArray) -> list[str]:
    """The ids as text, as in a log: whole floats become integers, and every row must have an id."""
    if pa.types.is_nested(column.type):
        raise DataError(f"{path}: column {ITEM_ID!r} has the type {column.type}, but ids are text or numbers")
    if pa.types.is_floating(column.type):
        values = [None if v is None or not math.isfinite(v) else v for v in column.to_pylist()]
        ids = [None if v is None else str(int(v) if v == int(v) else v) for v in values]
    else:
        ids = column.cast(pa.string()).to_pylist()
    if None in ids:
        raise DataError(
            f"{path}: row {ids.index(None) + 1} has no {ITEM_ID}; add the item id, or remove the row"
        )
    return [item for item in ids if item is not None]


def _names_of(path: Path) -> Path:
    return path.with_name(f"{path.stem}.ids.txt")
