"""Trie-constrained beam search over item numbers.

The prompt of a user is computed once. Beams are extra positions after it. Each beam attends to the prompt,
its own ancestors and itself, so nothing is copied or reordered when a beam splits or ends. An item is
complete after its last code, so there is no end token and no step after the last code. A given path, such as
that of a target, is one more beam that no other beam sees; this scores the path without a second pass over
the prompt.

If the model has an item head, both contribute: the candidates are the semantic IDs that the beams find and
the same number that the head ranks best, which are scored as given paths. See :mod:`peso.decoding.pool`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from peso.decoding.filters import NodeFilter
from peso.decoding.pool import (
    Candidates,
    Evidence,
    best_leaves,
    leaf_codes,
    leaf_log_probabilities,
    without_codes,
)
from peso.decoding.prompt import Known, Prompt, run_prompts
from peso.decoding.returning import Returning
from peso.decoding.trie_step import Selection, TrieTensors, select
from peso.errors import BackboneError
from peso.items.semantic_ids import ItemTrie
from peso.model.generative import GenerativeModel
from peso.model.head import level_log_probabilities
from peso.model.sharding import uneven_passes
from peso.model.shared_keys import shared_keys
from peso.runtime.processes import ALONE, Processes

# The default number of users in a batch. On a GPU, small batches are limited by the host.
TOGETHER = {"cpu": 64}
TOGETHER_ELSEWHERE = 256
# The total number of beams in a batch, to limit the memory of searches with hundreds of beams.
BEAMS_AT_ONCE = {"cpu": 4096}
BEAMS_AT_ONCE_ELSEWHERE = 16384
# With an item head, the total number of item scores in a batch, to limit the memory with large catalogs.
SCORES_AT_ONCE = {"cpu": 2**25}
SCORES_AT_ONCE_ELSEWHERE = 2**27


@dataclass(frozen=True)
class Beams:
    """The best semantic IDs of each user, best first.

    Attributes:
        leaves: int64 (users, beams), leaves of the catalog's trie, -1 if fewer exist.
        scores: float32 (users, beams), the log-probability of the codes under the model's
            ``loss_vocabulary``, or that of the pool if the model has an item head
            (:mod:`peso.decoding.pool`); -inf if there is no leaf.
        targets: float32 (users, levels), ln p(c_l | history, c_1 … c_{l-1}) of each code of each user's
            target, with the same normalization; None if no targets were given.
        target_scores: float32 (users,), the score of each user's target, computed like ``scores``; None if no
            targets were given.
    """

    leaves: np.ndarray
    scores: np.ndarray
    targets: np.ndarray | None = None
    target_scores: np.ndarray | None = None


@torch.no_grad()
def search(
    model: GenerativeModel,
    histories: Sequence[np.ndarray],
    *,
    beams: int = 10,
    batch_size: int | None = None,
    exclude: Sequence[np.ndarray] | None = None,
    allow: np.ndarray | Sequence[np.ndarray] | None = None,
    targets: np.ndarray | None = None,
    returning: Sequence[Returning | None] | None = None,
    on_progress: Callable[[int], None] | None = None,
    on_candidates: Callable[[np.ndarray, Candidates, Candidates | None], None] | None = None,
    processes: Processes = ALONE,
) -> Beams:
    """Find the ``beams`` best semantic IDs after each history.

    The result is that of Transformers' constrained beam search on the same model
    (docs/explanation/decoding.md). Users are batched by the lengths of their prompts, which affects results
    only by rounding.

    Args:
        histories: for each user, the int item rows of the history, oldest first. It may be empty; the last
            ``window`` items are used.
        beams: the number of partial IDs to keep for each user at each level.
        batch_size: the largest number of users in a batch. By default 64, or 256 on a GPU.
        exclude: for each user, item rows that must not be returned.
        allow: the only item rows that may be returned: one array for all users, or a sequence with one array
            for each user.
        targets: int (users,), an item row to score for each user, regardless of ``exclude`` and ``allow``.
        returning: for each user, where the prompt is kept between calls, or None. With it, more than
            ``window`` items may be used, see :mod:`peso.decoding.returning`.
        on_progress: called with the number of users done so far.
        on_candidates: for models with an item head, called after each batch with the numbers of its users,
            all their candidates, and their targets as the only candidates if there are targets.
        processes: the processes that share the batches. The batches are the same as for a single process, so
            the rounding does not differ; every process gets the whole result.

    Raises:
        BackboneError: the model's log-probabilities are not finite.
        ValueError: arguments have different lengths, ``beams`` or ``batch_size`` is less than 1, or targets
            are given but no items are allowed.
    """
    device = model.device.type
    if batch_size is None:
        batch_size = TOGETHER.get(device, TOGETHER_ELSEWHERE)
    if beams < 1 or batch_size < 1:
        raise ValueError(f"beams ({beams}) and batch_size ({batch_size}) must be at least 1")
    catalogue = _Catalogue.of(model.semantic_ids.trie, model.semantic_ids.codes, allow)
    own = None if allow is None or isinstance(allow, np.ndarray) else allow
    for name, lists in (("exclude", exclude), ("allow", own), ("targets", targets), ("returning", returning)):
        if lists is not None and len(lists) != len(histories):
            raise ValueError(f"{name} has {len(lists)} entries for {len(histories)} histories")

    leaves = np.full((len(histories), beams), -1, dtype=np.int64)
    scores = np.full((len(histories), beams), -np.inf, dtype=np.float32)
    of_targets = np.zeros((len(histories), model.semantic_ids.levels), np.float32)
    of_pool = np.zeros(len(histories), np.float32)
    wanted = None if targets is None else model.semantic_ids.trie.leaf_of[targets]
    if not len(histories):
        return Beams(leaves, scores, *(() if targets is None else (of_targets, of_pool)))
    if catalogue is None:
        if targets is not None:
            raise ValueError("targets cannot be scored if no items are allowed")
        return Beams(leaves, scores)

    window = model.layout.window
    prompts = [
        Prompt.cold(model, history[-window:]) if place is None else place.prompt(model, history)
        for history, place in zip(histories, returning or [None] * len(histories), strict=True)
    ]
    computed = np.zeros(len(prompts), dtype=bool)
    together = min(batch_size, max(1, BEAMS_AT_ONCE.get(device, BEAMS_AT_ONCE_ELSEWHERE) // beams))
    if model.has_item_head:
        most = SCORES_AT_ONCE.get(device, SCORES_AT_ONCE_ELSEWHERE)
        together = min(together, max(1, most // len(model.semantic_ids.item_ids)))
    with _ready(model), uneven_passes(model, processes):
        # a separate pass is worthwhile only if several users share it
        opening = Known.opening(model) if len(prompts) > 1 else Known.nothing()
        prompts = [each.after(opening) for each in prompts]
        order = np.argsort([each.todo for each in prompts], kind="stable")[::-1]
        for number, start in enumerate(range(0, len(order), together)):
            if not processes.takes(number):
                continue
            users = order[start : start + together]
            admitted = catalogue.filter(
                None if exclude is None else [exclude[u] for u in users],
                None if own is None else [own[u] for u in users],
            )
            found = _search_batch(
                model,
                catalogue,
                [prompts[u] for u in users],
                [histories[u] for u in users],
                beams,
                admitted,
                None if wanted is None else wanted[users],
            )
            width = found.leaves.shape[1]
            leaves[users, :width] = found.leaves.cpu().numpy()
            scores[users, :width] = found.scores.cpu().numpy()
            if found.targets is not None and found.target_scores is not None:
                of_targets[users] = found.targets.cpu().numpy()
                of_pool[users] = found.target_scores.cpu().numpy()
            if on_candidates is not None and found.candidates is not None:
                on_candidates(users, found.candidates, found.target_candidates)
            computed[users] = True
            if on_progress is not None:
                on_progress(min(start + together, len(order)))
    return Beams(
        processes.merge(leaves, computed),
        processes.merge(scores, computed),
        None if targets is None else processes.merge(of_targets, computed),
        None if targets is None else processes.merge(of_pool, computed),
    )


@contextmanager
def _ready(model: GenerativeModel) -> Iterator[None]:
    """A context in which the model is in evaluation mode and uses the attention that suits beams."""
    was_training = model.training
    if was_training:  # switching visits all modules, which would slow down a single request
        model.eval()
    try:
        with shared_keys(model.causal_lm):
            yield
    finally:
        if was_training:
            model.train()


def _search_batch(
    model: GenerativeModel,
    catalogue: _Catalogue,
    prompts: Sequence[Prompt],
    histories: Sequence[np.ndarray],
    beams: int,
    admitted: NodeFilter | None,
    targets: np.ndarray | None = None,
) -> _Found:
    """Search one batch of users.

    Args:
        catalogue: the trie to search.
        prompts: the prompt of each user.
        histories: int (n,) each, the users' item rows, oldest first.
        beams: the number of beams of each user.
        admitted: the nodes that each user may enter; None for all.
        targets: int (users,), the leaf of each user's target.
    """
    device, users = model.device, len(prompts)
    trie = TrieTensors.of(catalogue.trie, device)
    admitted = None if admitted is None else admitted.to(device)
    widths = [min(beams, nodes) for nodes in catalogue.trie.nodes]
    given = widths[-1] * model.has_item_head + (targets is not None)  # paths in addition to the beams
    room = sum(width + given for width in widths[:-1])
    prompted = run_prompts(model, prompts, room)
    lengths = torch.tensor([prompt.items for prompt in prompts], device=device)
    for user, prompt in enumerate(prompts):
        if prompt.kept:
            prompt.keep(prompted.states(user, prompt.kept))

    of_items = best = evidence = None
    followed = []  # int64 (users, n) leaves of the trie of all items whose paths are scored
    if model.has_item_head:
        of_items, share = leaf_log_probabilities(model, prompted.last), model.item_share(lengths)
        proposed = of_items
        if model.transitions is not None:
            evidence = Evidence.of(model.transitions, model.semantic_ids.trie, histories, device)
            proposed = without_codes(of_items, share, evidence)
        best = best_leaves(proposed, catalogue.full_leaves(device), widths[-1], admitted)
        followed.append(best.clamp_min(0))
    if targets is not None:
        followed.append(torch.from_numpy(targets).long().to(device).unsqueeze(1))
    paths = leaf_codes(model.semantic_ids, torch.cat(followed, dim=1)) if followed else None

    hidden = prompted.last.unsqueeze(1)  # (users, beams, width)
    seen = prompted.visible.unsqueeze(1)  # (users, beams, tokens in the cache)
    step = Selection.root(users, device)
    of_paths = []
    everyone = slice(0, users)
    for level, width in enumerate(widths):
        if level:
            prompted.cache.move(everyone, seen.shape[-1])
            codes, parents = step.codes, step.parents
            if paths is not None:  # after the beams; each path first continues the prompt, then itself
                codes = torch.cat([codes, paths[:, :, level - 1]], dim=1)
                last = torch.arange(seen.shape[1] - given, seen.shape[1], device=device)
                own = last if level > 1 else torch.zeros_like(last)
                parents = torch.cat([parents, own.expand(users, -1)], dim=1)
            seen = _extend(seen, parents)
            ids = model.vocabulary.first_id + model.vocabulary.offsets[level - 1] + codes
            positions = (prompted.lengths + level - 1).unsqueeze(1).expand_as(ids)
            hidden = model.hidden(ids, seen.unsqueeze(1), positions, prompted.cache)
        log_probabilities = level_log_probabilities(model, hidden, level)
        if paths is not None:
            theirs = log_probabilities[:, -given:] if level else log_probabilities.expand(-1, given, -1)
            of_paths.append(theirs.gather(2, paths[:, :, level : level + 1]).squeeze(2))
            log_probabilities = log_probabilities[:, : step.nodes.shape[1]]
        step = select(trie, level, step, log_probabilities, width, admitted)
    nodes, scores = step.ranked()
    leaves = catalogue.leaves(nodes)
    by_level = torch.stack(of_paths, dim=-1) if of_paths else None  # (users, given, levels)
    candidates = None
    if of_items is not None and best is not None and by_level is not None:
        generated = torch.cat([scores, by_level[:, : best.shape[1]].sum(-1)], dim=1)
        candidates = Candidates.of(torch.cat([leaves, best], dim=1), generated, of_items, evidence)
        leaves, scores = candidates.best(share, widths[-1])
    if not bool(scores[leaves >= 0].isfinite().all()):
        raise BackboneError(
            "the model's log-probabilities are not finite: a weight is damaged, or the precision is too low; "
            "train the stage again, or use training.precision: float32"
        )
    target_levels = target_scores = target_candidates = None
    if targets is not None and by_level is not None:
        target_levels, target_scores = by_level[:, -1], by_level[:, -1].sum(-1)
        if of_items is not None:
            target_candidates = Candidates.of(followed[-1], target_scores.unsqueeze(1), of_items, evidence)
            target_scores = target_candidates.scores(share).squeeze(1)
    return _Found(leaves, scores, target_levels, target_scores, candidates, target_candidates)


@dataclass(frozen=True)
class _Found:
    """The result for one batch, like :class:`Beams`, on the device. With an item head, it also has all
    candidates, and the targets as candidates."""

    leaves: Tensor
    scores: Tensor
    targets: Tensor | None
    target_scores: Tensor | None
    candidates: Candidates | None
    target_candidates: Candidates | None


def _extend(seen: Tensor, parents: Tensor) -> Tensor:
    """bool (users, beams, tokens + beams): new beams see what their parents see, and themselves."""
    ancestors = seen.gather(1, parents.unsqueeze(-1).expand(-1, -1, seen.shape[-1]))
    itself = torch.eye(parents.shape[1], dtype=torch.bool, device=seen.device)
    return torch.cat([ancestors, itself.expand(len(seen), -1, -1)], dim=-1)


@dataclass(frozen=True)
class _Catalogue:
    """The trie that is searched: that of all items, or of those that are allowed for all users."""

    trie: ItemTrie
    rows: np.ndarray | None  # int64, sorted: the item rows of a restricted catalog; None for all
    leaf_of: np.ndarray  # int32: the leaf of each item row in the trie of all items

    @classmethod
    def of(
        cls, full: ItemTrie, codes: np.ndarray, allow: np.ndarray | Sequence[np.ndarray] | None
    ) -> _Catalogue | None:
        """Build the trie to search; None if no items are allowed."""
        if not isinstance(allow, np.ndarray):
            return cls(full, None, full.leaf_of)
        rows = np.unique(allow)
        # rows stay sorted, so items that share an ID have the same order in the restricted trie
        return cls(ItemTrie.build(codes[rows]), rows, full.leaf_of) if len(rows) else None

    def full_leaves(self, device: torch.device) -> Tensor:
        """int64 (leaves,): the leaf of the trie of all items for each leaf of this trie."""
        first_items = self.trie.items[self.trie.item_starts[:-1]]
        rows = first_items if self.rows is None else self.rows[first_items]
        return torch.from_numpy(self.leaf_of[rows].astype(np.int64)).to(device)

    def leaves(self, found: Tensor) -> Tensor:
        """Convert leaves of this trie to leaves of the trie of all items, leaving -1 unchanged."""
        if self.rows is None:
            return found
        return torch.where(found < 0, -1, self.full_leaves(found.device)[found.clamp_min(0)])

    def filter(self, exclude: list[np.ndarray] | None, allow: list[np.ndarray] | None) -> NodeFilter | None:
        """The nodes that each user of a batch may enter; None if there is no restriction."""
        if allow is not None:
            if exclude is not None:
                allow = [np.setdiff1d(a, e) for a, e in zip(allow, exclude, strict=True)]
            return NodeFilter.only(self.trie, allow)
        if exclude is None:
            return None
        if self.rows is not None:
            exclude = [_places(rows, self.rows) for rows in exclude]
        return NodeFilter.without(self.trie, exclude)


def _places(rows: np.ndarray, among: np.ndarray) -> np.ndarray:
    """The positions in a sorted array of those rows that occur in it."""
    place = np.searchsorted(among, rows)
    place, rows = place[place < len(among)], rows[place < len(among)]
    return place[among[place] == rows]
