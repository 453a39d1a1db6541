"""Attention along a :class:`~peso.model.visibility.Tree`, whose cost depends only on the visible tokens.

With a dense mask, every token of a row is scored against every other, and most scores are discarded. Here
each tile of the tree is a batch of small attentions, so that users, or branches of one trunk, do not add cost
to each other. Query heads that share a key head are stacked as its queries. The backward pass is written by
hand and keeps the attention weights: on a CPU in bfloat16 it is several times faster than PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from peso.model.visibility import Tree, additive

NAME = "peso_tree"
REFUSES = "peso_refuses_trees"  # an attribute of a causal LM for which trees give another result


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    peso_tree: TreePlaces | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled-dot-product attention along a tree; without a tree, Transformers' ``sdpa``.

    Args:
        query: (rows, heads, length, width).
        key, value: (rows, key heads, length, width).
        attention_mask: an additive mask, used only if there is no tree.

    Returns:
        The output (rows, length, heads, width), and None instead of weights.
    """
    special = dropout or any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "s_aux"))
    if peso_tree is None or special:
        if peso_tree is not None:
            attention_mask = additive(peso_tree.tree.dense(), query.dtype)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    places = peso_tree.of_heads(key.shape[1], query.shape[1] // key.shape[1], query.dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output: Tensor = _TreeAttention.apply(query, key, value, places, scale)
    return output, None


AttentionInterface.register(NAME, tree_attention)


def serves(causal_lm: Any) -> bool:
    """Whether a backbone's attention can be computed along trees.

    It must be plain scaled-dot-product attention through Transformers' interface, on a CPU, and not compiled.
    With gradient checkpointing, :func:`along_trees` must be active already.
    """
    if causal_lm.device.type != "cpu" or not getattr(causal_lm, "_supports_attention_backend", False):
        return False
    decoder = causal_lm.get_decoder()
    # this is called in every step, so check only the layers, not the thousands of modules inside them
    parts = [decoder, *getattr(decoder, "layers", ())]
    again = causal_lm.training and any(getattr(part, "gradient_checkpointing", False) for part in parts)
    return (
        decoder.config._attn_implementation in ({NAME} if again else {NAME, "sdpa"})
        and all(part._compiled_call_impl is None for part in parts)
        and not getattr(causal_lm, REFUSES, False)
    )


@contextmanager
def along_trees(causal_lm: Any) -> Iterator[None]:
    """A context in which a backbone with ``sdpa`` attention computes it along a tree if it gets one.

    With gradient checkpointing, the context must include the backward pass.
    """
    config = causal_lm.get_decoder().config
    before = config._attn_implementation
    if before == "sdpa":
        config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


class TreePlaces:
    """A tree, with the indices of the tokens of its tiles, which are computed once for all layers."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self._known: dict[tuple[int, int, torch.dtype], _Places] = {}

    def of_heads(self, key_heads: int, group: int, dtype: torch.dtype) -> _Places:
        shape = key_heads, group, dtype
        if shape not in self._known:
            self._known[shape] = _Places.of(self.tree, *shape)
        return self._known[shape]


@dataclass(frozen=True)
class _TilePlaces:
    """The indices of a tile for a given number of heads.

    Tensors are flattened to (tokens of all rows · key heads, …), so that one index selects tokens and sorts
    them by head.

    Attributes:
        queries: int64 (key heads · n · q,), the rows of the queries.
        keys: int64 (key heads · n · k,), the rows of the keys.
        mask: an additive mask, (key heads · n, q · group, k).
        filled_up: int64, the positions of queries that are only padding.
        of_queries: the slice of this tile in the outputs of all tiles.
        of_keys: the slice of this tile in the keys of all tiles.
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor
    filled_up: Tensor
    of_queries: slice
    of_keys: slice

    def take_queries(self, x: Tensor) -> Tensor:
        """(tokens · key heads, group · width) → (key heads · n, q · group, width)."""
        return self.shape_queries(x.index_select(0, self.queries))

    def take_gradient(self, x: Tensor) -> Tensor:
        """The same as :meth:`take_queries`, but 0 for padding."""
        return self.shape_queries(x.index_select(0, self.queries).index_fill_(0, self.filled_up, 0))

    def take_keys(self, x: Tensor) -> Tensor:
        """(tokens · key heads, width) → (key heads · n, k, width)."""
        return self.shape_keys(x.index_select(0, self.keys))

    def shape_queries(self, x: Tensor) -> Tensor:
        return x.view(*self.mask.shape[:2], -1)

    def shape_keys(self, x: Tensor) -> Tensor:
        return x.view(len(self.mask), self.mask.shape[2], -1)


@dataclass(frozen=True)
class _Places:
    """The indices of all tiles for a given number of heads.

    Attributes:
        tiles: the tiles.
        queries: the total number of queries.
        keys: int64, the keys of all tiles.
        answers: int64 (tokens · key heads,), the position of each token's output in the outputs of all tiles.
        unanswered: int64, the tokens that are not a query of any tile.
    """

    tiles: tuple[_TilePlaces, ...]
    queries: int
    keys: Tensor
    answers: Tensor
    unanswered: Tensor

    @classmethod
    def of(cls, tree: Tree, key_heads: int, group: int, dtype: torch.dtype) -> _Places:
        device, rows = tree.sequence.device, tree.sequence.numel() * key_heads
        heads = torch.arange(key_heads, device=device).view(-1, 1, 1)
        answers = torch.full((rows,), -1, device=device)
        tiles: list[_TilePlaces] = []
        filled, keyed = 0, 0
        for tile in tree.tiles:
            queries, keys = (
                torch.where(x < 0, -1, x * key_heads + heads).flatten() for x in (tile.queries, tile.keys)
            )
            real = queries >= 0
            answers[queries[real]] = torch.arange(filled, filled + len(queries), device=device)[real]
            mask = additive(tile.visible, dtype).repeat_interleave(group, 1).repeat(key_heads, 1, 1)
            tiles.append(
                _TilePlaces(
                    queries.clamp_min(0),
                    keys.clamp_min(0),
                    mask,
                    (~real).nonzero().squeeze(1),
                    slice(filled, filled + len(queries)),
                    slice(keyed, keyed + len(keys)),
                )
            )
            filled, keyed = filled + len(queries), keyed + len(keys)
        return cls(
            tuple(tiles),
            filled,
            torch.cat([tile.keys for tile in tiles]),
            answers.clamp_min(0),
            (answers < 0).nonzero().squeeze(1),
        )

    def by_token(self, x: Tensor) -> Tensor:
        """The output of each token: outputs of all tiles → (tokens · key heads, …), 0 for padding."""
        return x.index_select(0, self.answers).index_fill_(0, self.unanswered, 0)

    def added_up(self, x: Tensor) -> Tensor:
        """Sum gradients by token: gradients of the keys of all tiles → (tokens · key heads, width)."""
        # the gradient of a lookup, a plain loop over the rows; a root gets gradients from many tiles
        total: Tensor = torch.ops.aten.embedding_dense_backward(
            x.float(), self.keys, len(self.answers), -1, False
        )
        return total.to(x.dtype)


class _TreeAttention(torch.autograd.Function):
    """Attention along a tree: queries, keys and values (rows, heads, length, width) → (rows, length, heads,
    width)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, places: _Places, scale: float) -> Tensor:
        rows, heads, length, _ = query.shape
        q, k, v = (_flat(x, key.shape[1]) for x in (query, key, value))
        output = v.new_empty(places.queries, heads // key.shape[1] * v.shape[1])
        kept = []
        for tile in places.tiles:
            scores = torch.baddbmm(tile.mask, tile.take_queries(q), tile.take_keys(k).mT, alpha=scale)
            weights = scores.softmax(-1)
            torch.bmm(weights, tile.take_keys(v), out=tile.shape_queries(output[tile.of_queries]))
            kept.append(weights)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.places, ctx.scale = places, scale
        return places.by_token(output).view(rows, length, heads, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        places: _Places = ctx.places
        q, k, v = (_flat(x, key.shape[1]) for x in (query, key, value))
        above = gradient.reshape(len(q), -1)
        of_q = q.new_empty(places.queries, q.shape[1])
        of_k, of_v = (x.new_empty(len(places.keys), x.shape[1]) for x in (k, v))
        for tile, weights in zip(places.tiles, kept, strict=True):
            g = tile.take_gradient(above)
            torch.bmm(weights.mT, g, out=tile.shape_keys(of_v[tile.of_keys]))
            of_weights = torch.bmm(g, tile.take_keys(v).mT)
            scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            torch.bmm(scores, tile.take_keys(k), out=tile.shape_queries(of_q[tile.of_queries]))
            torch.bmm(scores.mT, tile.take_queries(q), out=tile.shape_keys(of_k[tile.of_keys]))
        by_head = (
            places.by_token(of_q).mul_(ctx.scale),
            places.added_up(of_k).mul_(ctx.scale),
            places.added_up(of_v),
        )
        rows, _, length, _ = query.shape
        return (
            *(
                x.view(rows, length, of.shape[1], -1).transpose(1, 2)
                for x, of in zip(by_head, (query, key, value), strict=True)
            ),
            None,
            None,
        )


def _flat(x: Tensor, key_heads: int) -> Tensor:
    """(rows, heads, length, width) → (tokens of all rows · key heads, heads per key head · width)."""
    return x.transpose(1, 2).reshape(-1, x.shape[1] // key_heads * x.shape[-1])
