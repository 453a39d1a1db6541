"""What several tests of faults share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def root(tmp_path: Path, every_file: Path) -> Path:
    return shutil.copytree(every_file, tmp_path / "w")
