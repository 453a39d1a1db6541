"""Prompt layouts: how a history becomes token ids, and where the next item is predicted.

A layout is four sequences of fixed token ids around the items. The prompt of a history h_1 … h_n is
``prefix h_1 separator h_2 … separator h_n suffix``, followed by the target's tokens and ``end``. The layout
``stream`` has no separator, suffix or end, so one causal pass predicts every next item. A layout with a
suffix predicts each target on a separate branch.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import numpy as np
from tokenizers import AddedToken

from peso.errors import BackboneError

# The instruction of the paper's release (LC-Rec / LETTER, sequential recommendation).
INSTRUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\nThe user has interacted with items ",
    ", ",
    " in chronological order. Can you predict the next possible item that the user may expect?"
    "\n\n### Response:",
)


class Tokenizer(Protocol):
    """The part of a Transformers tokenizer that a layout needs."""

    bos_token_id: int | None
    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def add_tokens(self, new_tokens: list[AddedToken]) -> int: ...

    def convert_tokens_to_ids(self, tokens: str) -> int: ...


@dataclass(frozen=True)
class PromptLayout:
    """Fixed token ids around the items. ``window`` is the largest number of items in a prompt."""

    name: str
    prefix: tuple[int, ...]
    separator: tuple[int, ...]
    suffix: tuple[int, ...]
    end: tuple[int, ...]
    window: int

    @property
    def branches(self) -> bool:
        """Whether a target needs separate tokens after the history; otherwise it is part of the trunk."""
        return bool(self.suffix or self.end)

    def prompt(self, items: np.ndarray) -> np.ndarray:
        """The token ids of the prompt of one history.

        Args:
            items: int64 (n, levels), the token ids of the last n ≤ window items.

        Returns: int64 (length,).
        """
        pieces: list[tuple[int, ...] | np.ndarray] = [self.prefix]
        for i, item in enumerate(items):
            pieces.extend((self.separator, item) if i else (item,))
        return np.concatenate([np.asarray(p, dtype=np.int64) for p in [*pieces, self.suffix]])


def make_layout(name: str, tokenizer: Tokenizer, window: int) -> PromptLayout:
    """The layout ``stream`` or ``instruct`` with the ids of a tokenizer.

    ``stream`` begins with one token (the tokenizer's begin token, or its end token if it has none), because
    causal attention needs a first position to predict the first item of an empty history.

    Raises:
        BackboneError: the tokenizer has no end token.
    """
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if end is None:
        raise BackboneError("the tokenizer has no end token (eos_token); prompts need one")
    if name == "stream":
        return PromptLayout(name, (end if start is None else start,), (), (), (), window)
    before, between, after = _pieces(tokenizer)
    # use a begin token only if the tokenizer adds one (Llama 3 does, SmolLM2 does not)
    with_specials = tokenizer.encode(INSTRUCTION[0], add_special_tokens=True)
    opening = (start,) if start is not None and with_specials[:1] == [start] else ()
    return PromptLayout(name, opening + before, between, after, (end,), window)


def _pieces(tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """The ids of the three texts of the instruction as they are next to added tokens.

    If they were encoded separately, they could differ: some tokenizers (Mistral, Phi-3) put a word mark only
    before the first piece of a text. So the whole instruction is encoded, with an added token for the items.
    """
    marked, mark = deepcopy(tokenizer), "<|item|>"
    marked.add_tokens([AddedToken(mark, normalized=False, special=False)])
    number = marked.convert_tokens_to_ids(mark)
    ids = marked.encode(mark.join(INSTRUCTION), add_special_tokens=False)
    return [tuple(run) for is_mark, run in groupby(ids, lambda i: i == number) if not is_mark]
