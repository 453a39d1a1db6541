"""One pass over the prompts of several users, and the cache that their beams then share.

Knows token ids, layouts and the model; knows nothing of the trie or of scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from peso.model.generative import GenerativeModel


class ReservedLayer(DynamicLayer):
    """Keys and values of one layer in memory reserved for the whole search: appending moves nothing.

    A plain full-attention layer whatever the backbone's configuration says: what may see what is the
    business of the mask alone. (Transformers' own grows by copying, or cuts at a sliding window.)
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        users, heads, _, _ = key_states.shape
        self.keys = key_states.new_empty(users, heads, self.capacity, key_states.shape[-1])
        self.values = value_states.new_empty(users, heads, self.capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append (users, heads, new, head width) each; returns everything so far as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[-2]
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self) -> int:
        return self.length


def reserved_cache(capacity: int) -> Cache:
    return Cache(layer_class_to_replicate=partial(ReservedLayer, capacity))


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
        cache = reserved_cache(ids.shape[1])
        positions = torch.arange(ids.shape[1], device=model.device).unsqueeze(0)
        model.hidden(ids, _causal(0, ids.shape[1], model.device), positions, cache)
        return cls(ids.shape[1], [(layer.keys, layer.values) for layer in cache.layers])


@dataclass(frozen=True)
class Prompted:
    """Prompts after their pass.

    cache: keys and values of all prompt tokens, right-padded to one length, with room for the beams.
    visible: bool (users, prompt length), False at padding.
    lengths: int64 (users,) tokens of each prompt; the position of what comes next.
    last: (users, width) hidden state of each prompt's last token.
    """

    cache: Cache
    visible: Tensor
    lengths: Tensor
    last: Tensor


def run_prompts(
    model: GenerativeModel, prompts: Sequence[np.ndarray], opening: Opening, room: int
) -> Prompted:
    """Compute the prompts of several users in one pass.

    Args:
        prompts: int64 (length,) token ids each, beginning with the layout's prefix.
        opening: the shared first tokens; only what follows them is computed.
        room: how many tokens the cache must hold beside the prompts.
    """
    device, start = model.device, opening.tokens
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    longest = int(lengths.max())
    ids = torch.zeros(len(prompts), longest - start, dtype=torch.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt) - start] = torch.from_numpy(prompt[start:])
    ids, lengths = ids.to(device), lengths.to(device)

    cache = reserved_cache(longest + room)
    for number, (keys, values) in enumerate(opening.states):
        cache.update(*(x.expand(len(prompts), -1, -1, -1) for x in (keys, values)), number)
    # padding comes last and attention looks back, so that no prompt sees any
    positions = torch.arange(start, longest, device=device).expand(len(prompts), -1)
    hidden = model.hidden(ids, _causal(start, longest, device), positions, cache)
    last = hidden[torch.arange(len(prompts), device=device), lengths - start - 1]
    visible = torch.arange(longest, device=device) < lengths.unsqueeze(1)
    return Prompted(cache, visible, lengths, last)


def _causal(start: int, stop: int, device: torch.device) -> Tensor:
    """bool (1, 1, stop - start, stop): tokens start … stop - 1 see everything up to themselves."""
    place = torch.arange(stop, device=device)
    return (place <= place[start:].unsqueeze(1))[None, None]
