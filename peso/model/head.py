"""Log-probabilities at target positions, under each loss vocabulary.

Knows hidden states and token ids; knows nothing of batches, users or search.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from peso.model.generative import GenerativeModel

MASKED = -1e4  # of a token that does not compete: finite, so that 0 · it is 0


def log_probabilities(
    model: GenerativeModel, hidden: Tensor, target_ids: Tensor, temperature: float = 1.0
) -> Tensor:
    """Log-probabilities of all tokens that compete with each target token under ``loss_vocabulary``.

    Args:
        hidden: (n, width), the state that predicts each token.
        target_ids: int64 (n,): under ``level`` they say which level's codes compete; the other levels'
            tokens get ``MASKED``.

    Returns:
        float32 (n, tokens): under ``full`` all words and semantic tokens, else the semantic tokens.
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
    """Log-probability of each target token under the model's ``loss_vocabulary``.

    ``full``: softmax over all words and semantic tokens (the paper's). ``semantic``: over the semantic
    tokens. ``level``: over the codes of the target's own level. The end token of a layout is a word: it
    counts under ``full`` only, elsewhere its log-probability is 0 (it is certain after the last level).

    Args:
        hidden: (n, width), the state that predicts each token.
        target_ids: int64 (n,) ids in the model's id space.
        temperature: logits are divided by it.

    Returns:
        float32 (n,).
    """
    vocabulary = model.vocabulary
    number = target_ids - vocabulary.first_id  # (n,) row of the vocabulary; negative for words
    if model.loss_vocabulary == "full":
        logits = torch.cat([model.word_logits(hidden), model.semantic_logits(hidden)], dim=-1) / temperature
        return logits.gather(-1, target_ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
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
        logits = model.semantic_logits(hidden[rows], level) / temperature
        picked = logits.gather(-1, (number[rows] - start).unsqueeze(-1)).squeeze(-1)
        result = result.index_put((rows,), picked - logits.logsumexp(-1))
    return result
