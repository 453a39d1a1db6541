"""Log-probabilities of the codes of one level, normalised as the model was trained.

Knows hidden states and the head; knows nothing of the trie, beams or users.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peso.model.generative import GenerativeModel

# Logits over the words that exist at once: 64 MB, what a CPU's cache still helps with; 512 MB.
HEAD_VALUES = {"cpu": 2**24}
HEAD_VALUES_ELSEWHERE = 2**27


def level_log_probabilities(model: GenerativeModel, hidden: Tensor, level: int) -> Tensor:
    """hidden (…, width) → float32 (…, codes of the level).

    The codes a valid item can continue with are a part of what is normalised over: ``level`` all codes of
    the level, ``semantic`` all semantic tokens, ``full`` these and all words. Only the sum over the words is
    kept, a slice of rows at a time, never the logits.
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
    """log Σ exp of the logits of all words, (…, width) → (…)."""
    values = HEAD_VALUES.get(hidden.device.type, HEAD_VALUES_ELSEWHERE)
    rows = max(1, values // model.vocabulary.first_id)
    slices = hidden.flatten(0, -2).split(rows)
    return torch.cat([model.word_logits(part).logsumexp(-1) for part in slices]).view(hidden.shape[:-1])
