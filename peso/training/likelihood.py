"""The validation loss, and the log-probabilities of target items."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from peso.events.histories import Cases
from peso.items.semantic_ids import ItemTrie
from peso.model.generative import GenerativeModel
from peso.model.head import token_log_probabilities
from peso.model.sharding import uneven_passes
from peso.runtime.processes import ALONE, Processes
from peso.training.batches import Packed, Piece, lay_out, pack

SCORING_ROW_TOKENS = 512
SCORING_PASS_TOKENS = 4096  # without gradients, passes can be larger than in training


def predicts_end(model: GenerativeModel) -> bool:
    """Whether the layout's end token is a target. This is so with the loss vocabulary ``full``; otherwise its
    probability is 1."""
    return model.loss_vocabulary == "full"


def tokens_of_target(model: GenerativeModel) -> int:
    """The number of target tokens per target: one per level, and those of the layout's end if it is a
    target."""
    return model.semantic_ids.levels + (len(model.layout.end) if predicts_end(model) else 0)


def target_states(model: GenerativeModel, packed: Packed) -> Tensor:
    """The hidden state that predicts each target token of packed rows: (target tokens, width)."""
    hidden = model.hidden(packed.ids, packed.visible, packed.positions)
    # index_select, because several targets may share a state (that of the root), and its backward pass adds
    # their gradients in a fixed order, unlike that of indexing
    return hidden.flatten(0, 1).index_select(0, packed.states)


def target_token_log_probabilities(
    model: GenerativeModel, packed: Packed, temperature: float = 1.0
) -> Tensor:
    """The log-probability of each target token of packed rows: float32 (target tokens,)."""
    return token_log_probabilities(model, target_states(model, packed), packed.targets, temperature)


def item_log_probabilities(model: GenerativeModel, packed: Packed, states: Tensor) -> Tensor:
    """The log-probability of each target of packed rows under the model's item head.

    It is computed from the state that predicts the target's first code.

    Args:
        model: a model with an item head.
        packed: the rows, whose pieces must have item rows.
        states: (target tokens, width), see :func:`target_states`.

    Returns:
        float32 (targets,).
    """
    assert model.vocabulary.item_head is not None
    first = states.unflatten(0, (len(packed.items), -1))[:, 0]
    return model.vocabulary.item_head.log_probabilities(first, packed.items)


@torch.no_grad()
def validation_loss(
    model: GenerativeModel,
    cases: Cases,
    temperature: float = 1.0,
    processes: Processes = ALONE,
    item_weight: float = 0.0,
) -> float:
    """The training loss over all cases, in nats per target token.

    It is the negative sum of the target tokens' log-probabilities, and of ``item_weight`` times those of the
    items under the item head, divided by the number of target tokens.

    Args:
        model: the model, in evaluation mode.
        cases: the cases, at least one.
        temperature: the logits are divided by it.
        processes: the processes that share the passes. Each gets the loss over all cases.
        item_weight: the weight of the item head; 0 for a model without one.
    """
    total, tokens = 0.0, 0.0
    ends = predicts_end(model)
    for _, packed in _passes(model, cases, SCORING_PASS_TOKENS, processes, predict_end=ends):
        states = target_states(model, packed)
        scores = token_log_probabilities(model, states, packed.targets, temperature)
        total -= float(scores.double().sum())
        if item_weight:
            total -= item_weight * float(item_log_probabilities(model, packed, states).double().sum())
        tokens += len(scores)
    total, tokens = processes.sum_numbers(total, tokens)
    return total / tokens


@torch.no_grad()
def target_log_probabilities(
    model: GenerativeModel,
    cases: Cases,
    batch_tokens: int = SCORING_PASS_TOKENS,
    on_progress: Callable[[int], None] | None = None,
    processes: Processes = ALONE,
) -> np.ndarray:
    """The log-probability of each case's target: :func:`target_level_log_probabilities` summed over the
    levels.

    Args:
        model, cases, batch_tokens, on_progress, processes: see :func:`target_level_log_probabilities`.

    Returns:
        float32 (cases,).
    """
    return target_level_log_probabilities(model, cases, batch_tokens, on_progress, processes).sum(axis=-1)


@torch.no_grad()
def target_level_log_probabilities(
    model: GenerativeModel,
    cases: Cases,
    batch_tokens: int = SCORING_PASS_TOKENS,
    on_progress: Callable[[int], None] | None = None,
    processes: Processes = ALONE,
) -> np.ndarray:
    """ln p(c_l | history, c_1 … c_{l-1}) of each code c_l of each case's target, without the end token.

    Probabilities are at temperature 1, and normalized over the tokens of the model's ``loss_vocabulary``.

    Args:
        batch_tokens: the number of tokens per forward pass.
        on_progress: called with the number of cases done so far.
        processes: the processes that share the passes. Each gets the whole result.

    Returns:
        float32 (cases, levels).
    """

    def score(packed: Packed) -> Tensor:
        return target_token_log_probabilities(model, packed)

    return _per_level(model, cases, batch_tokens, on_progress, score, processes)


@torch.no_grad()
def trie_log_likelihood(
    model: GenerativeModel,
    cases: Cases,
    batch_tokens: int = SCORING_PASS_TOKENS,
    on_progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """The log-probability of each case's target among the items of the catalog.

    At every level, the softmax is only over the codes that continue the target's path to some item, at
    temperature 1. So models that were trained with different ``loss_vocabulary`` are comparable.

    Args:
        model, cases, batch_tokens, on_progress: see :func:`target_level_log_probabilities`.

    Returns:
        float32 (cases,).
    """
    trie, levels = model.semantic_ids.trie, model.semantic_ids.levels
    sizes = model.vocabulary.sizes

    def score(packed: Packed) -> Tensor:
        states = target_states(model, packed).unflatten(0, (-1, levels))  # (n, levels, width)
        numbers = (packed.targets - model.vocabulary.first_id).view(-1, levels)
        codes = numbers - model.vocabulary.offsets  # (n, levels)
        steps = []
        for level, allowed in enumerate(_continuations(trie, codes.cpu().numpy(), sizes)):
            logits = model.semantic_logits(states[:, level], level)
            logits = logits.masked_fill(~torch.from_numpy(allowed).to(logits.device), -torch.inf)
            steps.append(logits.log_softmax(-1).gather(-1, codes[:, level : level + 1]))
        return torch.cat(steps, dim=-1).flatten()

    return _per_level(model, cases, batch_tokens, on_progress, score).sum(axis=-1)


def _continuations(trie: ItemTrie, codes: np.ndarray, sizes: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Which codes continue each path to some item: for each level, bool (n, codes of the level).

    Args:
        codes: int (n, levels), semantic IDs of existing items.
        sizes: the number of codes of each level.
    """
    node = np.zeros(len(codes), dtype=np.int64)  # the root
    for level, size in enumerate(sizes):
        begin, stop = trie.starts[level][node], trie.starts[level][node + 1]
        counts = stop - begin
        path = np.repeat(np.arange(len(codes)), counts)
        first = np.repeat(np.cumsum(counts) - counts, counts)
        child = np.arange(len(path)) - first + np.repeat(begin, counts)
        allowed = np.zeros((len(codes), size), dtype=bool)
        allowed[path, trie.codes[level][child]] = True
        yield allowed
        node = child[trie.codes[level][child] == codes[path, level]]  # exactly one child per path


