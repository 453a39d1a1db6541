"""Prompts of users who return: a new event costs the tokens of one item, not those of the whole history.

A history that ends with the items of the last prompt and new ones behind them continues that prompt, which so
grows beyond the window, up to twice its length; then it is made again from the last ``window`` items. So the
model reads between one and two windows of such a user's history, where it was trained on at most one.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from functools import partial

import numpy as np

from peso.decoding.prompt import Known, Prompt
from peso.model.generative import GenerativeModel

GROWTH = 2  # windows that a prompt may have before it is made again


@dataclass(frozen=True)
class _Kept:
    items: np.ndarray  # int64 rows that the prompt showed
    tokens: np.ndarray  # int64 ids of which the states are kept
    known: Known

    @property
    def size(self) -> int:
        return self.items.nbytes + self.tokens.nbytes + self.known.size


class PromptMemory:
    """The states of the prompts of one model's users, the most recently asked ones. For several threads.

    Args:
        size: bytes that they may take.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.used = 0
        self.reused = self.computed = 0  # tokens, of all prompts so far
        self._kept: OrderedDict[Hashable, _Kept] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def of(self, user: Hashable) -> Returning:
        """The place of a user, who need not be known yet."""
        return Returning(self, user)

    def get(self, user: Hashable) -> _Kept | None:
        with self._lock:
            if user in self._kept:
                self._kept.move_to_end(user)
            return self._kept.get(user)

    def put(self, user: Hashable, kept: _Kept) -> None:
        with self._lock:
            if (old := self._kept.pop(user, None)) is not None:
                self.used -= old.size
            self._kept[user] = kept
            self.used += kept.size
            while self.used > self.size:
                self.used -= self._kept.popitem(last=False)[1].size

    def count(self, prompt: Prompt) -> None:
        with self._lock:
            self.reused += prompt.known.tokens
            self.computed += prompt.todo


@dataclass(frozen=True)
class Returning:
    """Where one user's prompt is kept."""

    memory: PromptMemory
    user: Hashable

    def prompt(self, model: GenerativeModel, history: np.ndarray) -> Prompt:
        """The prompt of a history, continued from the last one where it can be.

        Args:
            history: int item rows, oldest first.
        """
        history, window = np.asarray(history, dtype=np.int64), model.layout.window
        last = self.memory.get(self.user)
        shown = history[-window:] if last is None else _continued(last.items, history, window)
        tokens = model.layout.prompt(model.item_token_ids(shown))
        known = Known.nothing() if last is None else _common(last, tokens)
        kept = len(tokens) - len(model.layout.suffix)
        prompt = Prompt(tokens, len(shown), known, kept, partial(self._keep, shown, tokens[:kept]))
        self.memory.count(prompt)
        return prompt

    def _keep(self, items: np.ndarray, tokens: np.ndarray, known: Known) -> None:
        self.memory.put(self.user, _Kept(items, tokens, known))


def _continued(before: np.ndarray, history: np.ndarray, window: int) -> np.ndarray:
    """The end of a history that begins with the items of the prompt before; where there is none that is as
    long as the window and at most ``GROWTH`` windows, the last ``window`` items."""
    least, most = min(window, len(history)), min(GROWTH * window, len(history))
    for length in range(max(least, len(before)), most + 1):
        shown = history[-length:] if length else history
        if np.array_equal(shown[: len(before)], before):
            return shown
    return history[-window:]


def _common(last: _Kept, tokens: np.ndarray) -> Known:
    """What is known of the tokens that both begin with; the last of them is always computed."""
    most = min(len(last.tokens), len(tokens) - 1)
    differ = np.flatnonzero(last.tokens[:most] != tokens[:most])
    return last.known.first(int(differ[0]) if len(differ) else most)
