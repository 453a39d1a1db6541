"""Log-probabilities at target positions, under each loss vocabulary."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from peso.model.generative import GenerativeModel
from peso.model.normalized import normalized

MASKED = -1e4  # the logit of a token that does not compete; finite, so that 0 · MASKED is 0


def log_probabilities(
    model: GenerativeModel, hidden: Tensor, target_ids: Tensor, temperature: float = 1.0
) -> Tensor:
    """The log-probabilities of all tokens that compete with each target token under ``loss_vocabulary``.

    Args:
        hidden: (n, width), the state that predicts each token.
        target_ids: int64 (n,), the target tokens. With ``level`` they determine the level whose codes
            compete; tokens of other levels get ``MASKED``.
        temperature: the logits are divided by it.

    Returns:
        float32 (n, tokens): all words and semantic tokens with ``full``, otherwise the semantic tokens.
    """
    logits = model.semantic_logits(hidden)
    if model.loss_vocabulary == "full":
        logits = torch.cat([model.word_logits(hidden), logits], dim=-1)
    elif model.loss_vocabulary == "level":
        offsets = model.vocabulary.offsets.to(hidden.device)
        tokens = torch.arange(logits.shape[-1], device=hidden.device)
        level_of = torch.bucketize(tokens, offsets, right=True)
        targets = level_of[(target_ids - model.vocabulary.first_id).clamp_min(0)]
        logits = logits.masked_fill(level_of != targets.unsqueeze(-1), MASKED)
    return (logits / temperature).log_softmax(-1)


def token_log_probabilities(
    model: GenerativeModel, hidden: Tensor, target_ids: Tensor, temperature: float = 1.0
) -> Tensor:
    """The log-probability of each target token under the model's ``loss_vocabulary``.

    The softmax is over all words and semantic tokens with ``full`` (as in the paper), over the semantic
    tokens with ``semantic``, and over the codes of the target's level with ``level``. The end token of a
    layout is a word. It counts only with ``full``; otherwise its log-probability is 0, because it is certain
    after the last level.

    Args:
        hidden: (n, width), the state that predicts each token.
        target_ids: int64 (n,), the target tokens.
        temperature: the logits are divided by it.

    Returns:
        float32 (n,).
    """
    vocabulary = model.vocabulary
    number = target_ids - vocabulary.first_id  # (n,) row of the vocabulary; negative for words
    if model.loss_vocabulary == "full":
        return normalized(temperature, target_ids, model.word_logits(hidden), model.semantic_logits(hidden))
    result = torch.zeros(len(target_ids), dtype=torch.float32, device=hidden.device)
    groups: list[tuple[Tensor, int | None, int]]
    if model.loss_vocabulary == "semantic":
        groups = [(number >= 0, None, 0)]
    else:
        starts = [*vocabulary.offsets.tolist(), len(vocabulary)]
        groups = [
            ((number >= start) & (number < stop), level, start)
            for level, (start, stop) in enumerate(pairwise(starts))
        ]
    for chosen, level, start in groups:
        rows = chosen.nonzero().squeeze(-1)
        logits = model.semantic_logits(hidden[rows], level)
        result = result.index_put((rows,), normalized(temperature, number[rows] - start, logits))
    return result


# The number of logits of words to compute at once: 64 MB on a CPU, where the cache helps; otherwise 512 MB.
HEAD_VALUES = {"cpu": 2**24}
HEAD_VALUES_ELSEWHERE = 2**27


def level_log_probabilities(model: GenerativeModel, hidden: Tensor, level: int) -> Tensor:
    """The log-probabilities of a level's codes: hidden states (…, width) → float32 (…, codes of the level).

    The softmax is over all codes of the level with ``level``, over all semantic tokens with ``semantic``, and
    over these and all words with ``full``. The logits of the words are computed a few rows at a time, and
    only their sum is kept.
    """
    if model.loss_vocabulary == "level":
        return model.semantic_logits(hidden, level).log_softmax(-1)
    logits = model.semantic_logits(hidden)
    total = logits.logsumexp(-1)
    if model.loss_vocabulary == "full":
        total = torch.logaddexp(total, _words_total(model, hidden))
    start = int(model.vocabulary.offsets[level])
    return logits[..., start : start + model.vocabulary.sizes[level]] - total.unsqueeze(-1)


def _words_total(model: GenerativeModel, hidden: Tensor) -> Tensor:
    """log Σ exp of the logits of all words: hidden states (…, width) → (…)."""
    values = HEAD_VALUES.get(hidden.device.type, HEAD_VALUES_ELSEWHERE)
    rows = max(1, values // model.vocabulary.first_id)
    slices = hidden.flatten(0, -2).split(rows)
    return torch.cat([model.word_logits(part).logsumexp(-1) for part in slices]).view(hidden.shape[:-1])
