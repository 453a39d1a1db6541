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
from contextlib import contextmanager, nullcontext
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
        if torch.compiler.is_compiling():  # fuses the sum with what comes next; in place it would copy y
            y = y + scale * (inner @ up.to(dtype).t())
        else:
            y.addmm_(inner, up.to(dtype).t(), alpha=scale)
        ctx.save_for_backward(weight, down, up, kept, mask, inner)
        ctx.scale, ctx.dropout = scale, dropout
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
                d_x += _drop_again(at_rank @ down.to(dtype), mask, ctx.dropout)
            d_x = d_x.view(*gradient.shape[:-1], -1)
        return d_x, None, None, d_down, d_up, None, None


def _drop(rows: Tensor, p: float, scale: float) -> tuple[Tensor, Tensor | None, float]:
    """What dropout keeps of the rows, the mask, and the scale that is left to be multiplied with."""
    if p == 0:
        return rows, None, scale
    if _bits(rows):
        mask = bit_mask(rows, p)
        return masked(rows, mask), mask, scale / (1 - p)
    kept, mask = torch.native_dropout(rows, p, True)  # one pass, rescaled in it
    return kept, mask, scale


def _drop_again(rows: Tensor, mask: Tensor, p: float) -> Tensor:
    """The same selection, for a gradient that holds the scale that :func:`_drop` returned."""
    if mask.dtype == torch.int16:
        return masked(rows, mask)
    return torch.ops.aten.native_dropout_backward(rows, mask, 1 / (1 - p))


def _bits(rows: Tensor) -> bool:
    """Whether a mask is drawn bit by bit (:mod:`peso.model.dropout`): that pays on a CPU."""
    return rows.device.type == "cpu"


class FusedLinear(Linear):
    """PEFT's LoRA layer over ``nn.Linear``, computed at once while one adapter is active."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = _only_adapter(self)
        if name is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        base, dropout, device = self.base_layer, self.lora_dropout[name], x.device.type
        mixed = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if mixed else base.weight.dtype
        with torch.autocast(device, enabled=False) if mixed else nullcontext():
            return _LowRankLinear.apply(
                x.to(dtype),
                base.weight.to(dtype),
                None if base.bias is None else base.bias.to(dtype),
                self.lora_A[name].weight,
                self.lora_B[name].weight,
                self.scaling[name],
                getattr(dropout, "p", 0.0) if self.training else 0.0,
            )


def _only_adapter(layer: Linear) -> str | None:
    """The one adapter that acts in a layer, where it is plain LoRA beside a frozen weight; else None."""
    active = layer.active_adapters
    plain = len(active) == 1 and active[0] in layer.lora_A and not layer.lora_variant
    if not plain or layer.disable_adapters or layer.merged or layer.lora_bias[active[0]]:
        return None
    return None if layer.base_layer.weight.requires_grad else active[0]


@contextmanager
def fused_lora(model: nn.Module) -> Iterator[None]:
    """Within the context PEFT's LoRA layers over ``nn.Linear`` in ``model`` are :class:`FusedLinear`."""
    fused: list[Any] = [
        layer for layer in model.modules() if type(layer) is Linear and type(layer.base_layer) is nn.Linear
    ]
    try:
        # the class, not an attribute: what is compiled for one layer then serves all
        for layer in fused:
            layer.__class__ = FusedLinear
        yield
    finally:
        for layer in fused:
            layer.__class__ = Linear
