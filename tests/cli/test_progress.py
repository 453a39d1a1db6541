"""The lines of progress in a file, where no bar can be drawn."""

from __future__ import annotations

from itertools import count
from types import SimpleNamespace

import pytest

from peso.cli import display


def test_the_rate_is_that_of_the_work_between_two_reports(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = count(0, 10)
    monkeypatch.setattr(display, "SECONDS_BETWEEN_LINES", 5)
    monkeypatch.setattr(display, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    terminal = display.Terminal()
    terminal.begin("reading", 4000, "events")
    terminal.advance(1000)  # may be resumed work: no rate is known
    terminal.advance(3000, loss=0.5)
    terminal.end()
    assert capsys.readouterr().err.splitlines() == [
        "reading: 1000/4000 events",
        "reading: 3000/4000 events, 200 events/s  loss 0.5, 5.0 s left",
        "reading: 30.0 s",
    ]
