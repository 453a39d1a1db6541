"""Distributions made by hand, with entry points, where Python finds them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from peso.adapters.proximal.term import TERMS
from peso.config import BASELINES, STRATEGIES
from peso.config.data import DATA_SETS
from peso.evaluation.report.sections.section import SECTIONS

REGISTRIES = (STRATEGIES, TERMS, BASELINES, DATA_SETS, SECTIONS)
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """``install("shop", "class A: …", "group name = shop:A", …)``: a distribution of one module."""

    def put(name: str, module: str, *entries: str) -> None:
        place = tmp_path / f"installed {name}"
        information = place / f"{name}-1.0.dist-info"
        information.mkdir(parents=True)
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = [f"[{group}]\n{entry}\n" for group, _, entry in (entry.partition(" ") for entry in entries)]
        (information / "entry_points.txt").write_text("\n".join(lines))
        (place / f"{name}.py").write_text(module, encoding="utf-8")
        monkeypatch.syspath_prepend(place)
        monkeypatch.delitem(sys.modules, name, raising=False)

    yield put
    for registry in REGISTRIES:
        for name, part in list(registry._known.items()):
            if not part.__module__.startswith("peso."):
                del registry._known[name]
