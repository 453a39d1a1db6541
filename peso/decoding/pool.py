"""Combine the semantic IDs that a model generates with those that its item head ranks best.

Let p_codes be the probability of an ID's codes, and p_items the total probability of the ID's items under the
head. The result is a mixture:

    p(ID) = s · p_items(ID) + (1 - s) · p_codes(ID)

If the model counts transitions (:mod:`peso.model.transitions`), the mixture is the prior of these counts:

    p(ID) = (G(ID) + μ · (s · p_items(ID) + (1 - s) · p_codes(ID))) / (Σ G + μ)

So the probabilities of all IDs sum to at most one, as those of p_codes do, and likelihoods are comparable
with those of other models. The share s of the head is tuned on validation cases, separately by the length of
the history, and so is the weight μ of the prior, for all cases together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from peso.decoding.filters import NodeFilter
from peso.items.semantic_ids import ItemTrie, SemanticIds
from peso.model.generative import GenerativeModel
from peso.model.item_head import LENGTHS, groups_of
from peso.model.transitions import PRIOR, Transitions

FEWEST = 200  # the smallest number of validation cases for which a group has its own share
SHARES = tuple(round(0.05 * step, 2) for step in range(21))
PRIORS = (10.0, 30.0, 100.0, 300.0, 1000.0)


@dataclass(frozen=True)
class Evidence:
    """The evidence of counted transitions for semantic IDs.

    Attributes:
        counts: float32 (users, n), G of each ID.
        totals: float32 (users, 1), Σ G over all IDs.
        prior: μ.
    """

    counts: Tensor
    totals: Tensor
    prior: float

    @classmethod
    def of(
        cls, transitions: Transitions, trie: ItemTrie, histories: Sequence[np.ndarray], device: torch.device
    ) -> Evidence:
        """The evidence after these histories of item rows, for every leaf of the trie."""
        of_items = transitions.evidence(histories)
        # the items of a leaf are in succession
        of_leaves = np.add.reduceat(of_items[:, trie.items], trie.item_starts[:-1], axis=1)
        counts = torch.from_numpy(of_leaves).to(device)
        return cls(counts, counts.sum(1, keepdim=True), transitions.prior)

    def at(self, leaves: Tensor) -> Evidence:
        """The evidence for these leaves of each user, int64 (users, n)."""
        return replace(self, counts=self.counts.gather(1, leaves))

    def posterior(self, log_prior: Tensor) -> Tensor:
        """ln p(ID) from the logarithm of the mixture, float32 (users, n)."""
        both = torch.logaddexp(log_prior + math.log(self.prior), self.counts.log())
        return both - (self.totals + self.prior).log()


def pool(items: Tensor, codes: Tensor, share: Tensor, evidence: Evidence | None = None) -> Tensor:
    """ln p(ID) of semantic IDs.

    Args:
        items, codes: (users, n), ln p_items and ln p_codes.
        share: (users,), the share of the head.
        evidence: counts for the same IDs; None if the model does not count.
    """
    s = share.unsqueeze(1)
    mixture = torch.logaddexp(items + s.log(), codes + (1 - s).log())
    return mixture if evidence is None else evidence.posterior(mixture)


def without_codes(items: Tensor, share: Tensor, evidence: Evidence) -> Tensor:
    """ln p(ID) without p_codes, which ranks candidates whose codes are not scored yet: float32 (users, n)."""
    return evidence.posterior(items + share.clamp_min(SHARES[1]).log().unsqueeze(1))


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
        evidence: counts of transitions; None if the model does not count.
    """

    leaves: Tensor
    codes: Tensor
    items: Tensor
    evidence: Evidence | None = None

    @classmethod
    def of(cls, leaves: Tensor, codes: Tensor, items: Tensor, evidence: Evidence | None = None) -> Candidates:
        """Merge candidates that occur twice.

        Args:
            leaves: int64 (users, n), the leaves of the candidates, possibly with duplicates.
            codes: float32 (users, n), ln p_codes of these leaves.
            items: float32 (users, all leaves), ln p_items of all leaves.
            evidence: the counts of all leaves.
        """
        leaves, order = leaves.sort(dim=1, stable=True)
        again = torch.zeros_like(leaves, dtype=torch.bool)
        again[:, 1:] = leaves[:, 1:] == leaves[:, :-1]
        places = leaves.clamp_min(0)
        return cls(
            leaves.masked_fill(again, -1),
            codes.gather(1, order),
            items.gather(1, places),
            None if evidence is None else evidence.at(places),
        )

    @classmethod
    def joined(cls, parts: Sequence[Candidates]) -> Candidates:
        """The candidates of several batches of users, on the CPU."""

        def all_of(tensors: Iterable[Tensor]) -> Tensor:
            return torch.cat([tensor.cpu() for tensor in tensors])

        evidence = [part.evidence for part in parts if part.evidence is not None]
        return cls(
            all_of(part.leaves for part in parts),
            all_of(part.codes for part in parts),
            all_of(part.items for part in parts),
            Evidence(
                all_of(each.counts for each in evidence),
                all_of(each.totals for each in evidence),
                evidence[0].prior,
            )
            if evidence
            else None,
        )

    def with_prior(self, prior: float) -> Candidates:
        """The same with another weight of the prior."""
        return self if self.evidence is None else replace(self, evidence=replace(self.evidence, prior=prior))

    def scores(self, share: Tensor) -> Tensor:
        """ln p of each candidate: float32 (users, n), for the shares of the head (users,)."""
        return pool(self.items, self.codes, share, self.evidence)

    def best(self, share: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The ``count`` best candidates by the mixture.

        Args:
            share: float32 (users,), the share of the head for each user.
            count: the number of candidates.

        Returns: their leaves, best first, with ties in the order of the trie and -1 if there are fewer; and
            their ln p, which is -inf if there are fewer.
        """
        scores = self.scores(share).masked_fill(self.leaves < 0, -torch.inf)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        leaves = torch.where(scores.isneginf(), -1, self.leaves.gather(1, order))
        return leaves[:, :count], scores[:, :count]


@dataclass(frozen=True)
class PoolWeights:
    """The weights that were chosen on validation cases.

    Attributes:
        shares: the share of the head for each group of ``LENGTHS``.
        prior: the weight of the prior; None if the model does not count transitions.
        means: the mean NDCG of all cases at each of ``SHARES``, with this prior.
    """

    shares: list[float]
    prior: float | None
    means: list[float]


def best_weights(candidates: Candidates, targets: Candidates, lengths: Tensor, depth: int) -> PoolWeights:
    """Choose weights by the mean NDCG@depth, and by likelihood where NDCG cannot tell them apart.

    First the prior is chosen from ``PRIORS``, each with the share that is best for all cases: of those that
    are not clearly worse than the best (:func:`near_best`), the one nearest to ``PRIOR``. Then a share is
    chosen from ``SHARES`` for each group of ``LENGTHS``, or for all cases if the group has fewer than
    ``FEWEST``: of those that are not clearly worse than the best, the one with the highest likelihood of the
    targets. NDCG is nearly equal over a wide range of shares, and one that is best by chance can cost a lot
    of likelihood.

    Args:
        candidates: the candidates of the validation cases.
        targets: the target of each case, as the only candidate.
        lengths: int64 (users,), the number of items in each prompt.
        depth: the number of candidates that NDCG takes into account.
    """
    groups = groups_of(lengths)
    priors = PRIORS if candidates.evidence is not None else (PRIOR,)
    gains = [_gains(candidates.with_prior(prior), targets.leaves, depth) for prior in priors]
    best_of_each = torch.stack([gain[gain.mean(1).argmax()] for gain in gains])
    number = min(near_best(best_of_each), key=lambda number: abs(math.log(priors[number] / PRIOR)))
    prior, gain = priors[number], gains[number]
    of_targets = targets.with_prior(prior)
    likelihoods = torch.stack(
        [of_targets.scores(share).squeeze(1) for share in _uniform(len(groups), groups)]
    )

    def share_of(cases: Tensor) -> float:
        means = likelihoods[:, cases].double().mean(1)
        return SHARES[max(near_best(gain[:, cases]), key=lambda number: float(means[number]))]

    every = share_of(torch.ones_like(groups, dtype=torch.bool))
    members = [groups == number for number in range(len(LENGTHS) + 1)]
    shares = [share_of(own) if int(own.sum()) >= FEWEST else every for own in members]
    return PoolWeights(shares, None if candidates.evidence is None else prior, gain.mean(1).tolist())


def near_best(gains: Tensor) -> list[int]:
    """The values whose mean is within one standard error of the best one (Breiman et al. 1984,
    "Classification and Regression Trees"). The standard error is that of the paired difference from the best.

    Args:
        gains: (values, cases), the result of each case with each value; larger is better.

    Returns:
        Their numbers, the best first.
    """
    means = gains.double().mean(1)
    losses = gains[means.argmax()].double() - gains.double()  # (values, cases)
    errors = losses.std(1, correction=0) / gains.shape[1] ** 0.5
    near = (losses.mean(1) <= errors).nonzero().squeeze(1).tolist()
    return sorted(near, key=lambda value: -float(means[value]))


def _uniform(users: int, like: Tensor) -> list[Tensor]:
    """Each of ``SHARES`` for all users: float32 (users,)."""
    return [torch.full((users,), share, device=like.device) for share in SHARES]


def _gains(candidates: Candidates, targets: Tensor, depth: int) -> Tensor:
    """NDCG@depth of each case at each of ``SHARES``: float32 (shares, users), for targets (users, 1)."""
    result = []
    for share in _uniform(len(targets), targets):
        leaves, _ = candidates.best(share, depth)
        place = (leaves == targets).float()  # (users, depth), or fewer columns if there are fewer candidates
        ranks = torch.arange(place.shape[1], device=place.device) + 1
        result.append(place @ (ranks + 1).float().log2().reciprocal())
    return torch.stack(result)
