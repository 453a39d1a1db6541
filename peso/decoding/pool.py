"""One answer from two: the semantic IDs that a model generates, and those that its item head finds best.

With p_codes, the probability of an ID's codes, and p_items, that of the ID's items together under the head:

    p(ID) = s · p_items(ID) + (1 - s) · p_codes(ID)

A mixture, so that the probabilities of all IDs sum to at most one as p_codes do (to one where these do), and
likelihoods compare with those of other models. The share s of the head is tuned on validation cases, by the
length of the history.
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

FEWEST = 200  # validation cases of a group that has a share of its own
SHARES = tuple(round(0.05 * step, 2) for step in range(21))


def pool(items: Tensor, codes: Tensor, share: Tensor) -> Tensor:
    """ln p(ID) from ln p_items and ln p_codes, (users, n) each; ``share``: (users,)."""
    s = share.unsqueeze(1)
    return torch.logaddexp(items + s.log(), codes + (1 - s).log())


def leaf_log_probabilities(model: GenerativeModel, hidden: Tensor) -> Tensor:
    """hidden (users, width), after the prompt → float32 (users, leaves): ln p_items of every semantic ID."""
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
    """The ``count`` likeliest admitted leaves of each user, equal ones in the order of the trie.

    Args:
        log_probabilities: float32 (users, all leaves).
        leaves: int64 (n,), those of the trie that is searched, as leaves of the trie of all items.
        admitted: what each user may enter of the n.

    Returns:
        int64 (users, count) leaves of the trie of all items, best first; -1 where fewer are admitted.
    """
    costs = -log_probabilities[:, leaves]
    costs.clamp_min_(0)
    if admitted is not None:
        places = torch.arange(len(leaves), device=leaves.device).expand(len(costs), -1)
        costs = costs.masked_fill(~admitted.admits(len(admitted.nodes) - 1, places), torch.inf)
    # the bits of floats that are not negative compare as integers; the place beside them breaks ties
    keys = costs.view(torch.int32).long().bitwise_left_shift_(32)
    keys.bitwise_or_(torch.arange(len(leaves), device=leaves.device))
    best = keys.topk(count, largest=False).indices
    return torch.where(costs.gather(1, best).isinf(), -1, leaves[best])


def leaf_codes(ids: SemanticIds, leaves: Tensor) -> Tensor:
    """leaves int64 (users, n) → int64 (users, n, levels): the codes on the way to each."""
    rows = ids.trie.items[ids.trie.item_starts[leaves.cpu().numpy()]]
    return torch.from_numpy(ids.codes[rows].astype(np.int64)).to(leaves.device)


@dataclass(frozen=True)
class Candidates:
    """What both propose for each user, once each. All (users, n).

    leaves: int64, -1 where there is no candidate. codes, items: float32, ln p_codes and ln p_items.
    """

    leaves: Tensor
    codes: Tensor
    items: Tensor

    @classmethod
    def of(cls, leaves: Tensor, codes: Tensor, items: Tensor) -> Candidates:
        """
        Args:
            leaves: int64 (users, n), some of them twice. codes: float32 (users, n), theirs.
            items: float32 (users, all leaves).
        """
        leaves, order = leaves.sort(dim=1, stable=True)
        again = torch.zeros_like(leaves, dtype=torch.bool)
        again[:, 1:] = leaves[:, 1:] == leaves[:, :-1]
        return cls(
            leaves.masked_fill(again, -1), codes.gather(1, order), items.gather(1, leaves.clamp_min(0))
        )

    def best(self, share: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The best ``count`` by the pool: leaves, best first, equal ones in the order of the trie, -1 where
        there are fewer; and their ln p, -inf there.

        share: float32 (users,).
        """
        scores = pool(self.items, self.codes, share).masked_fill(self.leaves < 0, -torch.inf)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        leaves = torch.where(scores.isneginf(), -1, self.leaves.gather(1, order))
        return leaves[:, :count], scores[:, :count]


def best_shares(
    candidates: Candidates, targets: Tensor, lengths: Tensor, depth: int
) -> tuple[list[float], list[float]]:
    """The shares of ``SHARES`` with the highest mean NDCG@depth, one for each group of ``LENGTHS``.

    A group of fewer than ``FEWEST`` cases has the share that is best for all. Among equals the most even one.

    Args:
        targets: int64 (users,), leaves.
        lengths: int64 (users,), items in each prompt.

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
