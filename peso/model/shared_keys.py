"""Grouped-query attention without a copy of the keys for each query head.

If several query heads share one key head and there is a mask, Transformers repeats keys and values once per
query head, in every layer of every pass. For a few beams after a long prompt, the copies take longer than the
attention itself. Here the queries of a group are stacked as queries of their key head, which gives the same
product.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

NAME = "peso_shared_keys"


def shared_keys_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled-dot-product attention with the same result as Transformers' ``sdpa``, which handles all special
    cases.

    Args:
        query: (rows, heads, queries, width).
        key, value: (rows, key heads, keys, width).
        attention_mask: an additive mask, (rows or 1, 1, queries, keys).

    Returns:
        The output (rows, queries, heads, width), and None instead of weights.
    """
    rows, heads, queries, width = query.shape
    group = heads // key.shape[1]
    special = kwargs.get("position_bias") is not None or kwargs.get("softcap") is not None
    if group == 1 or special or attention_mask is None or attention_mask.shape[1] != 1:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    stacked = query.reshape(rows, key.shape[1], group * queries, width)
    mask = attention_mask.repeat(1, 1, group, 1)
    output = F.scaled_dot_product_attention(stacked, key, value, mask, dropout, scale=scaling)
    return output.reshape(rows, heads, queries, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, shared_keys_attention)


@contextmanager
def shared_keys(causal_lm: Any) -> Iterator[None]:
    """A context in which a backbone with ``sdpa`` attention uses :func:`shared_keys_attention`. Other
    backbones do not change."""
    config = causal_lm.get_decoder().config
    before = config._attn_implementation
    if before == "sdpa":
        config._attn_implementation = NAME
    try:
        yield
    finally:
        if before == "sdpa":
            config._attn_implementation = before
