"""Small logs, read with what is said on the way, or refused in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from event_logs import data_config

from peso.errors import PesoError
from peso.events.ingest import ingest
from peso.events.stream import Stream

T = 1_600_000_000
LOG = [(f"u{k % 4}", f"i{k * 7 % 10}", T + 60 * k) for k in range(60)]
ROWS = [{"user": user, "item": item, "time": time} for user, item, time in LOG]


class Notes:
    """An Observer that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, text: str) -> None:
        self.told.append(text)

    def begin(self, *_: object) -> None: ...
    def advance(self, *_: object, **__: object) -> None: ...
    def end(self) -> None: ...


def read(folder: Path, path: Path | str, format: str = "csv", **data: Any) -> tuple[Stream, str]:
    """The stream, and what was said while it was made."""
    folder.mkdir(parents=True)
    notes = Notes()
    ingest(data_config(format=format, path=str(path), **{"stages": 1, **data}), folder, observer=notes)
    return Stream.open(folder), "\n".join(notes.told)


def refused(folder: Path, match: str, path: Path | str, format: str = "csv", **data: Any) -> None:
    with pytest.raises(PesoError, match=match) as caught:
        read(folder, path, format, **data)
    assert "\n" not in str(caught.value)


def expected() -> list[dict[str, tuple[list[str], list[str]]]]:
    return [{f"u{u}": ([], [i for user, i, _ in LOG if user == f"u{u}"]) for u in range(4)}]
