"""Combine the semantic IDs that a model generates with those that its item head ranks best.

Let p_codes be the probability of an ID's codes, and p_items the total probability of the ID's items under the
head. The result is a mixture:

    p(ID) = s · p_items(ID) + (1 - s) · p_codes(ID)

So the probabilities of all IDs sum to at most one, as those of p_codes do, and likelihoods are comparable
with those of other models. The share s of the head is tuned on validation cases, separately by the length of
the history.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from peso.decoding.filters import NodeFilter
from peso.items.semantic_ids import SemanticIds
from peso.model.generative import GenerativeModel
from peso.model.item_head import LENGTHS, groups_of

FEWEST = 200  # the smallest number of validation cases for which a group has its own share
SHARES = tuple(round(0.05 * step, 2) for step in range(21))


def pool(items: Tensor, codes: Tensor, share: Tensor) -> Tensor:
    """ln p(ID) from ln p_items and ln p_codes, both (users, n), and the share of the head, (users,)."""
    s = share.unsqueeze(1)
    return torch.logaddexp(items + s.log(), codes + (1 - s).log())


def leaf_log_probabilities(model: GenerativeModel, hidden: Tensor) -> Tensor:
    """ln p_items of every semantic ID, from the hidden states after the prompts: (users, width) → float32
    (users, leaves)."""
    of_items = model.item_log_probabilities(hidden)
    trie = model.semantic_ids.trie
    result = of_items[:, torch.from_numpy(trie.items[trie.item_starts[:-1]]).to(hidden.device)]
    counts = np.diff(trie.item_starts)
    for place in range(1, int(counts.max())):  # few IDs have more than one item
        shared = np.flatnonzero(counts > place)
        others = of_items[:, torch.from_numpy(trie.items[trie.item_starts[shared] + place]).to(hidden.device)]
        columns = torch.from_numpy(shared).to(hidden.device)
        result[:, columns] = torch.logaddexp(result[:, columns], others)
    return result


def best_leaves(log_probabilities: Tensor, leaves: Tensor, count: int, admitted: NodeFilter | None) -> Tensor:
    """The ``count`` most likely leaves that each user may enter. Ties are in the order of the trie.

    Args:
        log_probabilities: float32 (users, all leaves), the log-probability of every leaf.
        leaves: int64 (n,), the leaves of the trie that is searched, as leaves of the trie of all items.
        count: the number of leaves to return.
        admitted: which of the n leaves each user may enter; None for all.

    Returns:
        int64 (users, count), leaves of the trie of all items, best first; -1 if there are fewer.
    """
    costs = -log_probabilities[:, leaves]
    costs.clamp_min_(0)
    if admitted is not None:
        places = torch.arange(len(leaves), device=leaves.device).expand(len(costs), -1)
        costs = costs.masked_fill(~admitted.admits(len(admitted.nodes) - 1, places), torch.inf)
    # the bits of non-negative floats compare like integers; the position in the lower bits breaks ties
    keys = costs.view(torch.int32).long().bitwise_left_shift_(32)
    keys.bitwise_or_(torch.arange(len(leaves), device=leaves.device))
    best = keys.topk(count, largest=False).indices
    return torch.where(costs.gather(1, best).isinf(), -1, leaves[best])


def leaf_codes(ids: SemanticIds, leaves: Tensor) -> Tensor:
    """The codes of leaves: int64 (users, n) → int64 (users, n, levels)."""
    rows = ids.trie.items[ids.trie.item_starts[leaves.cpu().numpy()]]
    return torch.from_numpy(ids.codes[rows].astype(np.int64)).to(leaves.device)


@dataclass(frozen=True)
class Candidates:
    """The distinct candidates of each user, from the beams and from the item head. All are (users, n).

    Attributes:
        leaves: int64, the leaf of each candidate, -1 if there is none.
        codes, items: float32, ln p_codes and ln p_items.
    """

    leaves: Tensor
    codes: Tensor
    items: Tensor

    @classmethod
    def of(cls, leaves: Tensor, codes: Tensor, items: Tensor) -> Candidates:
        """Merge candidates that occur twice.

        Args:
            leaves: int64 (users, n), the leaves of the candidates, possibly with duplicates.
            codes: float32 (users, n), ln p_codes of these leaves.
            items: float32 (users, all leaves), ln p_items of all leaves.
        """
        leaves, order = leaves.sort(dim=1, stable=True)
        again = torch.zeros_like(leaves, dtype=torch.bool)
        again[:, 1:] = leaves[:, 1:] == leaves[:, :-1]
        return cls(
            leaves.masked_fill(again, -1), codes.gather(1, order), items.gather(1, leaves.clamp_min(0))
        )

    def best(self, share: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The ``count`` best candidates by the mixture.

        Args:
            share: float32 (users,), the share of the head for each user.
            count: the number of candidates.

        Returns: their leaves, best first, with ties in the order of the trie and -1 if there are fewer; and
            their ln p, which is -inf if there are fewer.
        """
        scores = pool(self.items, self.codes, share).masked_fill(self.leaves < 0, -torch.inf)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        leaves = torch.where(scores.isneginf(), -1, self.leaves.gather(1, order))
        return leaves[:, :count], scores[:, :count]


def best_shares(
    candidates: Candidates, targets: Tensor, lengths: Tensor, depth: int
) -> tuple[list[float], list[float]]:
    """The shares in ``SHARES`` with the highest mean NDCG@depth, one for each group of ``LENGTHS``.

    A group with fewer than ``FEWEST`` cases gets the share that is best for all cases. Ties are resolved in
    favor of the share nearest to 0.5.

    Args:
        candidates: the candidates of the validation cases.
        targets: int64 (users,), the leaf of each target.
        lengths: int64 (users,), the number of items in each prompt.
        depth: the number of candidates that NDCG takes into account.

    Returns:
        The shares, and the mean NDCG of all cases at each of ``SHARES``.
    """
    gains = []  # (shares, users)
    for share in SHARES:
        leaves, _ = candidates.best(torch.full(targets.shape, share, device=targets.device), depth)
        place = (leaves == targets.unsqueeze(1)).float()  # (users, depth)
        gains.append(place @ (torch.arange(depth, device=place.device) + 2).float().log2().reciprocal())
    gain, groups = torch.stack(gains), groups_of(lengths)

    def best(cases: Tensor) -> float:
        means = gain[:, cases].mean(1).tolist()
        return max(SHARES, key=lambda share: (means[SHARES.index(share)], -abs(share - 0.5)))

    every = best(torch.ones_like(groups, dtype=torch.bool))
    members = [groups == number for number in range(len(LENGTHS) + 1)]
    return [best(own) if int(own.sum()) >= FEWEST else every for own in members], gain.mean(1).tolist()
