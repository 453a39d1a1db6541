"""Keep the prompts of returning users, so that a new event costs the tokens of one item instead of those of
the whole history.

If a history ends with the items of the user's last prompt followed by new items, it continues that prompt.
The prompt grows beyond the window, up to twice its length; then it is rebuilt from the last ``window`` items.
So the model uses between one and two windows of such a user's history, although it was trained on at most
one.
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

GROWTH = 2  # the largest length of a prompt, in windows, before it is rebuilt


@dataclass(frozen=True)
class _Kept:
    """The kept prompt of a user."""

    items: np.ndarray  # int64, the item rows in the prompt
    tokens: np.ndarray  # int64, the token ids whose states are kept
    known: Known

    @property
    def size(self) -> int:
        return self.items.nbytes + self.tokens.nbytes + self.known.size


class PromptMemory:
    """The states of the prompts of one model's most recent users. It can be used by several threads.

    Args:
        size: the largest total size of the states in bytes.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.used = 0
        self.reused = self.computed = 0  # tokens, of all prompts so far
        self._kept: OrderedDict[Hashable, _Kept] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, user: Hashable) -> bool:
        return user in self._kept

    def of(self, user: Hashable) -> Returning:
        """The place for a user's prompt. The user may be new."""
        return Returning(self, user)

    def get(self, user: Hashable) -> _Kept | None:
        """The kept prompt of a user, who becomes the most recent one; None if nothing is kept."""
        with self._lock:
            if user in self._kept:
                self._kept.move_to_end(user)
            return self._kept.get(user)

    def put(self, user: Hashable, kept: _Kept) -> None:
        """Keep the prompt of a user, and remove those of the least recent users until all fit in ``size``."""
        with self._lock:
            if (old := self._kept.pop(user, None)) is not None:
                self.used -= old.size
            self._kept[user] = kept
            self.used += kept.size
            while self.used > self.size:
                self.used -= self._kept.popitem(last=False)[1].size

    def forget(self, user: Hashable) -> None:
        """Remove the prompt of a user."""
        with self._lock:
            if (old := self._kept.pop(user, None)) is not None:
                self.used -= old.size

    def emptied(self) -> PromptMemory:
        """A memory of the same size without prompts, which goes on counting tokens."""
        made = PromptMemory(self.size)
        with self._lock:
            made.reused, made.computed = self.reused, self.computed
        return made

    def count(self, prompt: Prompt) -> None:
        """Add the tokens of a prompt to ``reused`` and ``computed``."""
        with self._lock:
            self.reused += prompt.known.tokens
            self.computed += prompt.todo


@dataclass(frozen=True)
class Returning:
    """The place where one user's prompt is kept."""

    memory: PromptMemory
    user: Hashable

    def prompt(self, model: GenerativeModel, history: np.ndarray) -> Prompt:
        """The prompt of a history, which continues the user's last prompt if possible.

        Args:
            history: int item rows, oldest first.
        """
        history, window = np.asarray(history, dtype=np.int64), model.layout.window
        last = self.memory.get(self.user)
        shown = history[-window:] if last is None else _continued(last.items, history, window)
        tokens = model.layout.prompt(model.item_token_ids(shown))
        known = Known.nothing() if last is None else _common(last, tokens, model)
        kept = len(tokens) - len(model.layout.suffix)
        prompt = Prompt(tokens, len(shown), known, kept, partial(self._keep, shown, tokens[:kept]))
        self.memory.count(prompt)
        return prompt

    def _keep(self, items: np.ndarray, tokens: np.ndarray, known: Known) -> None:
        self.memory.put(self.user, _Kept(items, tokens, known))


def _continued(before: np.ndarray, history: np.ndarray, window: int) -> np.ndarray:
    """The end of a history that begins with the items of the previous prompt.

    If none has a length between one window and ``GROWTH`` windows, the last ``window`` items are used.
    """
    least, most = min(window, len(history)), min(GROWTH * window, len(history))
    for length in range(max(least, len(before)), most + 1):
        shown = history[-length:] if length else history
        if np.array_equal(shown[: len(before)], before):
            return shown
    return history[-window:]


def _common(last: _Kept, tokens: np.ndarray, model: GenerativeModel) -> Known:
    """The known states of the first tokens that both prompts share, as far as these are whole items, whose
    codes are embedded together (:meth:`GenerativeModel.embed`). The last token is always computed."""
    most = min(len(last.tokens), len(tokens) - 1)
    differ = np.flatnonzero(last.tokens[:most] != tokens[:most])
    common, layout, levels = int(differ[0]) if len(differ) else most, model.layout, model.semantic_ids.levels
    inside = (common - len(layout.prefix)) % (levels + len(layout.separator))  # tokens since an item began
    whole = common < len(layout.prefix) or inside >= levels
    return last.known.first(common if whole else common - inside)
