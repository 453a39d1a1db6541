"""One pass over each prompt, and the cache that all beams then share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
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
class Opening:
    """The fixed words before every history, computed once: their keys and values per layer, (1, heads, …)."""

    tokens: int
    states: list[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, model: GenerativeModel) -> Opening:
        # the last word is left to the prompts, so that each has a token even where nothing follows
        ids = torch.tensor([model.layout.prefix[:-1]], dtype=torch.int64, device=model.device)
        if not ids.shape[1]:
            return cls(0, [])
        cache = SharedCache(1, ids.shape[1])
        positions = torch.arange(ids.shape[1], device=model.device).unsqueeze(0)
        model.hidden(ids, _causal(0, ids.shape[1], model.device), positions, cache)
        return cls(ids.shape[1], [(layer.keys, layer.values) for layer in cache.layers])


@dataclass(frozen=True)
class Prompted:
    """Prompts after their pass.

    cache: keys and values of all prompt tokens, with room for the beams.
    visible: bool (users, longest prompt), False behind the end of a shorter one.
    lengths: int64 (users,) tokens of each prompt; the position of what comes next.
    last: (users, width) hidden state of each prompt's last token.
    """

    cache: SharedCache
    visible: Tensor
    lengths: Tensor
    last: Tensor


def run_prompts(
    model: GenerativeModel, prompts: Sequence[np.ndarray], opening: Opening, room: int
) -> Prompted:
    """Compute every prompt once.

    Prompts of like length go through the model together; all end up in one cache.

    Args:
        prompts: int64 (length,) token ids each, beginning with the layout's prefix, the longest first.
        opening: the shared first tokens; only what follows them is computed.
        room: how many columns the cache must hold beside the prompts.
    """
    device, count = model.device, len(prompts)
    sizes = [len(prompt) for prompt in prompts]
    cache = SharedCache(count, sizes[0] + room)
    for layer, states in enumerate(opening.states):
        cache.update(*(x.expand(count, -1, -1, -1) for x in states), layer)
    rest = [size - opening.tokens for size in sizes]
    last = []
    for users in alike(rest, PASS_TOKENS.get(device.type, PASS_TOKENS_ELSEWHERE)):
        start, stop = opening.tokens, sizes[users.start]
        ids = torch.zeros(users.stop - users.start, stop - start, dtype=torch.int64)
        for row, prompt in zip(ids, prompts[users], strict=True):
            row[: len(prompt) - start] = torch.from_numpy(prompt[start:])
        positions = torch.arange(start, stop, device=device).expand(len(ids), -1)
        cache.move(users, start)
        # padding comes last and attention looks back, so that no prompt sees any
        hidden = model.hidden(ids.to(device), _causal(start, stop, device), positions, cache)
        ends = torch.tensor(rest[users], device=device) - 1
        last.append(hidden[torch.arange(len(ids), device=device), ends])
    lengths = torch.tensor(sizes, device=device)
    visible = torch.arange(sizes[0], device=device) < lengths.unsqueeze(1)
    return Prompted(cache, visible, lengths, torch.cat(last))


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
