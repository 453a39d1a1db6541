"""A distribution made by hand, with entry points, where Python finds it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def write_distribution(place: Path, name: str, modules: Mapping[str, str], *entries: str) -> Path:
    """A directory to be put on Python's path. An entry is ``group name = module:object``."""
    information = place / f"{name}-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"[{group}]\n{entry}\n" for group, _, entry in (entry.partition(" ") for entry in entries)]
    (information / "entry_points.txt").write_text("\n".join(lines))
    for module, text in modules.items():
        (place / f"{module}.py").write_text(text, encoding="utf-8")
    return place
