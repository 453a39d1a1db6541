"""One step of the search: from the beams of one level to the best beams of the next level."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from peso.decoding.filters import NodeFilter
from peso.items.semantic_ids import ItemTrie

NONE = torch.iinfo(torch.int64).max  # the key of missing candidates


@dataclass(frozen=True)
class TrieTensors:
    """The arrays of an :class:`ItemTrie` on a device.

    Attributes:
        codes: for each level, int32 (nodes, fan-out), a view of the flat codes. Row i has the codes of node i
            and of the nodes after it, so that one row contains all children of a node (and possibly more).
        starts: for each level, int32 (nodes of the level above + 1,), where the children of each node begin.
        fanout: for each level, the largest number of children of a node.
    """

    codes: tuple[Tensor, ...]
    starts: tuple[Tensor, ...]
    fanout: tuple[int, ...]

    @classmethod
    def of(cls, trie: ItemTrie, device: torch.device) -> TrieTensors:
        """The arrays for a trie and a device. They are created once and kept as long as the trie."""
        copies = _ON_DEVICE.setdefault(trie, {})
        if device not in copies:
            copies[device] = cls(
                tuple(
                    F.pad(torch.from_numpy(codes).to(device), (0, most - 1)).unfold(0, most, 1)
                    for codes, most in zip(trie.codes, trie.fanout, strict=True)
                ),
                tuple(torch.from_numpy(starts).to(device) for starts in trie.starts),
                trie.fanout,
            )
        return copies[device]


_ON_DEVICE: WeakKeyDictionary[ItemTrie, dict[torch.device, TrieTensors]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Selection:
    """The beams after a step, in the order of the trie. All are (users, beams).

    Attributes:
        nodes: int64, the node numbers within the level, -1 if there is no beam.
        costs: float32, the negative log-probabilities, inf if there is no beam.
        codes: int64, the last code of each beam.
        parents: int64, the beam of the previous step that was continued.
    """

    nodes: Tensor
    costs: Tensor
    codes: Tensor
    parents: Tensor

    @classmethod
    def root(cls, users: int, device: torch.device) -> Selection:
        """One beam per user before the first code, at the root (node 0)."""
        zero = torch.zeros(users, 1, dtype=torch.int64, device=device)
        return cls(zero, zero.float(), zero, zero)

    def ranked(self) -> tuple[Tensor, Tensor]:
        """The nodes and log-probabilities, best first, with ties in the order of the trie."""
        costs, order = self.costs.sort(stable=True)
        return self.nodes.gather(1, order), 0.0 - costs


def select(
    trie: TrieTensors,
    level: int,
    beams: Selection,
    log_probabilities: Tensor,
    width: int,
    admitted: NodeFilter | None = None,
) -> Selection:
    """Extend every beam by all its children, and keep the ``width`` best beams of each user.

    Ties are resolved in favor of the lower semantic ID (the lower code tuple), exactly on every device: beams
    are in the order of the trie, and so are candidates. The cost and the position of a candidate are combined
    into one integer key, so all keys are different. Costs are never negative, and the bits of such floats
    compare like integers (IEEE 754).

    Args:
        level: the level of the codes to choose; the beams are on the level above.
        beams: the beams to extend.
        log_probabilities: float32 (users, beams, codes of the level).
        width: the number of beams to keep, at most the number of candidates.
        admitted: the nodes that each user may enter; None for all.
    """
    starts, most = trie.starts[level], trie.fanout[level]
    above = beams.nodes.clamp_min(0)
    first = starts[above]  # (users, beams)
    count = torch.where(beams.nodes < 0, 0, starts[above + 1] - first)
    place = torch.arange(most, dtype=torch.int32, device=first.device)
    missing = place >= count.unsqueeze(-1)  # (users, beams, fan-out), like everything below
    if admitted is not None:
        missing |= ~admitted.admits(level, first.unsqueeze(-1).long() + place)
    codes = trie.codes[level][first].long()
    costs = beams.costs.unsqueeze(-1) - log_probabilities.gather(-1, codes)
    costs.clamp_min_(0)  # rounding can make a log-probability slightly larger than 0

    key = costs.view(torch.int32).long()
    key.bitwise_left_shift_(32).masked_fill_(missing, NONE)
    key, costs, codes = key.flatten(1), costs.flatten(1), codes.flatten(1)  # (users, candidates)
    key.bitwise_or_(torch.arange(key.shape[1], device=key.device))
    best = key.topk(width, largest=False, sorted=False).indices.sort().values  # (users, width)

    parents = best // most
    nodes = first.gather(1, parents) + best % most
    found = key.gather(1, best) != NONE
    return Selection(
        torch.where(found, nodes.long(), -1),
        torch.where(found, costs.gather(1, best), torch.inf),
        codes.gather(1, best),
        parents,
    )
