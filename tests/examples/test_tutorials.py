"""The tutorials as they are kept: `make docs` runs them and shows what they print."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

TUTORIALS = sorted((Path(__file__).resolve().parents[2] / "docs" / "tutorials").glob("*.ipynb"))


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_is_kept_without_outputs(path):
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert any("%%bash" in "".join(cell["source"]) for cell in code)
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
