"""Log-probabilities of targets under a softmax, without a copy of the scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_VALUES = 2**20  # scores that are normalized at once; they fit in a cache


def normalized(temperature: float, targets: Tensor, *parts: Tensor) -> Tensor:
    """float32 (n,): the log-probability of each target under the softmax over the columns of all parts.

    It computes a few rows at a time, so that the gradient is the only tensor as large as the scores that is
    written; the usual sequence of operations writes seven.

    Args:
        temperature: the scores are divided by it.
        targets: int64 (n,), the column of each target in the concatenated parts.
        parts: scores, each float32 (n, columns). A score of -inf has the probability 0 and no gradient.
    """
    return _Normalized.apply(temperature, targets, *parts)


class _Normalized(torch.autograd.Function):
    """The function of :func:`normalized`."""

    @staticmethod
    def forward(ctx: Any, temperature: float, targets: Tensor, *parts: Tensor) -> Tensor:
        totals, picked = [], torch.zeros(len(targets), device=targets.device)
        for part, (column, inside) in zip(parts, _columns(targets, parts), strict=True):
            divided = (x if temperature == 1 else x / temperature for x in part.split(_rows(part)))
            totals += [torch.cat([x.logsumexp(-1) for x in divided])]
            picked += part.gather(-1, column).squeeze(-1).masked_fill_(~inside, 0)
        total = torch.stack(totals).logsumexp(0)  # (n,)
        ctx.save_for_backward(targets, total, *parts)
        ctx.temperature = temperature
        return picked / temperature - total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the scores, g/T · (1 at the target - softmax)."""
        targets, total, *parts = ctx.saved_tensors
        above = (gradient / ctx.temperature).unsqueeze(-1)  # (n, 1)
        results: list[Tensor | None] = []
        for part, (column, inside) in zip(parts, _columns(targets, parts), strict=True):
            result = torch.empty_like(part)
            rows = _rows(part)
            for x, y, norm, g in zip(
                part.split(rows),
                result.split(rows),
                total.unsqueeze(-1).split(rows),
                above.split(rows),
                strict=True,
            ):
                if ctx.temperature == 1:  # the same, in one operation less
                    torch.sub(x, norm, out=y)
                else:
                    torch.div(x, ctx.temperature, out=y).sub_(norm)
                y.exp_().mul_(-g)
            result.scatter_add_(-1, column, above.masked_fill(~inside.unsqueeze(-1), 0))
            results.append(result)
        return None, None, *results


def _columns(targets: Tensor, parts: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """For each part, the column of each target in it, int64 (n, 1), and whether the target is in it, bool
    (n,). If it is not, the column is arbitrary."""
    starts = accumulate((part.shape[-1] for part in parts), initial=0)
    for start, part in zip(starts, parts, strict=False):
        column = targets - start
        inside = (column >= 0) & (column < part.shape[-1])
        yield column.clamp(0, part.shape[-1] - 1).unsqueeze(-1), inside


def _rows(part: Tensor) -> int:
    """The number of rows to normalize at once. On a GPU there is no benefit in few rows."""
    return max(1, CHUNK_VALUES // part.shape[-1]) if part.device.type == "cpu" else max(1, len(part))
