"""Compute each prompt once, in a cache that all beams share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from peso.model.generative import GenerativeModel

# The fixed cost of a pass in tokens, for reading all weights or launching all kernels.
PASS_TOKENS = {"cpu": 64}
PASS_TOKENS_ELSEWHERE = 8192


@dataclass
class Place:
    """The users and the first column to which the next keys and values are written."""

    users: slice
    column: int


class ReservedLayer(DynamicLayer):
    """Keys and values of one layer for a whole search, in memory that is allocated once.

    This is a plain full-attention layer regardless of the backbone's configuration, because only the mask
    determines what is visible. Transformers' own layers copy when they grow, or cut at a sliding window.
    """

    def __init__(self, place: Place, users: int, columns: int) -> None:
        super().__init__()
        self.place, self.users, self.columns = place, users, columns

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        # zeros, because columns that are not visible are still multiplied by 0
        self.keys, self.values = (
            x.new_zeros(self.users, x.shape[1], self.columns, x.shape[3]) for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values (users, heads, new, head width) to the place, and return views of all columns
        so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        users, start, stop = self.place.users, self.place.column, self.place.column + key_states.shape[2]
        self.keys[users, :, start:stop] = key_states
        self.values[users, :, start:stop] = value_states
        return self.keys[users, :, :stop], self.values[users, :, :stop]

    def get_seq_length(self) -> int:
        return self.place.column


class SharedCache(Cache):
    """A cache with one block of columns per user: the prompt, then the beams of each level.

    Call :meth:`move` before each call of the model.
    """

    def __init__(self, users: int, columns: int) -> None:
        self.place = Place(slice(0, users), 0)
        super().__init__(layer_class_to_replicate=partial(ReservedLayer, self.place, users, columns))

    def move(self, users: slice, column: int) -> None:
        """Set the users and the first column to which the model appends next."""
        self.place.users, self.place.column = users, column


@dataclass(frozen=True)
class Known:
    """The states of the first tokens of a prompt, which have already been computed.

    ``states`` has the keys and values of each layer, (heads, tokens, head width). The tokens have the
    positions 0, 1, …
    """

    tokens: int
    states: list[tuple[Tensor, Tensor]]

    @classmethod
    def nothing(cls) -> Known:
        """No states."""
        return cls(0, [])

    @property
    def size(self) -> int:
        """The size of the states in bytes."""
        return sum(x.nbytes for states in self.states for x in states)

    def first(self, tokens: int) -> Known:
        """The states of only the first tokens."""
        if tokens == self.tokens:
            return self
        return Known(tokens, [(k[:, :tokens], v[:, :tokens]) for k, v in self.states] if tokens else [])

    @classmethod
    def opening(cls, model: GenerativeModel) -> Known:
        """The states of the fixed words before every history."""
        # the last word belongs to the prompts, so that a prompt has a token even for an empty history
        ids = torch.tensor([model.layout.prefix[:-1]], dtype=torch.int64, device=model.device)
        if not ids.shape[1]:
            return cls.nothing()
        cache = SharedCache(1, ids.shape[1])
        positions = torch.arange(ids.shape[1], device=model.device).unsqueeze(0)
        model.hidden(ids, _causal(0, ids.shape[1], model.device), positions, cache)
        return cls(ids.shape[1], [(layer.keys[0], layer.values[0]) for layer in cache.layers])


def _forget(known: Known) -> None:
    """Do nothing, for prompts whose states are not needed again."""


@dataclass(frozen=True)
class Prompt:
    """A prompt, with the states of its first tokens if they are known.

    Attributes:
        tokens: int64 (n,), the token ids, beginning with the layout's prefix.
        items: the number of items of the history in the prompt.
        known: the states of its first tokens, at most of all but the last token.
        kept: the number of first tokens whose states are passed to ``keep`` after they are computed.
        keep: a function that gets these states.
    """

    tokens: np.ndarray
    items: int
    known: Known
    kept: int = 0
    keep: Callable[[Known], None] = _forget

    @classmethod
    def cold(cls, model: GenerativeModel, history: np.ndarray) -> Prompt:
        """The prompt of a whole history, without known states."""
        ids = model.item_token_ids(np.asarray(history, dtype=np.int64))
        return cls(model.layout.prompt(ids), len(history), Known.nothing())

    def after(self, opening: Known) -> Prompt:
        """The same prompt; if none of its states are known, those of the opening of all prompts are used."""
        return self if self.known.tokens else replace(self, known=opening)

    @property
    def todo(self) -> int:
        """The number of tokens whose states must be computed."""
        return len(self.tokens) - self.known.tokens


@dataclass(frozen=True)
class Prompted:
    """Prompts that have been computed.

    Attributes:
        cache: the keys and values of all prompt tokens, with room for the beams.
        visible: bool (users, columns of the cache so far), where each prompt's tokens are.
        lengths: int64 (users,), the number of tokens of each prompt, which is the position of the next token.
        last: (users, width), the hidden state of each prompt's last token.
    """

    cache: SharedCache
    visible: Tensor
    lengths: Tensor
    last: Tensor

    def states(self, user: int, tokens: int) -> Known:
        """A copy of the states of a prompt's first tokens, from which later prompts can continue."""
        columns = self.visible[user].nonzero().squeeze(1)[:tokens]
        states = [(layer.keys[user], layer.values[user]) for layer in self.cache.layers]
        return Known(tokens, [(k.index_select(1, columns), v.index_select(1, columns)) for k, v in states])


