"""What several tests of events share."""

from __future__ import annotations

from pathlib import Path

import pytest
from event_logs import histories, ingested, write_log
from published import LOG


@pytest.fixture
def reference(tmp_path: Path) -> list[dict[str, tuple[list[str], list[str]]]]:
    """The histories of the log that the published formats are written from."""
    path = write_log(tmp_path / "reference.csv", LOG, "user,item,time,rating")
    return histories(ingested(tmp_path / "reference", format="csv", path=str(path), stages=3))
