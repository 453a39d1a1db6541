"""Trie-constrained beam search over item numbers.

The prompt of a user is computed once. Beams are extra positions after it, each of which sees the prompt, its
own ancestors and itself, so nothing is copied or reordered when a beam splits or ends. An item is complete
with its last code, so there is no end token and no step after the last code. If targets are given, the path
of each is one more beam that no other sees, which scores it without a second prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from peso.decoding.filters import NodeFilter
from peso.decoding.prompt import Opening, run_prompts
from peso.decoding.trie_step import Selection, TrieTensors, select
from peso.errors import BackboneError
from peso.items.semantic_ids import ItemTrie
from peso.model.generative import GenerativeModel
from peso.model.head import level_log_probabilities
from peso.model.shared_keys import shared_keys
from peso.runtime.processes import ALONE, Processes

# Users computed together, where nobody says how many: a GPU waits for its host until there are hundreds.
TOGETHER = {"cpu": 64}
TOGETHER_ELSEWHERE = 256
# Beams over all users of a batch: bounds the memory of searches with hundreds of beams.
BEAMS_AT_ONCE = {"cpu": 4096}
BEAMS_AT_ONCE_ELSEWHERE = 16384


@dataclass(frozen=True)
class Beams:
    """The best semantic IDs of each user, best first.

    leaves: int64 (users, beams), leaves of the catalog's trie, -1 where fewer exist.
    scores: float32 (users, beams), log-probability of the codes under the model's ``loss_vocabulary``; -inf
        where there is no leaf.
    targets: float32 (users, levels), ln p(c_l | history, c_1 … c_{l-1}) of each code of each user's target,
        normalized alike; None where no targets were given.
    """

    leaves: np.ndarray
    scores: np.ndarray
    targets: np.ndarray | None = None


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
    on_progress: Callable[[int], None] | None = None,
    processes: Processes = ALONE,
) -> Beams:
    """The ``beams`` best semantic IDs that may follow each history.

    Equal to Transformers' constrained beam search on the same model (docs/explanation/decoding.md). Users
    are computed together in the order of their prompts' lengths, which changes no result but the rounding.

    Args:
        histories: int item rows of each user, oldest first (may be none); the last ``window`` are read.
        beams: how many partial IDs of a user survive each level.
        batch_size: how many users are computed together, at most. None: 64, on a GPU 256.
        exclude: per user item rows that may not come back.
        allow: item rows that alone may come back: one array for all users, or a sequence of one per user.
        targets: int (users,), the item row of each user that is scored beside, whatever the search finds or
            may find.
        on_progress: called with the number of users done so far.
        processes: each computes its share of the batches, which are those of a single process, so that not
            even the rounding differs; every one gets the result of all.

    Raises:
        BackboneError: the model's log-probabilities are not numbers.
        ValueError: arguments of different length, no beams, or targets and nothing that may be found.
    """
    device = model.device.type
    if batch_size is None:
        batch_size = TOGETHER.get(device, TOGETHER_ELSEWHERE)
    if beams < 1 or batch_size < 1:
        raise ValueError(f"beams ({beams}) and batch_size ({batch_size}) must be at least 1")
    catalogue = _Catalogue.of(model.semantic_ids.trie, model.semantic_ids.codes, allow)
    own = None if allow is None or isinstance(allow, np.ndarray) else allow
    for name, lists in (("exclude", exclude), ("allow", own), ("targets", targets)):
        if lists is not None and len(lists) != len(histories):
            raise ValueError(f"{name} has {len(lists)} entries for {len(histories)} histories")

    leaves = np.full((len(histories), beams), -1, dtype=np.int64)
    scores = np.full((len(histories), beams), -np.inf, dtype=np.float32)
    of_targets = None if targets is None else np.zeros((len(targets), model.semantic_ids.levels), np.float32)
    paths = None if targets is None else model.semantic_ids.codes[targets]
    if not len(histories):
        return Beams(leaves, scores, of_targets)
    if catalogue is None:
        if targets is not None:
            raise ValueError("targets cannot be scored beside a search of nothing")
        return Beams(leaves, scores)

    window = model.layout.window
    prompts = [
        model.layout.prompt(model.item_token_ids(np.asarray(history[-window:], dtype=np.int64)))
        for history in histories
    ]
    computed = np.zeros(len(prompts), dtype=bool)
    order = np.argsort([len(prompt) for prompt in prompts], kind="stable")[::-1]
    together = min(batch_size, max(1, BEAMS_AT_ONCE.get(device, BEAMS_AT_ONCE_ELSEWHERE) // beams))
    with _ready(model):
        # a pass of its own pays only where several users share it
        opening = Opening.of(model) if len(prompts) > 1 else Opening(0, [])
        for number, start in enumerate(range(0, len(order), together)):
            if not processes.takes(number):
                continue
            users = order[start : start + together]
            admitted = catalogue.filter(
                None if exclude is None else [exclude[u] for u in users],
                None if own is None else [own[u] for u in users],
            )
            batch = [prompts[u] for u in users]
            found = _search_batch(
                model,
                catalogue.trie,
                batch,
                opening,
                beams,
                admitted,
                None if paths is None else paths[users],
            )
            width = found.leaves.shape[1]
            leaves[users, :width] = catalogue.leaves(found.leaves)
            scores[users, :width] = found.scores
            if of_targets is not None:
                of_targets[users] = found.targets
            computed[users] = True
            if on_progress is not None:
                on_progress(min(start + together, len(order)))
    return Beams(
        processes.merge(leaves, computed),
        processes.merge(scores, computed),
        None if of_targets is None else processes.merge(of_targets, computed),
    )


@contextmanager
def _ready(model: GenerativeModel) -> Iterator[None]:
    """Without dropout and with the attention that suits beams; afterwards as it was."""
    was_training = model.training
    if was_training:  # switching walks through all modules, which a single request would feel
        model.eval()
    try:
        with shared_keys(model.causal_lm):
            yield
    finally:
        if was_training:
            model.train()


def _search_batch(
    model: GenerativeModel,
    catalogue: ItemTrie,
    prompts: Sequence[np.ndarray],
    opening: Opening,
    beams: int,
    admitted: NodeFilter | None,
    paths: np.ndarray | None = None,
) -> Beams:
    """``paths``: int (users, levels), the codes of each user's target."""
    device, users = model.device, len(prompts)
    path = None if paths is None else torch.from_numpy(paths).long().to(device)
    trie = TrieTensors.of(catalogue, device)
    admitted = None if admitted is None else admitted.to(device)
    widths = [min(beams, nodes) for nodes in catalogue.nodes]
    beside = 0 if path is None else 1
    room = sum(width + beside for width in widths[:-1])
    prompted = run_prompts(model, prompts, opening, room)

    hidden = prompted.last.unsqueeze(1)  # (users, beams, width)
    seen = prompted.visible.unsqueeze(1)  # (users, beams, tokens in the cache)
    step = Selection.root(users, device)
    of_path = []
    everyone = slice(0, users)
    for level, width in enumerate(widths):
        if level:
            prompted.cache.move(everyone, seen.shape[-1])
            codes, parents = step.codes, step.parents
            if path is not None:  # behind the beams, continuing the last of those before
                codes = torch.cat([codes, path[:, level - 1 : level]], dim=1)
                parents = F.pad(parents, (0, 1), value=seen.shape[1] - 1)
            seen = _extend(seen, parents)
            ids = model.vocabulary.first_id + model.vocabulary.offsets[level - 1] + codes
            positions = (prompted.lengths + level - 1).unsqueeze(1).expand_as(ids)
            hidden = model.hidden(ids, seen.unsqueeze(1), positions, prompted.cache)
        log_probabilities = level_log_probabilities(model, hidden, level)
        if path is not None:
            of_path.append(log_probabilities[:, -1].gather(1, path[:, level : level + 1]))
            log_probabilities = log_probabilities[:, : step.nodes.shape[1]]
        step = select(trie, level, step, log_probabilities, width, admitted)
    nodes, scores = step.ranked()
    targets = torch.cat(of_path, dim=1).cpu().numpy() if of_path else None
    result = Beams(nodes.cpu().numpy(), scores.cpu().numpy(), targets)
    if not np.isfinite(result.scores[result.leaves >= 0]).all():
        raise BackboneError(
            "the model's log-probabilities are not finite: its weights or precision are broken"
        )
    return result


