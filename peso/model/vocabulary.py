"""The semantic vocabulary: the rows of the added tokens, which are stored outside of the frozen backbone."""

from __future__ import annotations

from copy import copy

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from peso.model.item_head import ItemHead


class SemanticVocabulary(nn.Module):
    """The input and output rows of the semantic tokens, and those of the words if they are trained, too.

    Token ids start at ``first_id`` (the tokenizer's length, so that an exported tokenizer has the same ids)
    and are numbered level by level. Input and output rows are both trained and are not tied to each other.

    Args:
        first_id: the id of the first semantic token.
        sizes: the number of codes of each level.
        width: the width of the backbone's embeddings.
    """

    offsets: Tensor

    def __init__(self, first_id: int, sizes: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.first_id = first_id
        self.sizes = tuple(sizes)
        starts = torch.tensor([0, *sizes[:-1]]).cumsum(0)
        self.register_buffer("offsets", starts, persistent=False)  # (levels,) row of each level's first code
        self.input_rows = nn.Parameter(torch.zeros(sum(sizes), width))
        self.output_rows = nn.Parameter(torch.zeros(sum(sizes), width))
        # (first_id, width) each; None: the words' rows are those of the frozen backbone
        self.input_words: nn.Parameter | None = None
        self.output_words: nn.Parameter | None = None
        # trained, stored, anchored and averaged together with the rows
        self.item_head: ItemHead | None = None

    def __len__(self) -> int:
        return len(self.input_rows)

    @property
    def levels(self) -> int:
        return len(self.sizes)

    @torch.no_grad()
    def initialise(self, input_weight: Tensor, output_weight: Tensor, seed: int) -> None:
        """Draw new rows around those of the backbone: mean + standard deviation per coordinate × N(0, 1) / 2.

        Centering on the mean limits the divergence that new rows cause in the backbone's predictions (Hewitt
        2021, "Initializing New Word Embeddings for Pretrained Language Models"). The noise makes codes
        distinguishable from the first step on. Half the standard deviation keeps new rows shorter than
        trained ones, so that initially no new token is more likely than the words. Input and output rows use
        the same noise, as in a backbone with tied embeddings. It is generated on the CPU, so the rows are the
        same on every device.

        Args:
            input_weight: (words, width), the embedding rows of the backbone.
            output_weight: (words, width), the head rows of the backbone.
            seed: the seed of the noise.
        """
        noise = torch.randn(self.input_rows.shape, generator=torch.Generator().manual_seed(seed))
        for rows, weight in ((self.input_rows, input_weight), (self.output_rows, output_weight)):
            base = weight.detach().float().cpu()
            rows.copy_(base.mean(0) + 0.5 * base.std(0) * noise)

    def train_words(self, input_weight: Tensor, output_weight: Tensor) -> None:
        """Train rows for all words, starting from these (words, width). They are copies, not tied to the
        backbone's rows or to each other, as PEFT copies modules that it trains whole."""
        self.input_words, self.output_words = (
            nn.Parameter(weight.detach().float().clone()) for weight in (input_weight, output_weight)
        )

    @torch.no_grad()
    def carry_over(self, before: np.ndarray, now: np.ndarray, known: np.ndarray) -> int:
        """Map the rows to changed codes of known items, so that the model starts where it was.

        The rows of a code that no known item had before, including those of the item head, become the mean of
        the rows of the codes that the items with it had before on the same level. Other rows of codes do not
        change. In the item head, the own row and bias of a changed item take up the difference of its codes,
        so the vectors and biases of all known items stay the same, up to rounding. A new item has no own row
        yet; it is scored by its new codes.

        Args:
            before: int (items, levels), the numbers of the semantic tokens of each item before, level by
                level.
            now: int (items, levels), the numbers now.
            known: bool (items,), whether the rows were trained on the item.

        Returns:
            The number of known items with changed codes.
        """
        changed = np.flatnonzero(known & (before != now).any(axis=1))
        old, new = before[changed], now[changed]
        rows, head = self._code_rows, self.item_head
        for level in range(before.shape[1]):
            for code in np.setdiff1d(new[:, level], before[known, level]):
                sources = torch.from_numpy(old[new[:, level] == code, level].astype(np.int64))
                for values in rows:
                    values[int(code)] = values[sources.to(values.device)].double().mean(0).to(values.dtype)
        if head is not None:
            items, *tokens = (torch.from_numpy(each.astype(np.int64)) for each in (changed, old, new))
            for own, of_codes in ((head.rows, head.code_rows), (head.bias, head.code_bias)):
                places = [each.to(own.device) for each in (items, *tokens)]
                was, is_now = (of_codes[each].double().sum(1) for each in places[1:])
                own[places[0]] = (own[places[0]].double() + was - is_now).to(own.dtype)
        return len(changed)

    @property
    def _code_rows(self) -> list[nn.Parameter]:
        """The parameters with an entry for each semantic token."""
        head = self.item_head
        return [self.input_rows, self.output_rows, *([head.code_rows, head.code_bias] if head else [])]

    @torch.no_grad()
    def begin_new_codes(self, tokens: np.ndarray, known: np.ndarray, arriving: np.ndarray) -> int:
        """Initialize the rows of codes that only arriving items have from the rows of known codes.

        The rows of such a code, including those of the item head, become the mean of the rows of its
        neighbors' codes on the same level. The neighbors are the known items that share the longest prefix
        with an item of this code. Semantic IDs are made from texts, so neighbors have similar texts.

        Args:
            tokens: int (items, levels), the numbers of the semantic tokens of each item, level by level.
            known: bool (items,), whether the rows were trained on the item.
            arriving: bool (items,), whether the item is new.

        Returns:
            The number of initialized codes.
        """
        rows, begun = self._code_rows, 0
        for level in range(tokens.shape[1] if known.any() else 0):
            new = np.setdiff1d(tokens[arriving & ~known, level], tokens[known, level])
            if not len(new):
                continue
            shares = _shares(tokens, level, known, arriving, new)
            for values in rows:
                # use SciPy, because its sums do not depend on the number of threads
                means = shares @ values[: shares.shape[1]].cpu().double().numpy()
                values[torch.from_numpy(new).to(values.device)] = torch.from_numpy(means).to(values)
            begun += len(new)
        return begun

    def fixed(self) -> SemanticVocabulary:
        """The vocabulary for inference, with a fixed item head; everything else is shared."""
        if self.item_head is None:
            return self
        made = copy(self)
        made._modules = {**self._modules, "item_head": self.item_head.fixed()}
        return made

    def level_rows(self, level: int) -> Tensor:
        """The output rows of a level, (codes of the level, width)."""
        start = int(self.offsets[level])
        return self.output_rows[start : start + self.sizes[level]]


def _shares(
    tokens: np.ndarray, level: int, known: np.ndarray, arriving: np.ndarray, new: np.ndarray
) -> sparse.csr_array:
    """The weights of known tokens in the initial rows of new tokens (see
    :meth:`SemanticVocabulary.begin_new_codes`).

    Returns:
        float64 (new tokens, tokens up to this level); each row sums to one.
    """
    items = np.flatnonzero(arriving & np.isin(tokens[:, level], new))
    neighbors = np.flatnonzero(known)
    size = int(tokens[:, level].max()) + 1
    of_items, left = np.zeros((len(items), size)), np.ones(len(items), dtype=bool)
    for length in range(level, -1, -1):
        groups = _groups(tokens[:, :length])
        ones = np.ones(len(neighbors))
        places = groups[neighbors], tokens[neighbors, level]
        counts = sparse.csr_array((ones, places), shape=(int(groups.max()) + 1, size))
        mine = counts[groups[items]].toarray()
        found = left & (mine.sum(1) > 0)
        of_items[found] = mine[found] / mine[found].sum(1, keepdims=True)
        left &= ~found
    codes = tokens[items, level]
    return sparse.csr_array(np.stack([of_items[codes == code].mean(0) for code in new]))


def _groups(prefixes: np.ndarray) -> np.ndarray:
    """A number for each distinct prefix of codes, int64 (items,). Empty prefixes all have the same number."""
    if not prefixes.shape[1]:
        return np.zeros(len(prefixes), dtype=np.int64)
    return np.unique(prefixes, axis=0, return_inverse=True)[1].reshape(-1)
