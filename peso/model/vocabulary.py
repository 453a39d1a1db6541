"""The semantic vocabulary: the rows of the added tokens, which are stored outside of the frozen backbone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peso.model.item_head import ItemHead


class SemanticVocabulary(nn.Module):
    """The input and output rows of the semantic tokens.

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

    def level_rows(self, level: int) -> Tensor:
        """The output rows of a level, (codes of the level, width)."""
        start = int(self.offsets[level])
        return self.output_rows[start : start + self.sizes[level]]