def _extend(seen: Tensor, parents: Tensor) -> Tensor:
    """What new beams see: what their parents saw, and themselves. bool (users, beams, tokens + beams)."""
    ancestors = seen.gather(1, parents.unsqueeze(-1).expand(-1, -1, seen.shape[-1]))
    itself = torch.eye(parents.shape[1], dtype=torch.bool, device=seen.device)
    return torch.cat([ancestors, itself.expand(len(seen), -1, -1)], dim=-1)


@dataclass(frozen=True)
class _Catalogue:
    """The trie that is searched: all items, or those that all users are confined to."""

    trie: ItemTrie
    rows: np.ndarray | None  # int64, sorted: item rows of a confined catalog; None for all
    leaf_of: np.ndarray  # int32: leaf of each item row in the trie of all items

    @classmethod
    def of(
        cls, full: ItemTrie, codes: np.ndarray, allow: np.ndarray | Sequence[np.ndarray] | None
    ) -> _Catalogue | None:
        """None where all users are confined to nothing."""
        if not isinstance(allow, np.ndarray):
            return cls(full, None, full.leaf_of)
        rows = np.unique(allow)
        # rows stay sorted, so the rule for shared IDs holds in the confined trie too
        return cls(ItemTrie.build(codes[rows]), rows, full.leaf_of) if len(rows) else None

    def leaves(self, found: np.ndarray) -> np.ndarray:
        """Leaves of this trie as leaves of the trie of all items, -1 kept."""
        if self.rows is None:
            return found
        first_items = self.trie.items[self.trie.item_starts[np.maximum(found, 0)]]
        return np.where(found < 0, -1, self.leaf_of[self.rows[first_items]])

    def filter(self, exclude: list[np.ndarray] | None, allow: list[np.ndarray] | None) -> NodeFilter | None:
        """What each user of a batch may enter."""
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
    """Where in a sorted array those of these rows stand that occur in it."""
    place = np.searchsorted(among, rows)
    place, rows = place[place < len(among)], rows[place < len(among)]
    return place[among[place] == rows]
