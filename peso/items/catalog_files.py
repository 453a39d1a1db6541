"""The semantic IDs of a catalog as arrays, in the layouts that servers for generative recommendation read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from peso.items.semantic_ids import SemanticIds
from peso.runtime.files import commit_directory, require_free, write_json

FORMAT = "peso-catalog-1"


def write_catalog(ids: SemanticIds, directory: Path) -> None:
    """Write the semantic IDs of a catalog atomically.

    - ``sids.npy``: int32 (distinct IDs, levels), sorted by the first code, then by the second, and so on;
      codes of each level count from 0. ``build_static_index`` of STATIC (arXiv 2602.22647) reads this array.
    - ``item_id_to_sid.pt``: int64 tensor (levels, items), the mapping that the semantic-ID example of
      NVIDIA's recsys-examples reads; the column of an item is its number.
    - ``items.parquet``: ``item_id``, ``item`` (its number) and ``sid`` (its row in ``sids.npy``).
    - ``catalog.json``: the number of codes of each level, and ``offsets``: what to add to the codes of a
      level to number the semantic tokens from 0. If items were renamed, ``earlier_ids``: the id of each of
      them in ``items.parquet``, by its earlier ids.

    Raises:
        ExportError: the directory exists and is not empty.
        WorkspaceError: the disk is full, or the location cannot be written.
    """
    import torch

    distinct, sid = np.unique(ids.codes, axis=0, return_inverse=True)
    with commit_directory(require_free(directory)) as aside:
        np.save(aside / "sids.npy", distinct.astype(np.int32), allow_pickle=False)
        torch.save(torch.from_numpy(ids.codes.T.astype(np.int64).copy()), aside / "item_id_to_sid.pt")
        columns = {
            "item_id": pa.array(ids.item_ids, pa.string()),
            "item": pa.array(np.arange(len(ids.item_ids)), pa.int64()),
            "sid": pa.array(sid.reshape(-1), pa.int64()),
        }
        pq.write_table(pa.table(columns), aside / "items.parquet")
        told = {
            "format": FORMAT,
            "items": len(ids.item_ids),
            "sids": len(distinct),
            "codes": list(ids.sizes),
            "offsets": ids.offsets.tolist(),
            **({"earlier_ids": earlier} if (earlier := ids.earlier_ids) else {}),
        }
        write_json(aside / "catalog.json", told)
