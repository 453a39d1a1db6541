"""Determine which tokens may attend to which others if several prompts share one row.

A row has a *root* (the fixed opening tokens of the layout, computed once), followed by *sequences*. A
sequence is a *trunk* with *branches*:

    root ── h1 h2 h3 h4 h5           trunk of sequence 1 (branch 0)
              │     └── b b b b      branch 2 of sequence 1, limit 3: sees the root, h1…h4 and itself
              └── b b b b            branch 1 of sequence 1, limit 1: sees the root, h1 h2 and itself
     └───── h1 h2 h3                 trunk of sequence 2: sees the root and itself, nothing of sequence 1
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

ROOT = 0  # the sequence number of the shared opening
PADDING = -1  # the sequence number of padding
TRUNK = 0  # the branch number of a trunk
TILE_COST = 16_000  # the fixed cost of a tile, in pairs of tokens


def visibility(sequence: Tensor, branch: Tensor, order: Tensor, limit: Tensor) -> Tensor:
    """The attention mask of packed rows.

    Query q sees key k if k is in the root and q is in a sequence; or if both are in the same sequence, and k
    is in the trunk with ``order_k <= limit_q`` or in the same branch as q with ``order_k <= order_q``.
    Padding sees padding, because attention over nothing would be NaN.

    Args:
        sequence: int (rows, length): 0 for the root, 1, 2, … for the sequences, -1 for padding.
        branch: int (rows, length): 0 for root, trunk and padding, 1, 2, … for the branches of a sequence.
        order: int (rows, length): the position within the root, trunk or branch.
        limit: int (rows, length): the last position of its trunk that a token sees. For a trunk token it is
            its own position, and for a branch directly at the root it is -1.

    Returns:
        bool (rows, 1, length, length), queries before keys, as :meth:`GenerativeModel.hidden` needs it.
    """
    return _sees((sequence, branch, order, limit), (sequence, branch, order, limit)).unsqueeze(1)


_Numbers = Sequence[Tensor]  # sequence, branch, order, limit


def _sees(queries: _Numbers, keys: _Numbers) -> Tensor:
    """The rule of :func:`visibility` for queries (n, q) and keys (n, k): bool (n, q, k)."""
    sequence_q, branch_q, order_q, limit_q = (x.unsqueeze(2) for x in queries)
    sequence_k, branch_k, order_k, _ = (x.unsqueeze(1) for x in keys)
    in_trunk = (branch_k == TRUNK) & (order_k <= limit_q)
    in_branch = (branch_k == branch_q) & (order_k <= order_q)
    in_root = (sequence_k == ROOT) & (sequence_q > ROOT)
    return in_root | ((sequence_q == sequence_k) & (in_trunk | in_branch))


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """An additive mask: 0 for visible keys, the most negative number for others."""
    zero = torch.zeros((), dtype=dtype, device=visible.device)
    return torch.where(visible, zero, torch.finfo(dtype).min)


@dataclass(frozen=True)
class Tile:
    """A batch of small attentions of similar size between tokens of the flattened rows.

    Attributes:
        queries: int64 (n, q), the tokens that are queries, padded with -1.
        keys: int64 (n, k), the tokens that are keys, padded with -1.
        visible: bool (n, q, k), which keys each query sees.
    """

    queries: Tensor
    keys: Tensor
    visible: Tensor


@dataclass(frozen=True)
class Tree:
    """The visibility in packed rows, as four int64 (rows, length) tensors; see :func:`visibility`.

    It has two forms: :meth:`dense`, a mask over all pairs of a row, and :attr:`tiles`, which leave out most
    of the pairs that are not visible.
    """

    sequence: Tensor
    branch: Tensor
    order: Tensor
    limit: Tensor

    def to(self, device: torch.device) -> Tree:
        return Tree(*(x.to(device, non_blocking=True) for x in self._numbers))

    @property
    def _numbers(self) -> _Numbers:
        return self.sequence, self.branch, self.order, self.limit

    def dense(self) -> Tensor:
        """The attention mask, bool (rows, 1, length, length)."""
        return visibility(*self._numbers)

    @cached_property
    def tiles(self) -> tuple[Tile, ...]:
        """The tiles. Every token, except padding, is a query of exactly one tile, with all keys that it sees.

        Roots, trunks and branches are runs of tokens. The keys of a run are the root, its part of the trunk
        and the run itself. Runs with similar lengths and numbers of keys, up to a factor of two, form a tile.
        If rows are so small that this saves nothing, each row is one tile.
        """
        rows, length = self.sequence.shape
        alike: dict[tuple[int, int], list[_Run]] = {}
        for row in range(rows):
            for run in _runs(row * length, *(x[row].cpu().numpy() for x in self._numbers)):
                size = len(run.own).bit_length(), len(run.before).bit_length()
                alike.setdefault(size, []).append(run)
        tiles = [self._tile(runs) for runs in alike.values()]
        cost = sum(tile.visible.numel() + TILE_COST for tile in tiles)
        if rows * (length**2 + TILE_COST) <= cost:
            whole = torch.arange(rows * length, device=self.sequence.device).view(rows, length)
            return (Tile(whole, whole, self.dense().squeeze(1)),)
        return tuple(tiles)

    def _tile(self, runs: list[_Run]) -> Tile:
        longest, most = max(len(run.own) for run in runs), max(len(run.before) for run in runs)
        queries = np.full((len(runs), longest), PADDING)
        keys = np.full((len(runs), most + longest), PADDING)
        for n, run in enumerate(runs):
            queries[n, : len(run.own)] = run.own
            keys[n, : len(run.before)] = run.before
            keys[n, most : most + len(run.own)] = run.own
        device = self.sequence.device
        q, k = torch.from_numpy(queries).to(device), torch.from_numpy(keys).to(device)
        of_q, of_k = (tuple(x.flatten()[index.clamp_min(0)] for x in self._numbers) for index in (q, k))
        return Tile(q, k, _sees(of_q, of_k) & (k >= 0).unsqueeze(1))


@dataclass(frozen=True)
class _Run:
    """The tokens of a root, trunk or branch, and those before it that it may see, in the flattened rows."""

    own: np.ndarray
    before: np.ndarray


def _runs(
    offset: int, sequence: np.ndarray, branch: np.ndarray, order: np.ndarray, limit: np.ndarray
) -> Iterator[_Run]:
    """The runs of one row, which begins at ``offset`` in the flattened rows. All arrays are (length,)."""
    ends = np.flatnonzero((np.diff(sequence) != 0) | (np.diff(branch) != 0)) + 1
    root = trunk = np.empty(0, dtype=np.int64)
    for start, stop in pairwise([0, *ends.tolist(), len(sequence)]):
        own = np.arange(start, stop) + offset
        if sequence[start] == ROOT:
            root = own
            yield _Run(own, trunk)
        elif sequence[start] != PADDING and branch[start] == TRUNK:
            trunk = own
            yield _Run(own, root)
        elif sequence[start] != PADDING:
            yield _Run(own, np.concatenate([root, trunk[: limit[start] + 1]]))
