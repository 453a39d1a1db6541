"""A LoRA layer as one operation with its own backward pass, for training.

PEFT computes a layer with ten operations, and autograd stores and rescales their intermediate results:

    y = W x + b + B A drop(x) · alpha / rank [+ D C x · scale, of a second, frozen adapter]

Here the low-rank parts are added by the product that computes them, which includes the factors of dropout and
alpha / rank. Only drop(x), its mask and the values between A and B are stored for the backward pass. With the
same random numbers, the results are those of PEFT up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import functional as F

_STEPS = 2**16  # the number of values of 16 random bits
_WORD = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of a float → an integer of the same size


class BitDropout(nn.Module):
    """``nn.Dropout`` with the probability rounded to a multiple of 2⁻¹⁶.

    Each value is zero with probability p, otherwise it is divided by 1 - p. Results depend only on the state
    of PyTorch's default generator. When compiled, it is ``nn.Dropout``, which fuses random numbers with the
    operations that use them.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = round(p * _STEPS) / _STEPS

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if torch.compiler.is_compiling():
            return F.dropout(x, self.p)
        return _Masked.apply(x, bit_mask(x, self.p), 1 / (1 - self.p))


def bit_mask(x: Tensor, p: float) -> Tensor:
    """A random mask, int16 with the shape of ``x``: 0 with probability p (rounded to a positive multiple of
    2⁻¹⁶), else -1."""
    seed = int(torch.randint(2**63 - 1, ()))
    words = np.random.Generator(np.random.SFC64(seed)).integers(0, 2**64, -(-x.numel() // 4), dtype=np.uint64)
    bits = torch.from_numpy(words.view(np.int16)[: x.numel()]).view(x.shape)  # uniform on -2¹⁵ … 2¹⁵ - 1
    stop = _STEPS // 2 - max(1, round(p * _STEPS))  # a share 1 - p is below it
    return bits.clamp_(stop - 1, stop).sub_(stop)  # several times faster than a comparison


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """x where the mask is -1, and 0 where it is 0.

    This is one bitwise operation on whole words, several times faster on a CPU than a boolean selection.
    """
    word = _WORD[x.element_size()]
    return x.contiguous().view(word).bitwise_and(mask.to(word)).view(x.dtype)


class _Masked(torch.autograd.Function):
    """:func:`masked` of x · scale, and of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.scale = scale
        return masked(x * scale, mask)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return masked(gradient * ctx.scale, mask), None, None


@contextmanager
def fast_dropout(model: nn.Module) -> Iterator[None]:
    """A context in which every ``nn.Dropout`` of the model is replaced by a :class:`BitDropout`."""
    replaced = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Dropout and 0 < child.p < 1
    ]
    try:
        for parent, name, child in replaced:
            setattr(parent, name, BitDropout(child.p).train(child.training))
        yield
    finally:
        for parent, name, child in replaced:
            setattr(parent, name, child.train(parent.training))


class _LowRankLinear(torch.autograd.Function):
    """x (…, in) → W x + b + scale · B A drop(x) [+ scale_beside · D C x] (…, out), in the precision of W.

    A is ``down`` (rank, in), B is ``up`` (out, rank), C is ``down_beside`` (rank, in) and D is ``up_beside``
    (out, rank). A, B and C get gradients in their own precision; W, b and D get none.
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
        down_beside: Tensor | None = None,
        up_beside: Tensor | None = None,
        scale_beside: float = 1.0,
    ) -> Tensor:
        dtype = weight.dtype
        rows = x.reshape(-1, x.shape[-1])
        kept, mask, scale = _drop(rows, dropout, scale)
        inner = kept @ down.to(dtype).t()  # (rows, rank)
        y = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
        y = _plus(y, inner, up, scale)
        seen = None
        if down_beside is not None and up_beside is not None:
            y = _plus(y, rows @ down_beside.to(dtype).t(), up_beside, scale_beside)
            seen = rows if ctx.needs_input_grad[7] else None
        ctx.save_for_backward(weight, down, up, kept, mask, inner, down_beside, up_beside, seen)
        ctx.scale, ctx.dropout, ctx.scale_beside = scale, dropout, scale_beside
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, down, up, kept, mask, inner, down_beside, up_beside, seen = ctx.saved_tensors
        dtype = weight.dtype
        of_x, _, _, of_down, of_up, *_ = ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1])
        at_rank = (rows @ up.to(dtype)).mul_(ctx.scale)  # (rows, rank)
        d_x = d_down = d_up = d_beside = None
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
        if up_beside is not None:
            at_beside = (rows @ up_beside.to(dtype)).mul_(ctx.scale_beside)
            if d_x is not None:
                d_x.addmm_(at_beside, down_beside.to(dtype))
            if seen is not None:
                d_beside = (at_beside.t() @ seen).to(down_beside.dtype)
        if d_x is not None:
            d_x = d_x.view(*gradient.shape[:-1], -1)
        return d_x, None, None, d_down, d_up, None, None, d_beside, None, None


