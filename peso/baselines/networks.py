"""The networks of the two-tower model and of SASRec. Their options are elsewhere, without PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn


class Towers(nn.Module):
    """The network of :mod:`peso.baselines.two_tower`. Row 0 of the users is zero, for users without a row of
    their own. Row ``items`` of the items is padding."""

    def __init__(self, users: int, items: int, width: int, dropout: float) -> None:
        super().__init__()
        self.user = nn.Embedding(users + 1, width, padding_idx=0)
        self.history = nn.Embedding(items + 1, width, padding_idx=items)
        self.answer = nn.Embedding(items, width)
        self.bias = nn.Parameter(torch.zeros(items))
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.user.weight)
        for table in (self.history, self.answer):
            nn.init.normal_(table.weight, std=width**-0.5)
        with torch.no_grad():
            self.history.weight[items] = 0

    def forward(self, users: Tensor, histories: Tensor) -> Tensor:
        """The log-probability of every item, given user rows (n,) and padded histories (n, window):
        (n, items)."""
        lengths = (histories != self.history.num_embeddings - 1).sum(1, keepdim=True).clamp(min=1)
        mean = self.history(histories).sum(1) / lengths  # (n, width)
        user = self.dropout(self.user(users) + mean)
        return torch.addmm(self.bias, user, self.answer.weight.T).log_softmax(-1)


class CausalItems(nn.Module):
    """The Transformer of :mod:`peso.baselines.sasrec`. Row ``items`` of the items is padding. It comes after
    all items of a history, so the causal mask hides it.

    Item embeddings are multiplied by √width where they are read, as in SASRec and other Transformers that
    read and score with one table (Vaswani et al. 2017, section 3.4). Without it, what the layers add exceeds
    the embeddings at first, and the scores remain those of popularity for many epochs.
    """

    def __init__(self, items: int, window: int, width: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.item = nn.Embedding(items + 1, width, padding_idx=items)
        self.place = nn.Embedding(window, width)
        self.dropout = nn.Dropout(dropout)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.bias = nn.Parameter(torch.zeros(items))
        for table in (self.item, self.place):
            nn.init.normal_(table.weight, std=width**-0.5)
        with torch.no_grad():
            self.item.weight[items] = 0

    def forward(self, items: Tensor) -> Tensor:
        """The states after each item: item rows (n, length) → (n, length, width)."""
        length = items.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=items.device)
        states = self.dropout(self.item.embedding_dim**0.5 * self.item(items) + self.place.weight[:length])
        return self.layers(states, mask=mask, is_causal=True)

    def log_probabilities(self, states: Tensor) -> Tensor:
        """The log-probability of every item as the next one: states (n, width) → (n, items)."""
        return torch.addmm(self.bias, states, self.item.weight[:-1].T).log_softmax(-1)

    def sampled_log_probabilities(
        self, states: Tensor, targets: Tensor, proposal: Tensor, count: int
    ) -> Tensor:
        """The log-probability of each target by a sampled softmax.

        The softmax is over the target and ``count`` sampled items, whose scores are corrected by
        -log(count · p) (logQ; Bengio and Senécal 2008). It approaches the exact softmax as ``count`` grows.

        Args:
            states: (n, width), the states that predict the targets.
            targets: int64 (n,), the item row of each target.
            proposal: (items,), the sampling probabilities p.
            count: the number of samples, which all rows share.

        Returns:
            (n,).
        """
        drawn = torch.multinomial(proposal, count, replacement=True)
        own = (states * self.item.weight[targets]).sum(-1) + self.bias[targets]
        others = torch.addmm(self.bias[drawn], states, self.item.weight[drawn].T)  # (n, count)
        others = others - (count * proposal[drawn]).log()
        others = others.masked_fill(drawn == targets[:, None], -torch.inf)  # counted as the target
        return own - torch.cat([own[:, None], others], dim=-1).logsumexp(-1)


def seeded(seed: Sequence[int], make: Callable[[], nn.Module]) -> nn.Module:
    """Create a module whose initial weights depend only on ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(np.random.default_rng(list(seed)).integers(2**31)))
        return make()
