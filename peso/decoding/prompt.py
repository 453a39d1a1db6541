"""One pass over each prompt, and the cache that all beams then share."""

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

# What one more pass costs beside its tokens, in tokens: reading all weights, or launching all kernels.
PASS_TOKENS = {"cpu": 64}
PASS_TOKENS_ELSEWHERE = 8192


@dataclass
class Place:
    """Where the next keys and values go: which users, from which column on."""

    users: slice
    column: int


class ReservedLayer(DynamicLayer):
    """Keys and values of one layer for a whole search, in memory reserved once: appending moves nothing.

    A plain full-attention layer whatever the backbone's configuration says: what may see what is the
    business of the mask alone. (Transformers' own grows by copying, or cuts at a sliding window.)
    """

    def __init__(self, place: Place, users: int, columns: int) -> None:
        super().__init__()
        self.place, self.users, self.columns = place, users, columns

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        # zeros, since columns that nobody may see are multiplied by 0 all the same
        self.keys, self.values = (
            x.new_zeros(self.users, x.shape[1], self.columns, x.shape[3]) for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write (users, heads, new, head width) each at the place; returns the columns so far as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        users, start, stop = self.place.users, self.place.column, self.place.column + key_states.shape[2]
        self.keys[users, :, start:stop] = key_states
        self.values[users, :, start:stop] = value_states
        return self.keys[users, :, :stop], self.values[users, :, :stop]

    def get_seq_length(self) -> int:
        return self.place.column


class SharedCache(Cache):
    """One block of columns per user: the prompt, then the beams of each level. Move, then call the model."""

    def __init__(self, users: int, columns: int) -> None:
        self.place = Place(slice(0, users), 0)
        super().__init__(layer_class_to_replicate=partial(ReservedLayer, self.place, users, columns))

    def move(self, users: slice, column: int) -> None:
        """What the model appends next belongs to these users and begins at this column."""
        self.place.users, self.place.column = users, column


@dataclass(frozen=True)
class Known:
    """The first tokens of a prompt, computed before.

    ``states``: keys and values per layer, (heads, tokens, head width) each; the tokens stand at the positions
    0, 1, …
    """

    tokens: int
    states: list[tuple[Tensor, Tensor]]

    @classmethod
    def nothing(cls) -> Known:
        return cls(0, [])

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(x.nbytes for states in self.states for x in states)

    def first(self, tokens: int) -> Known:
        """Of the first tokens alone."""
        if tokens == self.tokens:
            return self
        return Known(tokens, [(k[:, :tokens], v[:, :tokens]) for k, v in self.states] if tokens else [])

    @classmethod
    def opening(cls, model: GenerativeModel) -> Known:
        """The fixed words before every history."""
        # the last word is left to the prompts, so that each has a token even where nothing follows
        ids = torch.tensor([model.layout.prefix[:-1]], dtype=torch.int64, device=model.device)
        if not ids.shape[1]:
            return cls.nothing()
        cache = SharedCache(1, ids.shape[1])
        positions = torch.arange(ids.shape[1], device=model.device).unsqueeze(0)
        model.hidden(ids, _causal(0, ids.shape[1], model.device), positions, cache)
        return cls(ids.shape[1], [(layer.keys[0], layer.values[0]) for layer in cache.layers])


def _forget(known: Known) -> None:
    """For prompts that nobody comes back to."""


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what is known of it.

    tokens: int64 (n,) token ids, beginning with the layout's prefix.
    items: how many items of the history it shows.
    known: of its beginning, at most all but its last token.
    kept: of how many of its first tokens ``keep`` is given the states, once they are computed.
    """

    tokens: np.ndarray
    items: int
    known: Known
    kept: int = 0
    keep: Callable[[Known], None] = _forget

    @classmethod
    def cold(cls, model: GenerativeModel, history: np.ndarray) -> Prompt:
        """Of a history all of which is shown, with nothing known."""
        ids = model.item_token_ids(np.asarray(history, dtype=np.int64))
        return cls(model.layout.prompt(ids), len(history), Known.nothing())

    def after(self, opening: Known) -> Prompt:
        """The same, if nothing is known of it continued from the opening of all prompts."""
        return self if self.known.tokens else replace(self, known=opening)

    @property
    def todo(self) -> int:
        """Tokens that are to be computed."""
        return len(self.tokens) - self.known.tokens


@dataclass(frozen=True)
class Prompted:
    """Prompts after their pass.

    cache: keys and values of all prompt tokens, with room for the beams.
    visible: bool (users, columns of the cache so far), where each prompt's tokens are.
    lengths: int64 (users,) tokens of each prompt; the position of what comes next.
    last: (users, width) hidden state of each prompt's last token.
    """

    cache: SharedCache
    visible: Tensor
    lengths: Tensor
    last: Tensor

    def states(self, user: int, tokens: int) -> Known:
        """A copy of the states of a prompt's first tokens, to continue from another time."""
        columns = self.visible[user].nonzero().squeeze(1)[:tokens]
        states = [(layer.keys[user], layer.values[user]) for layer in self.cache.layers]
        return Known(tokens, [(k.index_select(1, columns), v.index_select(1, columns)) for k, v in states])


def run_prompts(model: GenerativeModel, prompts: Sequence[Prompt], room: int) -> Prompted:
    """Compute of every prompt once what is not known of it.

    Prompts of which about as much is to be computed go through the model together; all end up in one cache,
    what was known in its first columns, the rest behind the longest of that.

    Args:
        prompts: the one of which most is to be computed comes first.
        room: how many columns the cache must hold beside the prompts.
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
        # padding comes last and attention looks back, so that no prompt sees any
        mask = _causal(begin, begin + length, device)
        if int(starts[users].min()) < begin:  # some have less before
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
    """Write what is known of each prompt into its first columns."""
    for _, run in groupby(range(len(known)), key=lambda user: id(known[user])):
        users = list(run)
        states = known[users[0]].states
        cache.move(slice(users[0], users[-1] + 1), 0)
        for layer, (keys, values) in enumerate(states):
            cache.update(*(x.expand(len(users), -1, -1, -1) for x in (keys, values)), layer)


def alike(sizes: Sequence[int], pass_tokens: int) -> list[slice]:
    """Split sequences into runs that are padded together, at the least total cost.

    A run costs its padded tokens plus ``pass_tokens``; the cheapest split is found exactly, by the cost of
    the first n sequences for growing n.

    Args:
        sizes: tokens of each sequence, the longest first.
    """
    # sequences of one size stay together
    bounds = [i for i in range(1, len(sizes)) if sizes[i] != sizes[i - 1]] + [len(sizes)]
    cheapest = {0: (0, 0)}  # of the first n sequences: cost, where the last run begins
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
    """bool (1, 1, stop - start, stop): tokens start … stop - 1 see everything up to themselves."""
    place = torch.arange(stop, device=device)
    return (place <= place[start:].unsqueeze(1))[None, None]
