"""Attention along a :class:`~peso.model.visibility.Tree` that skips the blocks of a row which nobody sees.

Knows who sees whom and Transformers' way to PyTorch's FlexAttention; knows nothing of items or losses. That
kernel is compiled, so it serves where a backbone's layers are compiled, on a GPU, while it learns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.modeling_utils import AttentionInterface

from peso.model.visibility import ROOT, TRUNK, Tree

NAME = "peso_blocks"


def blocks_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BlockMask,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Transformers' ``flex_attention``, in the precision of autocast as its ``sdpa`` has it.

    Args:
        query: (rows, heads, length, width).
        key, value: (rows, key heads, length, width).

    Returns:
        (rows, length, heads, width), and what Transformers' function returns beside it.
    """
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    result: tuple[Tensor, Tensor | None] = flex_attention_forward(
        module, query, key, value, attention_mask, scaling, **kwargs
    )
    return result


AttentionInterface.register(NAME, blocks_attention)


def block_mask(tree: Tree) -> BlockMask:
    """The rule of :func:`~peso.model.visibility.visibility`, for rows of tokens and any number of heads."""
    # half as wide as numbers of tokens need to be: the kernel reads them for every pair that it cannot skip
    sequence, branch, order, limit = (x.to(torch.int32) for x in tree.numbers)

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_trunk = (branch[row, key] == TRUNK) & (order[row, key] <= limit[row, query])
        in_branch = (branch[row, key] == branch[row, query]) & (order[row, key] <= order[row, query])
        in_root = (sequence[row, key] == ROOT) & (sequence[row, query] > ROOT)
        return in_root | ((sequence[row, query] == sequence[row, key]) & (in_trunk | in_branch))

    rows, length = sequence.shape
    return create_block_mask(sees, rows, None, length, length, device=str(sequence.device))


def suits_blocks(causal_lm: Any) -> bool:
    """Whether a backbone can attend in blocks: on a GPU, while it learns, its layers compiled, without
    dropout in its attention."""
    if causal_lm.device.type != "cuda" or not causal_lm.training:
        return False
    decoder = causal_lm.get_decoder()
    layers = list(getattr(decoder, "layers", ()))
    return (
        bool(getattr(causal_lm, "_supports_flex_attn", False))
        and not getattr(decoder.config, "attention_dropout", 0)
        and bool(layers)
        and all(layer._compiled_call_impl is not None for layer in layers)
    )


def in_blocks(causal_lm: Any) -> bool:
    """Whether a backbone attends in blocks where it is given a tree: where that suits it, under the name of
    it if layers are computed again for the gradient (see :func:`~peso.model.tree_attention.attending`)."""
    if not suits_blocks(causal_lm):
        return False
    decoder = causal_lm.get_decoder()
    again = any(getattr(part, "gradient_checkpointing", False) for part in (decoder, *decoder.layers))
    return decoder.config._attn_implementation in ({NAME} if again else {NAME, "sdpa"})
