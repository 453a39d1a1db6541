"""What the tests of published formats share: a log, and how files are written, recognized and read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from event_logs import ingested

from peso.events.sources import format_at, recognized
from peso.events.stream import Stream
from peso.runtime.progress import Silent

T = 1_600_000_000
LOG = [(f"u{k % 4}", f"i{k % 6}", T + k * 60, k % 5 + 1) for k in range(48)]


def found(path: Path) -> str | None:
    """The format that is recognized at a path, which is also the one that `peso ingest` takes."""
    name = recognized(str(path))
    assert name is None or format_at(str(path), Silent()) == name
    return name


def read(directory: Path, path: Path, format: str, stages: Any = 3, **data: Any) -> Stream:
    return ingested(directory, format=format, path=str(path), stages=stages, **data)


def of_item(stream: Stream, item: str) -> tuple[str | None, str | None, str | None]:
    row = next(row for row in stream.items.to_pylist() if row["item_id"] == item)
    return row["title"], row["text"], row["category"]


def folder(tmp_path: Path, **files: str) -> Path:
    made = tmp_path / "given"
    made.mkdir(exist_ok=True)
    for name, text in files.items():
        (made / name).write_text(text)
    return made


def lines(rows: list[tuple[Any, ...]], separator: str = "\t") -> str:
    return "".join(separator.join(map(str, row)) + "\n" for row in rows)
