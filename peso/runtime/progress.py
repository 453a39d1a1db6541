"""The interface through which long operations report their progress."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


class Observer(Protocol):
    """Receives the progress of a run. The command line shows it as bars."""

    def note(self, text: str) -> None:
        """Receive a sentence about what was done or found."""

    def begin(self, title: str, total: int, unit: str) -> None:
        """A task with ``total`` parts starts. It ends when the next one starts or when :meth:`end` is called.

        A total of 0 means that the number of parts is unknown.
        """

    def advance(self, done: int, **figures: Any) -> None:
        """``done`` parts of the current task are finished. ``figures`` has current values (loss=…)."""

    def end(self) -> None:
        """The current task is finished."""


class Silent:
    """An observer that ignores everything."""

    def note(self, text: str) -> None: ...

    def begin(self, title: str, total: int, unit: str) -> None: ...

    def advance(self, done: int, **figures: Any) -> None: ...

    def end(self) -> None: ...


def in_percent(observer: Observer) -> Callable[[str, float], None]:
    """A function that reports the share (0 to 1) of a work that is done; a new text begins a new bar."""
    current = ""

    def tell(text: str, share: float) -> None:
        nonlocal current
        if text != current:
            current = text
            observer.begin(text, 100, "%")
        observer.advance(round(100 * share))

    return tell