def _plus(y: Tensor, inner: Tensor, up: Tensor, scale: float) -> Tensor:
    """y + scale · inner upᵀ, in place unless it is compiled."""
    if torch.compiler.is_compiling():  # the compiler fuses the sum; an in-place sum would copy y
        return y + scale * (inner @ up.to(y.dtype).t())
    return y.addmm_(inner, up.to(y.dtype).t(), alpha=scale)


def _drop(rows: Tensor, p: float, scale: float) -> tuple[Tensor, Tensor | None, float]:
    """Apply dropout to rows. Returns the rows, the mask, and the scale that remains to be applied."""
    if p == 0:
        return rows, None, scale
    if _bits(rows):
        mask = bit_mask(rows, p)
        return masked(rows, mask), mask, scale / (1 - p)
    kept, mask = torch.native_dropout(rows, p, True)  # one pass, rescaled in it
    return kept, mask, scale


def _drop_again(rows: Tensor, mask: Tensor, p: float) -> Tensor:
    """Apply the same mask to a gradient that already includes the scale that :func:`_drop` returned."""
    if mask.dtype == torch.int16:
        return masked(rows, mask)
    return torch.ops.aten.native_dropout_backward(rows, mask, 1 / (1 - p))


def _bits(rows: Tensor) -> bool:
    """Whether to draw masks from random bits, which is faster on a CPU if nothing is compiled."""
    return rows.device.type == "cpu" and not torch.compiler.is_compiling()


class FusedLinear(Linear):
    """PEFT's LoRA layer over ``nn.Linear``, computed in one operation. At most two adapters may be active, of
    which the second must be frozen and without dropout; otherwise PEFT computes the layer."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = _adapters(self)
        if not names or args or kwargs:
            return super().forward(x, *args, **kwargs)
        name, *beside = names
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
                *(x for other in beside for x in (self.lora_A[other].weight, self.lora_B[other].weight)),
                *(self.scaling[other] for other in beside),
            )


def _adapters(layer: Linear) -> list[str]:
    """The active adapters of a layer if they can be computed in one operation, otherwise an empty list."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    plain = not (layer.lora_variant or layer.disable_adapters or layer.merged)
    if not plain or len(names) not in (1, 2) or layer.base_layer.weight.requires_grad:
        return []
    if any(layer.lora_bias[name] for name in names) or not all(_frozen_beside(layer, x) for x in names[1:]):
        return []
    return names


def _frozen_beside(layer: Linear, name: str) -> bool:
    """Whether an adapter can be the second one: it has no dropout, and its B is frozen. Its A may be trained,
    because it contains the magnitudes of past adapters."""
    return isinstance(layer.lora_dropout[name], nn.Identity) and not layer.lora_B[name].weight.requires_grad


@contextmanager
def fused_lora(model: nn.Module) -> Iterator[None]:
    """A context in which PEFT's LoRA layers over ``nn.Linear`` in a model are :class:`FusedLinear` layers."""
    fused: list[Any] = [
        layer for layer in model.modules() if type(layer) is Linear and type(layer.base_layer) is nn.Linear
    ]
    try:
        # change the class, not an attribute, so that code compiled for one layer serves all layers
        for layer in fused:
            layer.__class__ = FusedLinear
        yield
    finally:
        for layer in fused:
            layer.__class__ = Linear
