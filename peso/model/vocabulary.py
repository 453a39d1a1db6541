"""The semantic vocabulary: the added token rows, kept outside a frozen backbone that is never resized."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peso.model.item_head import ItemHead


class SemanticVocabulary(nn.Module):
    """Input and output rows of the semantic tokens.

    Token ids run from ``first_id`` (the tokenizer's length, so that an exported tokenizer gives the same
    ids) level by level. Both row sets are trained; they are not tied to each other.

    Args:
        first_id: id of the first semantic token.
        sizes: codes per level.
        width: the backbone's embedding width.
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
        self.item_head: ItemHead | None = (
            None  # learned with the rows, and kept, anchored, averaged as they are
        )

    def __len__(self) -> int:
        return len(self.input_rows)

    @property
    def levels(self) -> int:
        return len(self.sizes)

    @torch.no_grad()
    def initialise(self, input_weight: Tensor, output_weight: Tensor, seed: int) -> None:
        """Draw fresh rows around the backbone's own: mean + its per-coordinate spread × N(0, 1) / 2.

        Centring on the mean bounds the divergence that new rows cause in the backbone's predictions
        (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models"); the noise makes
        codes distinguishable from the first step on; half the spread keeps a fresh row shorter than a
        learned one, so that at the start no new token outbids the words. Input and output rows share the
        draw, as on a backbone with tied embeddings. Generated on the CPU from ``seed``: the same rows on
        every device.

        Args:
            input_weight: (words, width) embedding rows of the backbone.
            output_weight: (words, width) head rows of the backbone.
        """
        noise = torch.randn(self.input_rows.shape, generator=torch.Generator().manual_seed(seed))
        for rows, weight in ((self.input_rows, input_weight), (self.output_rows, output_weight)):
            base = weight.detach().float().cpu()
            rows.copy_(base.mean(0) + 0.5 * base.std(0) * noise)

    def level_rows(self, level: int) -> Tensor:
        """(codes of the level, width) output rows."""
        start = int(self.offsets[level])
        return self.output_rows[start : start + self.sizes[level]]
