"""Dropout that draws sixteen values from one random number.

Knows tensors and the modules of a model; knows nothing of adapters or training. On a CPU most of the time of
``nn.Dropout`` goes into one random number per value, a fifth of a LoRA training step in bfloat16; a sixteenth
of the bits decides just as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_STEPS = 2**16  # values that 16 random bits take
_WORD = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of a float → whole numbers of that size


class BitDropout(nn.Module):
    """``nn.Dropout`` with the probability rounded to a multiple of 2⁻¹⁶.

    Each value is zero with probability p and else divided by 1 - p. Draws from torch's default generator.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = round(p * _STEPS) / _STEPS

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        return _Masked.apply(x, bit_mask(x, self.p), 1 / (1 - self.p))


def bit_mask(x: Tensor, p: float) -> Tensor:
    """int16 of the shape of ``x``: 0 with probability p (a multiple of 2⁻¹⁶, at least one), else -1."""
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)  # uniform on -2¹⁵ … 2¹⁵ - 1
    stop = _STEPS // 2 - max(1, round(p * _STEPS))  # a share 1 - p lies below
    return bits.clamp_(stop - 1, stop).sub_(stop)  # several times faster than a comparison


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """x where the mask is -1, 0 where it is 0: one bitwise operation on whole words, several times faster on
    a CPU than a selection by booleans."""
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
    """Within the context every ``nn.Dropout`` of the model is a :class:`BitDropout`; afterwards as before."""
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
