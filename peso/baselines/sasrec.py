"""SASRec is a small causal Transformer over items (Kang and McAuley 2018, arXiv 1808.09781).

The last ``window`` items, each the sum of an item embedding times √width and a position embedding, are
processed by ``layers`` pre-norm layers of causal self-attention. The state at item n scores item n + 1 by its
product with the item embeddings, which input and output share.

The loss is the cross-entropy over the whole catalog, on which the quality of SASRec depends (Klenitskiy and
Vasilev 2023, arXiv 2309.07602). For large catalogs, it is approximated by a sampled softmax with logQ
correction. A later stage starts from the weights of the previous one, and new items get newly initialized
rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from pydantic import Field, model_validator

from peso.baselines.baseline import Setting, padded
from peso.baselines.fitting import LossOf, Network
from peso.config.model import MOST_EPOCHS, WIDEST
from peso.config.parsing import new_key
from peso.events.histories import Cases, Stage, TargetSequence
from peso.runtime.machine import LAYER, TRAINED

if TYPE_CHECKING:
    from torch import Tensor

    from peso.baselines.networks import CausalItems

NO_TARGET = -1
EXACT, NEGATIVES = 5_000, 512  # the largest catalog with a full softmax; the number of negatives for others
MOST_NEGATIVES = 100_000


class SasRec(Network):
    """A small causal Transformer over items."""

    name = "sasrec"
    WEIGHTS, PADDED = "sasrec.safetensors", "item"
    SETTINGS = tuple(
        {"learning_rate": rate, "dropout": dropout, "weight_decay": decay}
        for rate, dropout, decay in [
            *[(1e-3, 0.2, 0.01), (3e-3, 0.2, 1.0), (3e-3, 0.2, 0.1), (3e-3, 0.5, 1.0)],
            *[(3e-3, 0.5, 0.1), (1e-3, 0.2, 1.0), (1e-3, 0.5, 0.1), (1e-3, 0.5, 0.3)],
        ]
    )

    class Options(Network.Options):
        width: int = Field(128, ge=1, le=WIDEST, description="embedding width")
        epochs: int = Field(
            100,
            ge=1,
            le=MOST_EPOCHS,
            description="maximum; the epoch with the best NDCG on validation is kept",
        )
        patience: int = Field(
            5,
            ge=1,
            description="training stops after this many epochs without a better NDCG or a lower loss",
        )
        weight_decay: float | None = Field(None, ge=0, description="of AdamW; default: chosen on validation")
        negatives: int | None = new_key(
            None,
            ge=0,
            le=MOST_NEGATIVES,
            description="sampled negative items per step, with logQ correction; 0: full softmax over all "
            "items; default: 0 for catalogs of up to 5,000 items, 512 for larger ones",
        )
        layers: int = Field(2, ge=1, description="attention blocks")
        heads: int = Field(2, ge=1, description="attention heads")
        batch_size: int = Field(64, ge=1, description="sequences per step")

        @model_validator(mode="after")
        def _shares_its_width(self) -> SasRec.Options:
            if self.width % self.heads:
                raise ValueError(
                    f"sasrec: width {self.width} is not a multiple of heads {self.heads}; change one of them"
                )
            return self

        def drawn(self, items: int) -> int:
            """The number of negatives per step for a catalog of this size; 0 for a full softmax."""
            if self.negatives is None:
                return 0 if items <= EXACT else NEGATIVES
            return self.negatives

        def memory(self, items: int, users: int, window: int) -> int:
            scores = 4 * min(self.batch_size, users) * window * (self.drawn(items) or items)
            layers = self.layers * (LAYER + TRAINED * 12 * self.width**2)
            return TRAINED * items * self.width + scores + layers

    options: Options

    def __init__(self, setting: Setting, **options: Any) -> None:
        super().__init__(setting, **options)
        self.network = self.initialized()

    def examples(self, stage: Stage) -> tuple[LossOf, np.ndarray]:
        from torch import from_numpy
        from torch.nn.functional import nll_loss

        inputs, targets = training_rows(stage.training_sequences(), self.window, self.items)
        inputs_tensor, targets_tensor = from_numpy(inputs), from_numpy(targets)
        lengths = (inputs != self.items).sum(axis=1)
        counts = 1 + np.bincount(targets[targets != NO_TARGET], minlength=self.items)
        proposal = from_numpy((counts / counts.sum()).astype(np.float32)).to(self.device)
        negatives = self.used.drawn(self.items)

        def loss_of(rows: np.ndarray) -> Tensor:
            longest = int(lengths[rows].max(initial=1))
            expected = targets_tensor[rows, :longest].to(self.device)
            states = self.network(inputs_tensor[rows, :longest].to(self.device))
            targeted = expected != NO_TARGET
            states, expected = states[targeted], expected[targeted]
            if negatives:
                return -self.network.sampled_log_probabilities(states, expected, proposal, negatives).mean()
            return nll_loss(self.network.log_probabilities(states), expected)

        return loss_of, lengths

    def initialized(self) -> CausalItems:
        from peso.baselines.networks import CausalItems, seeded

        chosen = self.used

        def make() -> CausalItems:
            return CausalItems(
                self.items, self.window, chosen.width, chosen.layers, chosen.heads, chosen.dropout
            )

        return cast(CausalItems, seeded([self.seed, self.items, 3], make)).to(self.device).eval()

    def log_probabilities(self, cases: Cases) -> Tensor:
        import torch

        rows = torch.from_numpy(padded(cases.histories, self.window, self.items)).to(self.device)
        lengths = torch.tensor([min(len(history), self.window) for history in cases.histories])
        last = lengths.clamp(min=1).to(self.device) - 1  # for an empty history, the state at padding
        states = self.network(rows)
        return self.network.log_probabilities(states[torch.arange(len(rows), device=self.device), last])


def training_rows(
    sequences: Sequence[TargetSequence], window: int, padding: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cut sequences into rows that contain every target once, except targets without an item before them.

    A sequence that fits in the window is one row. A longer sequence is cut so that later targets have more
    than half a window of items before them.

    Args:
        window: the length of a row.
        padding: the item row of padding.

    Returns:
        The padded inputs, and the target that follows each input or ``NO_TARGET``, both int64 (rows, window).
    """
    inputs, targets = [], []
    for sequence in sequences:
        first, length = max(sequence.first_target, 1), len(sequence.items)
        while first < length:
            stop = min(length, max(window + 1, first + (window + 1) // 2))
            start = max(0, stop - 1 - window)
            row = np.full((2, window), padding, dtype=np.int64)
            row[0, : stop - 1 - start] = sequence.items[start : stop - 1]
            row[1] = NO_TARGET
            row[1, first - 1 - start : stop - 1 - start] = sequence.items[first:stop]
            inputs.append(row[0])
            targets.append(row[1])
            first = stop
    rows = [np.array(each, dtype=np.int64).reshape(-1, window) for each in (inputs, targets)]
    return rows[0], rows[1]
