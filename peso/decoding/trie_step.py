"""The hot step of the search: from the beams of one level to the best beams of the next.

Knows nodes of the trie and log-probabilities; knows nothing of models, prompts or items.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from peso.decoding.filters import NodeFilter
from peso.items.trie import ItemTrie


@dataclass(frozen=True)
class TrieTensors:
    """The arrays of an :class:`ItemTrie` on a device: on the CPU the same memory, elsewhere one copy."""

    codes: tuple[Tensor, ...]
    starts: tuple[Tensor, ...]
    fanout: tuple[int, ...]

    @classmethod
    def of(cls, trie: ItemTrie, device: torch.device) -> TrieTensors:
        copies = _ON_DEVICE.setdefault(trie, {})
        if device not in copies:
            codes, starts = (
                tuple(torch.from_numpy(array).to(device) for array in arrays)
                for arrays in (trie.codes, trie.starts)
            )
            copies[device] = cls(codes, starts, trie.fanout)
        return copies[device]


_ON_DEVICE: WeakKeyDictionary[ItemTrie, dict[torch.device, TrieTensors]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Selection:
    """The beams after a step, best first. All (users, beams).

    nodes: int64 numbers within the level, -1 where there is no beam. scores: float32, -inf where none.
    codes: int64, the code that led here. parents: int64, the beam of the step before that was continued.
    """

    nodes: Tensor
    scores: Tensor
    codes: Tensor
    parents: Tensor

    @classmethod
    def root(cls, users: int, device: torch.device) -> Selection:
        """One beam each, before the first code: ``nodes`` 0 is the root."""
        zero = torch.zeros(users, 1, dtype=torch.int64, device=device)
        return cls(zero, zero.float(), zero, zero)


def select(
    trie: TrieTensors,
    level: int,
    nodes: Tensor,
    scores: Tensor,
    log_probabilities: Tensor,
    width: int,
    admitted: NodeFilter | None = None,
) -> Selection:
    """Extend every beam by all its children and keep the ``width`` best of each user.

    Equal scores are ordered by node number, that is by the code tuple: the lower semantic ID comes first.
    The order is exact, whatever the device, because score and node are joined into one integer key before
    the top-k: no two keys are equal.

    Args:
        level: whose codes are chosen; ``nodes`` lie on the level above.
        nodes: int64 (users, beams), -1 where there is no beam.
        scores: float32 (users, beams) log-probabilities so far.
        log_probabilities: float32 (users, beams, codes of the level).
    """
    starts, codes = trie.starts[level], trie.codes[level]
    above = nodes.clamp_min(0)
    first = starts[above].long()
    count = torch.where(nodes < 0, 0, starts[above + 1] - first)
    place = torch.arange(trie.fanout[level], device=nodes.device)
    exists = place < count.unsqueeze(-1)  # (users, beams, fan-out)
    children = (first.unsqueeze(-1) + place).clamp_max(len(codes) - 1)
    code = codes[children].long()
    if admitted is not None:
        exists &= admitted.admits(level, children)
    extended = scores.unsqueeze(-1) + log_probabilities.gather(-1, code)

    exists, children, code, extended = (x.flatten(1) for x in (exists, children, code, extended))
    key = (_ordered_bits(extended) << 32) | (0xFFFFFFFF - children)
    key = key.masked_fill(~exists, torch.iinfo(torch.int64).min)
    best = key.topk(min(width, key.shape[1])).indices  # (users, width)

    found = exists.gather(1, best)
    return Selection(
        torch.where(found, children.gather(1, best), -1),
        torch.where(found, extended.gather(1, best), -torch.inf),
        code.gather(1, best),
        best // len(place),
    )


def _ordered_bits(x: Tensor) -> Tensor:
    """float32 → int64 in the same order: IEEE 754 bits compare like integers once negatives are mirrored."""
    bits = (x + 0.0).view(torch.int32)  # + 0.0 makes the two zeros one
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
