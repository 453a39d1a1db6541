"""Answers that are kept in memory: a repeated request gets the same answer again, and the request that a user
usually sends can be answered before it arrives."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from cachetools import LRUCache

from peso.runtime.files import digest
from peso.serving.messages import Request
from peso.serving.stock import Stock

RECENT = 1_800.0  # seconds after a user's last request in which answers are prepared
USUAL = 1 / 4  # share of the memory for requests of users; the rest is for answers
Key = tuple[str | None, str, Stock]
How = Literal["prepared", "used", "repeated"]


def key_of(request: Request, history: Sequence[str], leave_out: bool, stock: Stock) -> Key:
    """Everything that determines the items and scores of an answer from one snapshot.

    Args:
        history: the items of the history that the snapshot knows.
        leave_out: whether items of the history are left out.
        stock: the filters for all requests.
    """
    return request.user, digest(request.k, leave_out, request.allow, request.deny, list(history)), stock


@dataclass(frozen=True)
class _Kept:
    ranked: list[tuple[str, float]]
    prepared: bool  # before the user has asked; false once the answer was given

    @property
    def size(self) -> int:
        """Bytes, estimated; the strings belong to the catalog."""
        return 500 + 100 * len(self.ranked)


@dataclass(frozen=True)
class _Usual:
    request: Request
    time: float

    @property
    def size(self) -> int:
        """Bytes, estimated."""
        listed = [*(self.request.allow or ()), *(self.request.deny or ())]
        return 1_000 + sum(60 + len(item) for item in listed)


class RememberedAnswers:
    """The most recently used answers from one snapshot, and the last request of each user.

    Only one thread may use it, except for ``in``.

    Args:
        size: bytes of memory, estimated.
        count: called with ``prepared`` for every answer that is prepared, with ``used`` when a prepared
            answer is given, and with ``repeated`` when an answer is given again.
    """

    def __init__(self, size: int, count: Callable[[How], None] = lambda how: None) -> None:
        self._answers: LRUCache[Key, _Kept] = LRUCache(size * (1 - USUAL), lambda kept: kept.size)
        self._usual: LRUCache[str, _Usual] = LRUCache(size * USUAL, lambda usual: usual.size)
        self._count = count

    def __contains__(self, user: str) -> bool:
        """Whether a request of the user is remembered."""
        return user in self._usual

    def find(self, key: Key, ahead: bool) -> list[tuple[str, float]] | None:
        """The items and scores of an answer; None if it is not kept.

        Args:
            key: see :func:`key_of`.
            ahead: whether the answer is looked for before the user has asked.
        """
        kept = self._answers.get(key)
        if kept is None or ahead:
            return None if kept is None else kept.ranked
        self._count("used" if kept.prepared else "repeated")
        if kept.prepared:
            self._answers[key] = _Kept(kept.ranked, prepared=False)
        return kept.ranked

    def keep(self, key: Key, ranked: list[tuple[str, float]], ahead: bool) -> None:
        """Keep the items and scores of an answer. One that is larger than the memory is not kept."""
        kept = _Kept(ranked, prepared=ahead)
        if kept.size <= self._answers.maxsize:
            self._answers[key] = kept
        if ahead:
            self._count("prepared")

    def asked(self, request: Request) -> None:
        """Remember a user's request as the usual one."""
        assert request.user is not None
        usual = _Usual(request, time.monotonic())
        if usual.size <= self._usual.maxsize:
            self._usual[request.user] = usual
        else:
            self.forget(request.user)

    def usual(self, user: str) -> Request | None:
        """The user's last request; None if there was none in the last half hour."""
        usual = self._usual.get(user)
        return None if usual is None or time.monotonic() - usual.time > RECENT else usual.request

    def forget(self, user: str) -> None:
        """Remove the request of a user."""
        self._usual.pop(user, None)
