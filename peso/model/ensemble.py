"""Two models that are combined by averaging their logits.

After normalization, averaged logits are the product of the models' distributions, p ∝ p_1^w · p_2^(1-w). It
is high for tokens that are likely under both models.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from peso.adapters.lora import Past, put_adapter, read_adapter
from peso.model.generative import GenerativeModel
from peso.model.transitions import Transitions
from peso.model.visibility import Tree


class Ensemble(nn.Module):
    """Two models on one backbone with the interface of a :class:`GenerativeModel` for search and likelihood.

        logits = share · logits of the first + (1 - share) · logits of the second

    The logits of each model include scaling and capping if its family uses them. Hidden states and the layers
    of a cache are those of both models, concatenated. An ensemble is for inference only: it has no adapter
    and cannot be trained.

    Args:
        first, second: two models with the same token ids, layout, catalog and loss vocabulary.
        share: the weight of the first model.
    """

    def __init__(self, first: GenerativeModel, second: GenerativeModel, share: float) -> None:
        super().__init__()
        self.members: Any = nn.ModuleList([first, second])
        self.shares = (share, 1 - share)
        self.tokenizer = first.tokenizer
        self.vocabulary = first.vocabulary  # for ids and sizes only; each member has its own rows
        self.layout = first.layout
        self.semantic_ids = first.semantic_ids
        self.loss_vocabulary = first.loss_vocabulary
        self.item_token_ids = first.item_token_ids

    @property
    def causal_lm(self) -> Any:
        """The causal LM of the first model, for its configuration, which both share."""
        return self.members[0].causal_lm

    @property
    def sharded(self) -> bool:
        """Whether processes share the weights of the layers."""
        return bool(self.members[0].sharded)

    @property
    def device(self) -> torch.device:
        return self.vocabulary.input_rows.device

    @property
    def dtype(self) -> torch.dtype:
        return self.members[0].dtype

    def hidden(
        self, ids: Tensor, visible: Tensor | Tree | None, positions: Tensor, cache: Any = None
    ) -> Tensor:
        """The hidden states of both models, (rows, length, 2 · width); see :meth:`GenerativeModel.hidden`."""
        layers = self.causal_lm.config.get_text_config().num_hidden_layers
        caches = [None if cache is None else _Layers(cache, number * layers) for number in (0, 1)]
        states = [
            member.hidden(ids, visible, positions, own)
            for member, own in zip(self.members, caches, strict=True)
        ]
        return torch.cat(states, dim=-1)

    def word_logits(self, hidden: Tensor) -> Tensor:
        return self._average(hidden, lambda member, own: member.word_logits(own))

    def semantic_logits(self, hidden: Tensor, level: int | None = None) -> Tensor:
        return self._average(hidden, lambda member, own: member.semantic_logits(own, level))

    @property
    def has_item_head(self) -> bool:
        return self.members[0].has_item_head

    def item_share(self, lengths: Tensor) -> Tensor:
        return self.members[1].item_share(lengths)

    @property
    def transitions(self) -> Transitions | None:
        """The counts of the second model, which are the newer ones."""
        return self.members[1].transitions

    def item_log_probabilities(self, hidden: Tensor) -> Tensor:
        return self._average(hidden, lambda member, own: member.item_log_probabilities(own)).log_softmax(-1)

    def _average(self, hidden: Tensor, logits: Any) -> Tensor:
        first, second = (
            share * logits(member, own)
            for share, member, own in zip(self.shares, self.members, hidden.chunk(2, dim=-1), strict=True)
        )
        return first + second


class _Layers:
    """A view of a cache for a model whose layers begin at ``first``."""

    def __init__(self, cache: Any, first: int) -> None:
        self._cache = cache
        self._first = first

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
        return self._cache.update(keys, values, layer + self._first, *args, **kwargs)

    def get_seq_length(self, layer: int = 0) -> int:
        return self._cache.get_seq_length(layer + self._first)

    def get_mask_sizes(self, query_length: int, layer: int) -> Any:
        return self._cache.get_mask_sizes(query_length, layer + self._first)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def twin(model: GenerativeModel) -> GenerativeModel:
    """A copy of a model with its own adapter and vocabulary rows, which shares the backbone."""
    own = {
        id(p) for name, p in model.named_parameters() if ".lora_" in name or name.startswith("vocabulary.")
    }
    shared: list[Any] = [p for p in model.parameters() if id(p) not in own]
    shared += [model.tokenizer, model.layout, model.semantic_ids, model.transitions]
    # share the configuration, so that a change of the attention implementation applies to both
    shared += [module.config for module in model.modules() if hasattr(module, "config")]
    return deepcopy(model, {id(each): each for each in shared})


def stored(backbone: Any, vocabulary: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Copies of adapter and vocabulary on the CPU, by name, for the memory of a strategy."""
    rows = vocabulary.state_dict().items()
    adapter = {f"{prefix}{name}": tensor for name, tensor in read_adapter(backbone).state().items()}
    return adapter | {f"{prefix}vocabulary.{name}": t.detach().cpu().clone() for name, t in rows}


def read_stored(memory: Mapping[str, Tensor], prefix: str) -> tuple[Past, dict[str, Tensor]] | None:
    """Adapter and vocabulary that :func:`stored` gave; None if the memory has none with this prefix."""
    own = {name.removeprefix(prefix): t for name, t in memory.items() if name.startswith(prefix)}
    if (adapter := Past.of_state(own)) is None:
        return None
    rows = {n.removeprefix("vocabulary."): t for n, t in own.items() if n.startswith("vocabulary.")}
    return adapter, rows


def stored_twin(model: GenerativeModel, memory: Mapping[str, Tensor], prefix: str) -> GenerativeModel | None:
    """A :func:`twin` with the adapter and vocabulary that :func:`stored` gave; None if there are none."""
    if (found := read_stored(memory, prefix)) is None:
        return None
    adapter, rows = found
    other = twin(model)
    put_adapter(other.backbone, adapter)
    other.vocabulary.load_state_dict(rows)
    return other
