"""The item head: every item has a vector, and the hidden state after a history scores all items at once."""

from __future__ import annotations

from copy import copy

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peso.items.semantic_ids import SemanticIds
from peso.model.normalized import normalized

OF_ITEMS = ("rows", "bias", "arrival_bias")  # the stored tensors with an entry for each item
EXACT = 100_000  # up to this number of items, the softmax is over all of them
NEGATIVES = 8192  # with more items, the number of negatives for each training pass
SCORES_AT_ONCE = 2**26  # in evaluation mode; 256 MiB
# Groups of history lengths, by their upper limits; the last group has no limit. Each group has its own share
# of the head in the mixture with the codes.
LENGTHS = (2, 5, 10)


class ItemHead(nn.Module):
    """Scores items, given the state h that predicts an item's first code:

        score_i(h) = ⟨Q · h / rms(h), e_i⟩ + b_i,
        e_i = r_i + Σ_l u(c_l) + P · x_i,   b_i = β_i + Σ_l γ(c_l)

    Each item has its own row r_i and bias β_i, and shares the rows u and biases γ of the codes c_l of its
    semantic ID, and with ``contents`` a projection P of its content vector x_i, which says more than the
    codes. The items' own rows are initially zero, so an item without events is scored by its codes and
    contents alone. The combination of dense vectors with generated IDs is from LIGER (arXiv 2411.18814).

    Rows and biases are in the order of the catalog. When the catalog grows, there are more of them.

    If ``reads``, the model also reads the vectors: γ · e_i is added to the input embedding of the last code
    of every item of the history. Input and output then share what they learn about an item, as in SASRec.

    Args:
        width: the width of the states.
        negatives: the number of items to draw for each training pass. By default all items are used, or
            ``NEGATIVES`` if there are more than ``EXACT``.
        reads: whether the model also reads the items of a history by their vectors.
        contents: whether a projection of the content vectors is a part of the vectors.
        arrivals: whether the items that a stage brings have a common addition to their biases, which is
            zero in training and chosen afterwards.

    Raises:
        DataError: ``contents`` with semantic IDs that have no content vectors.
    """

    tokens: Tensor
    contents: Tensor
    counts: Tensor
    shares: Tensor
    arrival_bias: Tensor
    first_items: Tensor

    def __init__(
        self,
        semantic_ids: SemanticIds,
        width: int,
        negatives: int | None = None,
        *,
        reads: bool = False,
        contents: bool = False,
        arrivals: bool = False,
    ) -> None:
        super().__init__()
        self.negatives = negatives
        items, tokens = len(semantic_ids.item_ids), sum(semantic_ids.sizes)
        self.rows = nn.Parameter(torch.zeros(items, width))
        self.bias = nn.Parameter(torch.zeros(items))
        self.code_rows = nn.Parameter(torch.zeros(tokens, width))
        self.code_bias = nn.Parameter(torch.zeros(tokens))
        self.query = nn.Parameter(torch.eye(width))
        numbers = torch.from_numpy(semantic_ids.token_numbers.astype(np.int64))  # (items, levels)
        self.register_buffer("tokens", numbers, persistent=False)
        self.register_buffer("counts", torch.ones(items), persistent=False)
        self.register_buffer("shares", torch.full((len(LENGTHS) + 1,), 0.5))
        self.projection: nn.Parameter | None = None
        if contents:
            vectors = torch.from_numpy(semantic_ids.required_contents)
            self.register_buffer("contents", vectors, persistent=False)  # (items, dimensions)
            # zero, so that noise does not tell items apart before training does
            self.projection = nn.Parameter(torch.zeros(width, self.contents.shape[1]))
        self.arrivals = arrivals
        if arrivals:
            self.register_buffer("arrival_bias", torch.zeros(items))
        self._fixed: tuple[Tensor, Tensor] | None = None
        self.reads = reads
        if reads:
            self.input_scale = nn.Parameter(torch.ones(()))
            self.sizes = semantic_ids.sizes
            for level, keys in enumerate(_trie_keys(semantic_ids)):
                self.register_buffer(f"keys_{level}", keys, persistent=False)
            first = semantic_ids.trie.items[semantic_ids.trie.item_starts[:-1]]
            self.register_buffer("first_items", torch.from_numpy(first.astype(np.int64)), persistent=False)

    @torch.no_grad()
    def initialise(self, seed: int, embedding_spread: float = 0.02) -> None:
        """Draw the rows of the codes at random, so that initial scores have a standard deviation of about
        0.5.

        Args:
            seed: the seed of the rows.
            embedding_spread: the standard deviation of the backbone's word embeddings. The contribution of
                each code to an item's input vector starts with the same.
        """
        width, levels = self.code_rows.shape[1], self.tokens.shape[1]
        noise = torch.randn(self.code_rows.shape, generator=torch.Generator().manual_seed(seed))
        spread = 0.5 / (width * levels) ** 0.5
        self.code_rows.copy_(noise * spread)
        if self.reads:
            self.input_scale.fill_(embedding_spread / spread)

    def compete(self, counts: np.ndarray) -> None:
        """Set the items that compete with the targets in training.

        These are the items with a positive count. If negatives are drawn, it is in proportion to the counts.
        Other items are trained only through their codes.

        Args:
            counts: (items,), the number of events of each item that training may use.
        """
        self.counts = torch.from_numpy(counts).to(self.counts)

    def vectors(self) -> Tensor:
        """The vectors e_i of all items, float32 (items, width)."""
        return self.rows + self._shared() if self._fixed is None else self._fixed[0]

    def _shared(self, items: Tensor | None = None) -> Tensor:
        """The part of e_i without r_i, of these items or of all: (n, width)."""
        tokens = self.tokens if items is None else self.tokens[items]
        of_codes = F.embedding_bag(tokens, self.code_rows, mode="sum")
        if self.projection is None:
            return of_codes
        contents = self.contents if items is None else self.contents[items]
        return of_codes + F.linear(contents, self.projection)

    def inputs(self, numbers: Tensor) -> Tensor:
        """The vectors to add to the embeddings of a sequence: γ · e_i at the last code of each item, zero
        elsewhere.

        An item is recognized by all of its codes in direct succession. Items that share a semantic ID cannot
        be told apart in a prompt, so all of them are read as the first one in the catalog.

        Args:
            numbers: int64 (…, length), rows of the semantic vocabulary; negative for words.

        Returns:
            float32 (…, length, width).
        """
        levels = len(self.sizes)
        offset, node, whole = 0, torch.zeros_like(numbers), torch.ones_like(numbers, dtype=torch.bool)
        padded = F.pad(numbers, (levels - 1, 0), value=-1)
        for level, size in enumerate(self.sizes):  # down the trie, for the last codes of all places at once
            code = padded[..., level : level + numbers.shape[-1]] - offset
            keys: Tensor = getattr(self, f"keys_{level}")
            wanted = node * size + code
            node = torch.searchsorted(keys, wanted).clamp_max(len(keys) - 1)
            whole &= (code >= 0) & (code < size) & (keys[node] == wanted)
            offset += size
        items = self.first_items[node[whole]]
        vectors = self._own(items) + self._shared(items)
        result = vectors.new_zeros(*numbers.shape, vectors.shape[-1])
        return result.masked_scatter(whole.unsqueeze(-1), self.input_scale * vectors)

    def biases(self) -> Tensor:
        """The biases b_i of all items, float32 (items,)."""
        if self._fixed is not None:
            return self._fixed[1]
        result = self.bias + self.code_bias[self.tokens].sum(-1)
        return result + self.arrival_bias if self.arrivals else result

    @torch.no_grad()
    def fixed(self) -> ItemHead:
        """The head for inference: vectors and biases of all items are computed once instead of for every
        batch. Parameters are shared; later changes of them do not affect vectors and biases."""
        made = copy(self)
        made._fixed = self.vectors(), self.biases()
        return made

    def queries(self, hidden: Tensor) -> Tensor:
        """Q · h / rms(h) of states: (n, width) → float32 (n, width)."""
        states = hidden.float()
        return F.rms_norm(states, states.shape[-1:], eps=1e-6) @ self.query.t()

    def forward(self, hidden: Tensor) -> Tensor:
        """The scores of all items of the catalog: states (n, width) → float32 (n, items)."""
        with torch.autocast(hidden.device.type, enabled=False):
            return torch.addmm(self.biases(), self.queries(hidden), self.vectors().t())

    def log_probabilities(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The log-probability of each target among the competing items (:meth:`compete`) and itself.

        With negatives, the softmax in training is over the target and n items, drawn with probability p_i and
        shared by all rows, whose scores are corrected by -log(n · p_i) (logQ; Bengio and Senécal 2008). It
        approaches the exact softmax as n grows. In evaluation mode the softmax is exact, so a validation loss
        does not depend on chance.

        Args:
            hidden: (n, width), the states.
            targets: int64 (n,), the item row of each target.

        Returns:
            float32 (n,).
        """
        with torch.autocast(hidden.device.type, enabled=False):
            queries, items = self.queries(hidden), len(self.rows)
            negatives = self.negatives or (NEGATIVES if items > EXACT else items)
            if self.training and negatives < items:
                return self._sampled(queries, targets, negatives)
            together = len(queries) if self.training else SCORES_AT_ONCE // items
            return self._exact(queries, targets, max(1, together))

    def _exact(self, queries: Tensor, targets: Tensor, together: int) -> Tensor:
        """The log-probabilities by a softmax over the competing items, so many rows at once."""
        vectors, biases, unmet = self.vectors(), self.biases(), self.counts == 0
        # a bias of -inf leaves an item out without another tensor as large as the scores
        competing, result = biases.masked_fill(unmet, -torch.inf), []
        for rows, wanted in zip(queries.split(together), targets.split(together), strict=True):
            scores = torch.addmm(competing, rows, vectors.t())
            outside = unmet[wanted].nonzero().squeeze(-1)
            if len(outside):  # a validation target may be an item that does not compete in training
                items = wanted[outside]
                own = (rows[outside] * vectors[items]).sum(-1) + biases[items]
                scores = scores.index_put((outside, items), own)
            result.append(normalized(1.0, wanted, scores))
        return torch.cat(result)

    def _sampled(self, queries: Tensor, targets: Tensor, negatives: int) -> Tensor:
        proposal = self.counts / self.counts.sum()
        drawn = torch.multinomial(proposal, negatives, replacement=True)
        rows, count = torch.cat([targets, drawn]), len(targets)
        vectors = self._own(rows) + self._shared(rows)
        biases = self.bias[rows] + self.code_bias[self.tokens[rows]].sum(-1)
        own = (queries * vectors[:count]).sum(-1) + biases[:count]  # (n,)
        corrected = biases[count:] - (negatives * proposal[drawn]).log()
        others = torch.addmm(corrected, queries, vectors[count:].t())  # (n, negatives)
        with torch.no_grad():  # those that are the target are counted once; their gradient is exactly 0
            others.masked_fill_(drawn == targets.unsqueeze(-1), -torch.inf)
        return normalized(1.0, torch.zeros_like(targets), own.unsqueeze(-1), others)

    def expect_gradients(self) -> None:
        """Prepare the gradient of the rows before the passes of a training step, on a CPU.

        Each pass then adds to the gradient only the rows that it used, instead of a tensor for all items.
        """
        if self.rows.requires_grad and self.rows.grad is None and self.rows.device.type == "cpu":
            self.rows.grad = torch.zeros_like(self.rows)

    def _own(self, items: Tensor) -> Tensor:
        """The rows r_i of these items: (n, width)."""
        # a sparse gradient is only for adding to a dense one, see `expect_gradients`
        return F.embedding(items, self.rows, sparse=self.rows.is_leaf and self.rows.grad is not None)

    def share_of(self, lengths: Tensor) -> Tensor:
        """The share of the head for histories of these lengths: int64 (n,) → float32 (n,)."""
        return self.shares[groups_of(lengths)]


def _trie_keys(semantic_ids: SemanticIds) -> list[Tensor]:
    """For each level int64 (nodes,), ascending: (node above) · (codes of the level) + code, of each node."""
    trie, result = semantic_ids.trie, []
    for size, codes, starts in zip(semantic_ids.sizes, trie.codes, trie.starts, strict=True):
        above = np.repeat(np.arange(len(starts) - 1, dtype=np.int64), np.diff(starts))
        result.append(torch.from_numpy(above * size + codes))
    return result


def groups_of(lengths: Tensor) -> Tensor:
    """The group of ``LENGTHS`` of each history length, both int64 (n,)."""
    return torch.bucketize(lengths, torch.tensor(LENGTHS, device=lengths.device))
