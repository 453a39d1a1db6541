"""The package keeps its shape, and the contributing guide shows it."""

from __future__ import annotations

import re
import runpy
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from transformers.utils import import_utils

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("grimp", reason="comes with the extra dev")
GUIDE = (ROOT / "CONTRIBUTING.md").read_text()


@pytest.fixture(scope="module")
def module() -> dict:
    return runpy.run_path(str(ROOT / "benchmarks" / "structure.py"))


@pytest.fixture(scope="module")
def found(module) -> dict:
    return module["structure"](ROOT / "peso")


def test_the_package_has_few_folders_no_loose_modules_and_no_long_functions(found):
    assert found["folders"] <= 14
    assert found["modules_at_the_root"] == ["errors.py"]
    assert found["longest_functions"][0][0] <= 100


def test_the_contributing_guide_shows_the_floors_as_they_are(module, found):
    """Counts of lines change with every commit; `structure.py --write` renews them."""
    shown = GUIDE.partition(module["BEGIN"])[2].partition(module["END"])[0]
    floors = [line for line in module["block"](found).splitlines() if line.strip().startswith("floor")]
    assert [line for line in shown.splitlines() if line.strip().startswith("floor")] == floors
    assert len(GUIDE.splitlines()) < 150


def test_no_benchmark_takes_the_name_of_a_package():
    """Beside a script Python looks before anywhere else, and Transformers imports a package `kernels`."""
    probed = set(re.findall(r'_is_package_available\("(\w+)"', Path(import_utils.__file__).read_text()))
    assert "kernels" in probed
    names = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert not names & (probed | set(sys.stdlib_module_names) | set(packages_distributions()))