def _per_level(
    model: GenerativeModel,
    cases: Cases,
    batch_tokens: int,
    on_progress: Callable[[int], None] | None,
    score: Callable[[Packed], Tensor],
    processes: Processes = ALONE,
) -> np.ndarray:
    """The ``score`` of every target token, in the order of the cases: float32 (cases, levels)."""
    levels = model.semantic_ids.levels
    result, own = np.zeros((len(cases), levels), dtype=np.float32), np.zeros(len(cases), dtype=bool)
    done = 0
    for rows, packed in _passes(model, cases, batch_tokens, processes, predict_end=False):
        # (tokens of the pass,) → (cases, levels); the tokens of one case are adjacent and in order
        found = score(packed).float().view(-1, levels)
        scored = rows[packed.owners[::levels].cpu().numpy()]
        result[scored], own[scored] = found.cpu().numpy(), True
        done += len(found)
        if on_progress is not None:
            on_progress(min(done * processes.count, len(cases)))  # assumes the other processes are as fast
    return processes.merge(result, own)


def _passes(
    model: GenerativeModel, cases: Cases, pass_tokens: int, processes: Processes, *, predict_end: bool
) -> Iterator[tuple[np.ndarray, Packed]]:
    """Forward passes of about ``pass_tokens`` tokens: for each, the indices of its cases, and their tokens.

    The cases of a pass have similar lengths. Processes take turns with groups of cases, so the contents of a
    pass do not depend on the number of processes.
    """
    with uneven_passes(model, processes):
        yield from _own_passes(model, cases, pass_tokens, processes, predict_end=predict_end)


def _own_passes(
    model: GenerativeModel, cases: Cases, pass_tokens: int, processes: Processes, *, predict_end: bool
) -> Iterator[tuple[np.ndarray, Packed]]:
    """The passes of this process, see :func:`_passes`."""
    layout = model.layout
    groups = 0
    by_length = np.argsort([-len(history) for history in cases.histories], kind="stable")
    rows: list[int] = []
    pieces: list[Piece] = []
    for place, row in enumerate(by_length.tolist(), 1):
        history = cases.histories[row][-layout.window :]
        numbers = np.append(history, cases.targets[row])
        items = model.item_token_ids(numbers)
        rows.append(row)
        pieces.append(lay_out(layout, items, len(history), predict_end=predict_end, rows=numbers))
        if sum(map(len, pieces)) >= pass_tokens or place == len(cases):
            if processes.takes(groups):
                for packed in pack(pieces, layout.prefix, SCORING_ROW_TOKENS, pass_tokens):
                    yield np.array(rows), packed.to(model.device)
            rows, pieces = [], []
            groups += 1
