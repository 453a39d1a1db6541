"""Prompt layouts: how a history becomes token ids, and where the next item is predicted.

A layout is a value, not a class tree: four runs of fixed token ids around the items. Prompt of a history
h_1 … h_n:  prefix h_1 separator h_2 … separator h_n suffix;  then the target's tokens and ``end``.
``stream`` has no separator, suffix or end, so one causal pass predicts every next item; any layout with a
suffix predicts each target on a branch of its own.
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
    """What a layout needs of a Transformers tokenizer."""

    bos_token_id: int | None
    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def add_tokens(self, new_tokens: list[AddedToken]) -> int: ...

    def convert_tokens_to_ids(self, tokens: str) -> int: ...


@dataclass(frozen=True)
class PromptLayout:
    """Fixed token ids around the items (``window``: most items of a history that a prompt shows)."""

    name: str
    prefix: tuple[int, ...]
    separator: tuple[int, ...]
    suffix: tuple[int, ...]
    end: tuple[int, ...]
    window: int

    @property
    def branches(self) -> bool:
        """Whether a target needs tokens of its own after the history (else it sits in the trunk)."""
        return bool(self.suffix or self.end)

    def prompt(self, items: np.ndarray) -> np.ndarray:
        """Token ids of the prompt of one history.

        items: int64 (n, levels) token ids of the last n ≤ window items. Returns int64 (length,).
        """
        pieces: list[tuple[int, ...] | np.ndarray] = [self.prefix]
        for i, item in enumerate(items):
            pieces.extend((self.separator, item) if i else (item,))
        return np.concatenate([np.asarray(p, dtype=np.int64) for p in [*pieces, self.suffix]])


def make_layout(name: str, tokenizer: Tokenizer, window: int) -> PromptLayout:
    """The layout `stream` or `instruct` in the ids of a tokenizer.

    ``stream`` opens with one token (the tokenizer's begin, else its end token): causal attention needs a
    first position from which the first item of an empty history is predicted.
    Raises BackboneError where the tokenizer has no begin or end token.
    """
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if end is None:
        raise BackboneError("the tokenizer has no end token (eos_token); prompts need one")
    if name == "stream":
        return PromptLayout(name, (end if start is None else start,), (), (), (), window)
    before, between, after = _pieces(tokenizer)
    # a begin token only where the tokenizer itself puts one (Llama 3 does, SmolLM2 does not)
    with_specials = tokenizer.encode(INSTRUCTION[0], add_special_tokens=True)
    opening = (start,) if start is not None and with_specials[:1] == [start] else ()
    return PromptLayout(name, opening + before, between, after, (end,), window)


def _pieces(tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """The ids of the three texts of the instruction as they are around added tokens.

    Encoded one by one they may differ: some tokenizers (Mistral, Phi-3) put a word mark before the first
    piece of a text only. So the whole instruction is encoded, with an added token in the place of the items.
    """
    marked, mark = deepcopy(tokenizer), "<|item|>"
    marked.add_tokens([AddedToken(mark, normalized=False, special=False)])
    number = marked.convert_tokens_to_ids(mark)
    ids = marked.encode(mark.join(INSTRUCTION), add_special_tokens=False)
    return [tuple(run) for is_mark, run in groupby(ids, lambda i: i == number) if not is_mark]
