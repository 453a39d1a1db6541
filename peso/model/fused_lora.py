"""LoRA's layer as one operation with a gradient of its own, for training.

Knows PEFT's LoRA layers and their arithmetic; knows nothing of losses, stages or strategies. PEFT composes a
layer of ten operations, and autograd keeps and rescales what lies between them:

    y = W x + b + B A drop(x) · alpha / rank

Here the low-rank part is added within the product that computes it, the factors of dropout and alpha / rank
are worked into that product, and the gradient keeps drop(x), its mask and the rank values between A and B.
Same numbers, but for the order in which they are rounded; same random draws as :mod:`peso.model.dropout`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn

from peso.model.dropout import bit_mask, masked


class _LowRankLinear(torch.autograd.Function):
    """x (…, in) → W x + b + scale · B A drop(x) (…, out), in the precision of ``weight``.

    ``down`` A (rank, in) and ``up`` B (out, rank) get gradients in their own precision, W and b none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
        dropout: float,
    ) -> Tensor:
        dtype = weight.dtype
        rows = x.reshape(-1, x.shape[-1])
        kept, mask, scale = _drop(rows, dropout, scale)
        inner = kept @ down.to(dtype).t()  # (rows, rank)
        y = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
        y.addmm_(inner, up.to(dtype).t(), alpha=scale)
        ctx.save_for_backward(weight, down, up, kept, mask, inner)
        ctx.scale = scale
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, down, up, kept, mask, inner = ctx.saved_tensors
        dtype = weight.dtype
        of_x, _, _, of_down, of_up, _, _ = ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1])
        at_rank = (rows @ up.to(dtype)).mul_(ctx.scale)  # (rows, rank)
        d_x = d_down = d_up = None
        if of_up:
            d_up = (inner.t() @ rows).mul_(ctx.scale).to(up.dtype).t()  # faster than rows.t() @ inner
        if of_down:
            d_down = (at_rank.t() @ kept).to(down.dtype)
        if of_x:
            d_x = rows @ weight
            if mask is None:
                d_x.addmm_(at_rank, down.to(dtype))
            else:
                d_x += _apply(at_rank @ down.to(dtype), mask)
            d_x = d_x.view(*gradient.shape[:-1], -1)
        return d_x, None, None, d_down, d_up, None, None


def _drop(rows: Tensor, p: float, scale: float) -> tuple[Tensor, Tensor | None, float]:
    """What dropout keeps of the rows, not rescaled; the mask; and the scale that makes up for both."""
    if p == 0:
        return rows, None, scale
    if _bits(rows):
        mask = bit_mask(rows, p)
        return masked(rows, mask), mask, scale / (1 - p)
    kept = torch.rand(rows.shape, device=rows.device) >= p
    return rows * kept, kept, scale / (1 - p)


def _bits(rows: Tensor) -> bool:
    """Whether a mask is drawn bit by bit (:mod:`peso.model.dropout`): that pays on a CPU."""
    return rows.device.type == "cpu"


def _apply(rows: Tensor, mask: Tensor) -> Tensor:
    return masked(rows, mask) if mask.dtype == torch.int8 else rows * mask


def _forward(layer: Linear, peft_forward: Any, name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args or kwargs or layer.disable_adapters or layer.merged or layer.active_adapters != [name]:
        return peft_forward(x, *args, **kwargs)
    base, device = layer.base_layer, x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else base.weight.dtype
    p = layer.lora_dropout[name].p if layer.training and hasattr(layer.lora_dropout[name], "p") else 0.0
    with torch.autocast(device, enabled=False):
        return _LowRankLinear.apply(
            x.to(dtype),
            base.weight.to(dtype),
            None if base.bias is None else base.bias.to(dtype),
            layer.lora_A[name].weight,
            layer.lora_B[name].weight,
            float(layer.scaling[name]),
            float(p),
        )


@contextmanager
def fused_lora(model: nn.Module) -> Iterator[None]:
    """Within the context the LoRA layers of ``model`` compute as one operation; afterwards as PEFT does.

    A layer that is not plain LoRA over ``nn.Linear`` with a frozen weight stays PEFT's, and so does every
    layer while another adapter, or more than one, is active in it.
    """
    fused = [(layer, name) for layer in model.modules() if (name := _only_adapter(layer)) is not None]
    try:
        for layer, name in fused:
            layer.forward = partial(_forward, layer, layer.forward, name)
        yield
    finally:
        for layer, _ in fused:
            del layer.forward


def _only_adapter(layer: Any) -> str | None:
    """The name of the one adapter that a plain LoRA layer has active, else None."""
    plain = (
        type(layer) is Linear
        and type(layer.base_layer) is nn.Linear
        and not layer.base_layer.weight.requires_grad
        and not layer.lora_variant
        and not any(layer.lora_bias.values())
        and len(layer.active_adapters) == 1
    )
    name = layer.active_adapters[0] if plain else None
    return name if name in getattr(layer, "lora_A", {}) else None