def run_prompts(model: GenerativeModel, prompts: Sequence[Prompt], room: int) -> Prompted:
    """Compute the states of prompts that are not known yet.

    Prompts with a similar number of tokens to compute are batched. All states are stored in one cache: the
    known ones in its first columns, and the others after the longest of these.

    Args:
        prompts: the prompts, in descending order of the number of tokens to compute.
        room: the number of columns that the cache needs in addition to the prompts.
    """
    device, count = model.device, len(prompts)
    starts = torch.tensor([prompt.known.tokens for prompt in prompts], device=device)  # (users,)
    rest = [prompt.todo for prompt in prompts]
    begin = int(starts.max())
    cache = SharedCache(count, begin + rest[0] + room)
    _put(cache, [prompt.known for prompt in prompts])
    last = []
    for users in alike(rest, PASS_TOKENS.get(device.type, PASS_TOKENS_ELSEWHERE)):
        length = rest[users.start]
        ids = torch.zeros(users.stop - users.start, length, dtype=torch.int64)
        for row, prompt in zip(ids, prompts[users], strict=True):
            row[: prompt.todo] = torch.from_numpy(prompt.tokens[prompt.known.tokens :])
        positions = starts[users].unsqueeze(1) + torch.arange(length, device=device)
        cache.move(users, begin)
        # padding comes last and attention is causal, so no prompt sees padding
        mask = _causal(begin, begin + length, device)
        if int(starts[users].min()) < begin:  # some prompts have fewer known tokens
            column = torch.arange(begin + length, device=device)
            gap = (column >= starts[users].unsqueeze(1)) & (column < begin)  # (users, columns)
            mask = mask & ~gap[:, None, None]
        hidden = model.hidden(ids.to(device), mask, positions, cache)
        ends = torch.tensor(rest[users], device=device) - 1
        last.append(hidden[torch.arange(len(ids), device=device), ends])
    new = torch.tensor(rest, device=device)
    column = torch.arange(begin + rest[0], device=device)
    visible = (column < starts.unsqueeze(1)) | ((column >= begin) & (column - begin < new.unsqueeze(1)))
    return Prompted(cache, visible, starts + new, torch.cat(last))


def _put(cache: SharedCache, known: Sequence[Known]) -> None:
    """Write the known states of each prompt into its first columns."""
    for _, run in groupby(range(len(known)), key=lambda user: id(known[user])):
        users = list(run)
        states = known[users[0]].states
        cache.move(slice(users[0], users[-1] + 1), 0)
        for layer, (keys, values) in enumerate(states):
            cache.update(*(x.expand(len(users), -1, -1, -1) for x in (keys, values)), layer)


def alike(sizes: Sequence[int], pass_tokens: int) -> list[slice]:
    """Split sequences into runs that are padded together, with the smallest total cost.

    A run costs its padded tokens plus ``pass_tokens``. The cheapest split is found exactly by dynamic
    programming over the first n sequences.

    Args:
        sizes: the number of tokens of each sequence, the longest first.
        pass_tokens: the fixed cost of a run, in tokens.
    """
    # sequences of the same size stay together
    bounds = [i for i in range(1, len(sizes)) if sizes[i] != sizes[i - 1]] + [len(sizes)]
    cheapest = {0: (0, 0)}  # for the first n sequences: the cost, and where the last run begins
    for stop in bounds:
        cheapest[stop] = min(
            (cost + (stop - begin) * sizes[begin] + pass_tokens, begin)
            for begin, (cost, _) in cheapest.items()
        )
    runs, stop = [], len(sizes)
    while stop:
        begin = cheapest[stop][1]
        runs.append(slice(begin, stop))
        stop = begin
    return runs[::-1]


def _causal(start: int, stop: int, device: torch.device) -> Tensor:
    """bool (1, 1, stop - start, stop): a causal mask for the tokens start … stop - 1."""
    place = torch.arange(stop, device=device)
    return (place <= place[start:].unsqueeze(1))[None, None]
