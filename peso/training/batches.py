"""Token batches in which a user's targets share one forward pass over their history.

:func:`cut` splits sequences into chunks, :func:`plan_epoch` groups chunks into batches, :func:`lay_out` turns
a chunk into tokens, and :func:`pack` arranges the tokens of a batch in rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peso.events.histories import TargetSequence
from peso.model.layout import PromptLayout
from peso.model.visibility import PADDING, ROOT, TRUNK, Tree

LOOK_AHEAD = 64  # at least this number of chunks are considered for the free places of a batch


@dataclass(frozen=True)
class Chunk:
    """Items ``start:stop`` of the sequence with the number ``sequence``. Items ``first:stop`` are targets."""

    sequence: int
    start: int
    first: int
    stop: int

    @property
    def targets(self) -> int:
        return self.stop - self.first


def cut(sequences: Sequence[TargetSequence], window: int, most: int) -> list[Chunk]:
    """Split sequences into chunks that contain every target once.

    A target with at most ``window`` items before it sees all of them, as in a separate prompt. A later target
    sees between ``window`` and 2·``window`` - 1 items, because a chunk starts ``window`` items before its
    first target and ends before a history exceeds this limit.

    Args:
        window: the window of the prompt layout, in items.
        most: the largest number of targets of a chunk.
    """
    chunks = []
    for number, sequence in enumerate(sequences):
        first = sequence.first_target
        while first < len(sequence.items):
            start = max(0, first - window)
            stop = min(len(sequence.items), start + 2 * window, first + most)
            chunks.append(Chunk(number, start, first, stop))
            first = stop
    return chunks


def plan_epoch(targets: np.ndarray, batch_size: int, seed: Sequence[int]) -> list[np.ndarray]:
    """Group the chunks of an epoch into batches of ``batch_size`` targets.

    The chunks are shuffled. A batch consists of the first remaining chunk, and of the subset of the following
    max(``LOOK_AHEAD``, ``batch_size``) chunks whose targets fill the free places best (among equal subsets,
    the one with the earliest chunks). So a batch never has more than ``batch_size`` targets, unless a single
    chunk has more, and all but the last few batches of an epoch have exactly this number.

    Args:
        targets: int (chunks,), the number of targets of each chunk.
        batch_size: the number of targets of a batch.
        seed: integers that determine the shuffle, for example (seed, stage, epoch).

    Returns:
        The indices of the chunks of each batch. Every chunk occurs once.
    """
    order = np.random.default_rng(list(seed)).permutation(len(targets))
    if batch_size >= targets.sum():
        return [order]
    upcoming = iter(order.tolist())
    size = targets.tolist()
    batches: list[np.ndarray] = []
    pool: list[int] = []
    ahead = max(LOOK_AHEAD, batch_size)
    while pool := [*pool, *islice(upcoming, ahead + 1 - len(pool))]:
        batch = [pool.pop(0)]
        free = max(0, batch_size - size[batch[0]])
        # bit s of sums[-1 - i] is set if a subset of pool[i:] has s targets in total, for s <= free
        sums = [1]
        for chunk in reversed(pool):
            sums.append((sums[-1] | sums[-1] << size[chunk]) & ((2 << free) - 1))
        missing = sums.pop().bit_length() - 1
        left = []
        for chunk in pool:
            rest = sums.pop()
            if size[chunk] <= missing and rest >> (missing - size[chunk]) & 1:
                batch.append(chunk)
                missing -= size[chunk]
            else:
                left.append(chunk)
        pool = left
        batches.append(np.array(batch))
    return batches


@dataclass(frozen=True)
class Piece:
    """The tokens of one chunk, without the root that it shares with others.

    Attributes:
        ids: int64 (length,), the token ids.
        positions: int64 (length,), their positions.
        branch, order, limit: int64 (length,), see :class:`~peso.model.visibility.Tree`.
        targets: int64 (target tokens,), the ids of the target tokens.
        states: int64 (target tokens,), the index of the hidden state that predicts each target token, counted
            from the first token of the root.
        items: int64 (targets,), the item row of each target, for models with an item head. It may be empty.
    """

    ids: np.ndarray
    positions: np.ndarray
    branch: np.ndarray
    order: np.ndarray
    limit: np.ndarray
    targets: np.ndarray
    states: np.ndarray
    items: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


def lay_out(
    layout: PromptLayout, items: np.ndarray, first: int, *, predict_end: bool, rows: np.ndarray | None = None
) -> Piece:
    """The tokens of a history and its targets, arranged so that each target is predicted as in a separate
    prompt.

    If the layout has no separator, suffix and end, the trunk is enough, because the state before each target
    token predicts it. Otherwise there is one branch per target, which consists of the suffix, the target
    tokens and the end. It leaves the trunk after the last item before the target, and has the positions of a
    separate prompt. The last token of a branch predicts nothing and is left out.

    Args:
        items: int64 (n, levels), the token ids of a chunk's items, oldest first.
        first: the number of items before the targets, which are ``items[first:]``.
        predict_end: whether the layout's end token is also a target.
        rows: int (n,), the item rows of ``items``. Models with an item head need them.

    Raises:
        ValueError: the layout has no prefix.
    """
    of_targets = np.empty(0, dtype=np.int64) if rows is None else rows[first:].astype(np.int64)
    if not layout.prefix:
        raise ValueError("a layout needs a prefix: the first item of an empty history is predicted from it")
    root, (count, levels) = len(layout.prefix), items.shape
    if not (layout.separator or layout.branches):
        ids = items.reshape(-1)
        order = np.arange(len(ids) - 1)
        states = np.arange(first * levels, len(ids)) + root - 1
        return Piece(
            ids[:-1],
            order + root,
            np.full_like(order, TRUNK),
            order,
            order,
            ids[first * levels :],
            states,
            of_targets,
        )
    separator = np.tile(np.array(layout.separator, dtype=np.int64), (count, 1))
    step = levels + separator.shape[1]
    # the trunk ends with the last item before the last target, without a separator
    trunk = np.concatenate([items, separator], axis=1)[:-1].reshape(-1)
    trunk = trunk[: max(0, len(trunk) - separator.shape[1])]
    place = np.arange(len(trunk))

    targets = np.arange(first, count)
    limit = np.where(targets > 0, targets * step - separator.shape[1] - 1, -1)  # last trunk token seen
    suffix = np.tile(np.array(layout.suffix, dtype=np.int64), (len(targets), 1))
    end = np.tile(np.array(layout.end if predict_end else (), dtype=np.int64), (len(targets), 1))
    text = np.concatenate([suffix, items[first:], end], axis=1)  # (targets, length of a branch + 1)
    length = text.shape[1] - 1
    order = np.tile(np.arange(length), (len(targets), 1))
    number = np.arange(1, len(targets) + 1).repeat(length)
    limits = limit.repeat(length)
    # the state before the first token of a branch is that of the trunk at the limit (of the root at -1)
    before = np.arange(suffix.shape[1], text.shape[1]) - 1  # (target tokens,) index within the branch
    in_branch = root + len(trunk) + np.arange(len(targets))[:, None] * length + before
    states = np.where(before >= 0, in_branch, root + limit[:, None])
    return Piece(
        np.concatenate([trunk, text[:, :-1].reshape(-1)]),
        np.concatenate([place, limits + 1 + order.reshape(-1)]) + root,
        np.concatenate([np.full_like(place, TRUNK), number]),
        np.concatenate([place, order.reshape(-1)]),
        np.concatenate([place, limits]),
        text[:, suffix.shape[1] :].reshape(-1),
        states.reshape(-1),
        of_targets,
    )


@dataclass(frozen=True)
class Packed:
    """The tokens of one forward pass, and the indices of the hidden states that predict target tokens.

    Attributes:
        ids, positions: int64 (rows, length), the token ids and their positions.
        visible: the attention mask as a tree.
        states: int64 (n,), the index of the hidden state that predicts each target token, in the flattened
            rows.
        targets: int64 (n,), the target tokens.
        owners: int64 (n,), the index of the piece that each target token belongs to.
        items: int64 (targets,), the item row of each target; empty if the pieces have none.
        tokens: the number of tokens without padding.
        counts: whether the pass counts. The loss of a pass that does not count is multiplied by 0; such a
            pass only keeps a process in step with others.
    """

    ids: Tensor
    positions: Tensor
    visible: Tree
    states: Tensor
    targets: Tensor
    owners: Tensor
    items: Tensor
    tokens: int
    counts: bool = True

    def to(self, device: torch.device) -> Packed:
        tensors: dict[str, Any] = {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}
        moved = {name: x.to(device, non_blocking=True) for name, x in tensors.items()}
        return replace(self, visible=self.visible.to(device), **moved)


def pack(
    pieces: Sequence[Piece], prefix: tuple[int, ...], row_tokens: int, pass_tokens: int, digits: int = 64
) -> list[Packed]:
    """Pack pieces into rows with one root each, and rows into passes.

    The number of rows is that of best-fit decreasing bin packing. Then the pieces are packed again into the
    same number of rows with the smallest possible length, so that there is little padding. The result for a
    target does not depend on the limits.

    Args:
        prefix: the token ids of the root.
        row_tokens: the largest length of a row. The cost of attention grows with it. A row is longer only if
            a single piece is.
        pass_tokens: the largest number of tokens of a pass, including padding, but a pass has at least one
            row. Memory grows with it. Rows are distributed evenly over as few passes as possible.
        digits: the length of a row is rounded up to this number of significant binary digits. The number of
            different shapes grows with it.
    """
    root = len(prefix)
    sizes = np.array([len(piece) for piece in pieces])
    room = max(row_tokens - root, int(sizes.max(initial=1)), 1)
    rows = _few(np.argsort(-sizes, kind="stable").tolist(), sizes.tolist(), room)
    rows.sort(key=lambda row: -int(sizes[row].sum()))
    if not rows:  # a process may have no part of a batch
        return []
    longest = _up(root + int(sizes[rows[0]].sum()), digits)
    fewest = -(-len(rows) // max(1, pass_tokens // longest))
    bounds = [len(rows) * number // fewest for number in range(fewest + 1)]
    passes = [rows[start:stop] for start, stop in pairwise(bounds)]
    return [_assemble(pieces, prefix, some, digits) for some in passes]


def deal(sizes: Sequence[int], hands: int) -> list[list[int]]:
    """Distribute pieces of these sizes over ``hands`` lists with about the same sum. The longest come first,
    and each goes to the list with the smallest sum. Returns their indices; a list may be empty."""
    dealt: list[list[int]] = [[] for _ in range(hands)]
    filled = np.zeros(hands, dtype=np.int64)
    for number in np.argsort(-np.array(sizes), kind="stable").tolist():
        hand = int(filled.argmin())
        filled[hand] += sizes[number]
        dealt[hand].append(number)
    return dealt


def _few(longest_first: list[int], sizes: list[int], room: int) -> list[list[int]]:
    """The pieces of each row: as few rows as :func:`_fill` finds for ``room`` tokens, and as short as
    possible for this number of rows, up to ``room`` / 64."""
    rows = _fill(longest_first, sizes, room)
    if not rows:
        return []
    step = -(-room // 64)
    low, high = max(-(-sum(sizes) // len(rows)), sizes[longest_first[0]]), room
    while low < high:
        middle = (low + high) // 2
        shorter = _fill(longest_first, sizes, middle)
        if len(shorter) <= len(rows):
            rows, high = shorter, middle - step + 1
        else:
            low = middle + step
    return rows


def _fill(longest_first: list[int], sizes: list[int], room: int) -> list[list[int]]:
    """The pieces of each row: each piece goes into the fullest row with room for it, or into a new row."""
    rows: list[list[int]] = []
    left: list[int] = []
    for piece in longest_first:
        size = sizes[piece]
        fits = [(free, row) for row, free in enumerate(left) if free >= size]
        if not fits:
            rows.append([])
            left.append(room)
        row = min(fits)[1] if fits else len(rows) - 1
        rows[row].append(piece)
        left[row] -= size
    return rows


def _up(tokens: int, digits: int) -> int:
    """The number of tokens rounded up to a number of significant binary digits."""
    step = 1 << max(0, tokens.bit_length() - digits)
    return -(-tokens // step) * step


def _assemble(pieces: Sequence[Piece], prefix: tuple[int, ...], rows: list[list[int]], digits: int) -> Packed:
    """The pass whose rows have these pieces, given by their indices."""
    root = len(prefix)
    length = _up(root + max(sum(len(pieces[p]) for p in row) for row in rows), digits)
    ids, positions, branch, order, limit = np.zeros((5, len(rows), length), dtype=np.int64)
    sequence = np.full((len(rows), length), PADDING, dtype=np.int64)
    sequence[:, :root], ids[:, :root] = ROOT, prefix
    branch[:, :root] = TRUNK
    positions[:, :root] = order[:, :root] = limit[:, :root] = np.arange(root)
    states, targets, owners, of_targets, tokens = [], [], [], [], 0
    for r, row in enumerate(rows):
        start = root
        for number, p in enumerate(row, 1):
            piece = pieces[p]
            span = slice(start, start + len(piece))
            sequence[r, span] = number
            ids[r, span], positions[r, span], branch[r, span] = piece.ids, piece.positions, piece.branch
            order[r, span], limit[r, span] = piece.order, piece.limit
            # states in the root are shared by the row; the others are shifted with their piece
            moved = np.where(piece.states < root, piece.states, piece.states - root + start)
            states.append(r * length + moved)
            targets.append(piece.targets)
            owners.append(np.full(len(piece.targets), p))
            of_targets.append(piece.items)
            start = span.stop
        tokens += start
    return Packed(
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        Tree(*(torch.from_numpy(x) for x in (sequence, branch, order, limit))),
        torch.from_numpy(np.concatenate(states)),
        torch.from_numpy(np.concatenate(targets)),
        torch.from_numpy(np.concatenate(owners)),
        torch.from_numpy(np.concatenate(of_targets)),
        tokens,
    )
