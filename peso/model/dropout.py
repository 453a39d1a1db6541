"""Dropout that decides four values by one random number of 64 bits.

Knows tensors and the modules of a model; knows nothing of adapters or training. On a CPU most of the time of
``nn.Dropout`` goes into one random number per value, a fifth of a LoRA training step in bfloat16; sixteen
bits decide just as well. They are NumPy's SFC64, twice as fast as torch's generator, which gives the seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

_STEPS = 2**16  # values that 16 random bits take
_WORD = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of a float → whole numbers of that size


class BitDropout(nn.Module):
    """``nn.Dropout`` with the probability rounded to a multiple of 2⁻¹⁶.

    Each value is zero with probability p and else divided by 1 - p. The same state of torch's default
    generator draws the same. Compiled it is ``nn.Dropout``: that fuses its numbers with what uses them.
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
    """int16 of the shape of ``x``: 0 with probability p (a multiple of 2⁻¹⁶, at least one), else -1."""
    seed = int(torch.randint(2**63 - 1, ()))
    words = np.random.Generator(np.random.SFC64(seed)).integers(0, 2**64, -(-x.numel() // 4), dtype=np.uint64)
    bits = torch.from_numpy(words.view(np.int16)[: x.numel()]).view(x.shape)  # uniform on -2¹⁵ … 2¹⁵ - 1
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
