"""A shop whose log grows: its files, and what a workspace of it contains."""

from __future__ import annotations

from pathlib import Path

from event_logs import write_log

from peso.items.semantic_ids import read_semantic_ids
from peso.runtime.files import checksum

T = 1_600_000_000
EVENTS = [(f"u{k % 12}", f"i{(k * 7 + k // 12) % 20}", T + k * 3600) for k in range(200)]
NEW_ITEMS = [f"n{k}" for k in range(4)]
WEEK = [
    (f"u{k % 14}", NEW_ITEMS[k // 5 % 4] if k % 5 == 0 else f"i{k % 20}", T + (300 + k) * 3600)
    for k in range(60)
]
LATER = [(f"u{k % 12}", "m0" if k % 9 == 0 else f"i{k % 20}", T + (500 + k) * 3600) for k in range(50)]
SHELVES = ("Home > Garden", "Home > Kitchen")
PRODUCTS = [(f"i{k}", f"thing {k} of {k % 5}", SHELVES[k % 2]) for k in range(20)]
FRESH = [(name, f"new {name}", SHELVES[0]) for name in [*NEW_ITEMS, "m0"]]
TRAINED = "items: {quantizer: rq-kmeans, levels: 2, codes: 8}\n"
TWO_STAGES = f"data.stages={{boundaries: [{T + 330 * 3600}]}}"  # of a week
BY_CATEGORY = "items: {quantizer: category-path}\n"


def table(path: Path, rows: list[tuple[str, str, str]]) -> Path:
    return write_log(path, rows, "item,title,category")


def snapshot(root: Path, *but: str) -> dict[str, str]:
    """Checksums of all files that a workspace shows: what is hidden is no part of it."""
    found = {str(path.relative_to(root)): path for path in root.rglob("*") if path.is_file()}
    shown = {name: path for name, path in found.items() if not any(p[0] == "." for p in Path(name).parts)}
    return {name: checksum(path) for name, path in shown.items() if not name.startswith(but)}


def codes(root: Path) -> dict[str, list[int]]:
    ids = read_semantic_ids(root / "semantic_ids")
    return dict(zip(ids.item_ids, ids.codes.tolist(), strict=True))
