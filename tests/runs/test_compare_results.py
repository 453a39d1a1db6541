"""Reading the results of a comparison again."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from peso.errors import WorkspaceError
from peso.runs.compare.results import runs_by_data


def test_results_whose_workspaces_are_elsewhere_are_refused(tmp_path: Path) -> None:
    row = {"data_set": "games", "strategy": "single", "seed": 0, "determined_by": "0" * 64}
    pq.write_table(
        pa.Table.from_pylist([row | {"workspace": "runs/games/single"}]), tmp_path / "results.parquet"
    )
    with pytest.raises(
        WorkspaceError, match="names the workspace runs/games/single, which does not exist in this directory"
    ):
        runs_by_data(tmp_path, print)


def test_a_directory_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match=r"results\.parquet does not exist"):
        runs_by_data(tmp_path, print)
