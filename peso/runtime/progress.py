"""How long work tells of itself, without knowing who listens."""

from __future__ import annotations

from typing import Any, Protocol


class Observer(Protocol):
    """Receives what a run does. The command line draws bars from it; a library user may ignore it."""

    def note(self, text: str) -> None:
        """A plain sentence: what was done or found."""

    def begin(self, title: str, total: int, unit: str) -> None:
        """A piece of work with `total` parts starts; it ends when the next starts or at :meth:`end`.

        A total of 0 is unknown: such work advances by time alone.
        """

    def advance(self, done: int, **figures: Any) -> None:
        """`done` parts of the current work are finished; figures (loss=…, rate=…) belong to this moment."""

    def end(self) -> None:
        """The current work is finished."""


class Silent:
    """Listens to nothing."""

    def note(self, text: str) -> None: ...

    def begin(self, title: str, total: int, unit: str) -> None: ...

    def advance(self, done: int, **figures: Any) -> None: ...

    def end(self) -> None: ...
