"""The nodes of the trie that each user may enter, given the items that are allowed or excluded.

A filter stores only the nodes on the paths of its items, so its size does not depend on the catalog.
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
    """A set of nodes for each user, which may be entered or must not be entered.

    A leaf is blocked if all its items are, and a node is blocked if all leaves below it are. A node may be
    entered if at least one item below it is allowed. So a search never reaches a dead end, and it returns k
    items whenever k exist.

    Attributes:
        keys: for each level, int64 (n,), the sorted keys ``user · nodes of the level + node``.
        nodes: the number of nodes of each level.
        admits_named: whether these nodes may be entered (otherwise, they must not).
    """

    keys: tuple[Tensor, ...]
    nodes: tuple[int, ...]
    admits_named: bool

    @classmethod
    def without(cls, trie: ItemTrie, items: Sequence[np.ndarray]) -> NodeFilter:
        """A filter that excludes the given item rows for each user."""
        return cls(_touched(trie, items, whole=True), trie.nodes, False)

    @classmethod
    def only(cls, trie: ItemTrie, items: Sequence[np.ndarray]) -> NodeFilter:
        """A filter that allows only the given item rows for each user."""
        return cls(_touched(trie, items, whole=False), trie.nodes, True)

    def to(self, device: torch.device) -> NodeFilter:
        return NodeFilter(tuple(keys.to(device) for keys in self.keys), self.nodes, self.admits_named)

    def admits(self, level: int, nodes: Tensor) -> Tensor:
        """Whether each user may enter nodes of a level: int64 (users, …) → bool (users, …)."""
        keys = self.keys[level]
        if not len(keys):
            return torch.full_like(nodes, not self.admits_named, dtype=torch.bool)
        user = torch.arange(len(nodes), device=nodes.device).view(-1, *[1] * (nodes.dim() - 1))
        wanted = user * self.nodes[level] + nodes
        place = torch.searchsorted(keys, wanted).clamp_max(len(keys) - 1)
        return (keys[place] == wanted) == self.admits_named


def _touched(trie: ItemTrie, items: Sequence[np.ndarray], *, whole: bool) -> tuple[Tensor, ...]:
    """The keys, for each level, of the nodes that have any of each user's items below them. With ``whole``,
    only nodes that have no other items."""
    catalogue = len(trie.items)
    users = np.repeat(np.arange(len(items), dtype=np.int64), [len(rows) for rows in items])
    rows = np.concatenate([np.empty(0, dtype=np.int64), *items]).astype(np.int64)
    owner, row = np.divmod(np.unique(users * catalogue + rows), catalogue)  # without duplicates
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
