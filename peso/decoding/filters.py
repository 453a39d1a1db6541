"""Which nodes of the trie each user may enter, given the items that the user may or may not get.

A filter stores only the nodes that its items touch, so its size does not depend on the catalog.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from peso.items.semantic_ids import ItemTrie


@dataclass(frozen=True)
class NodeFilter:
    """Per level the sorted keys ``user · nodes of the level + node`` of the nodes it names.

    A node is blocked where all leaves below it are, a leaf where all its items are; it is admitted where at
    least one item below it is. So no search runs into a dead end, and k items come back whenever k exist.

    Attributes:
        keys: per level int64 (n,), sorted.
        nodes: number of nodes of each level.
        admits_named: whether the named nodes are those that may be entered (else those that may not).
    """

    keys: tuple[Tensor, ...]
    nodes: tuple[int, ...]
    admits_named: bool

    @classmethod
    def without(cls, trie: ItemTrie, items: Sequence[np.ndarray]) -> NodeFilter:
        """Everything but these item rows of each user."""
        return cls(_touched(trie, items, whole=True), trie.nodes, False)

    @classmethod
    def only(cls, trie: ItemTrie, items: Sequence[np.ndarray]) -> NodeFilter:
        """Nothing but these item rows of each user."""
        return cls(_touched(trie, items, whole=False), trie.nodes, True)

    def to(self, device: torch.device) -> NodeFilter:
        return NodeFilter(tuple(keys.to(device) for keys in self.keys), self.nodes, self.admits_named)

    def admits(self, level: int, nodes: Tensor) -> Tensor:
        """int64 (users, …) nodes of a level → bool (users, …), whether each user may enter them."""
        keys = self.keys[level]
        if not len(keys):
            return torch.full_like(nodes, not self.admits_named, dtype=torch.bool)
        user = torch.arange(len(nodes), device=nodes.device).view(-1, *[1] * (nodes.dim() - 1))
        wanted = user * self.nodes[level] + nodes
        place = torch.searchsorted(keys, wanted).clamp_max(len(keys) - 1)
        return (keys[place] == wanted) == self.admits_named


def _touched(trie: ItemTrie, items: Sequence[np.ndarray], *, whole: bool) -> tuple[Tensor, ...]:
    """Keys of the nodes that hold some of each user's items (``whole``: nothing but them), level by level."""
    catalogue = len(trie.items)
    users = np.repeat(np.arange(len(items), dtype=np.int64), [len(rows) for rows in items])
    rows = np.concatenate([np.empty(0, dtype=np.int64), *items]).astype(np.int64)
    owner, row = np.divmod(np.unique(users * catalogue + rows), catalogue)  # an item named twice counts once
    below, node = trie.item_starts, trie.leaf_of[row]
    levels = []
    for level in reversed(range(trie.levels)):
        size = trie.nodes[level]
        keys, counts = np.unique(owner * size + node, return_counts=True)
        if whole:
            keys = keys[counts == np.diff(below)[keys % size]]
        levels.append(torch.from_numpy(keys))
        owner, node = np.divmod(keys, size)
        below, node = trie.starts[level], trie.parents(level, node)
    return tuple(reversed(levels))
