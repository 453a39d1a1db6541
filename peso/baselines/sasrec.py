"""SASRec: a small causal Transformer over items (Kang and McAuley 2018, arXiv 1808.09781).

The last ``window`` items, each the sum of its item vector and a position vector, go through ``layers``
pre-norm layers of masked self-attention. The state after item n scores item n + 1 by its product with the
item vectors, which input and output share.

Trained by cross-entropy over the whole catalog, which sampled negatives only approximate and which is
feasible for tens of thousands of items (Klenitskiy and Vasilev 2023, arXiv 2309.07602). A later stage starts
from the weights of the stage before; items that the catalog gains later get fresh rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from pydantic import Field, model_validator

from peso.baselines.baseline import Setting, padded
from peso.baselines.fitting import Network
from peso.events.histories import Cases, Stage, TargetSequence
from peso.runtime.machine import LAYER, TRAINED
from peso.runtime.progress import Observer

if TYPE_CHECKING:
    from torch import Tensor

    from peso.baselines.networks import CausalItems

WEIGHTS = "sasrec.safetensors"
NO_TARGET = -1


class SasRec(Network):
    """A small causal Transformer over items."""

    name = "sasrec"

    class Options(Network.Options):
        layers: int = Field(2, ge=1, description="attention blocks")
        heads: int = Field(2, ge=1, description="of attention")
        batch_size: int = Field(64, ge=1, description="sequences in one step")

        @model_validator(mode="after")
        def _shares_its_width(self) -> SasRec.Options:
            if self.width % self.heads:
                raise ValueError(
                    f"sasrec: width {self.width} cannot be shared by {self.heads} heads; choose a multiple"
                )
            return self

        def memory(self, items: int, users: int, window: int) -> int:
            scores = 4 * min(self.batch_size, users) * window * items
            layers = self.layers * (LAYER + TRAINED * 12 * self.width**2)
            return TRAINED * items * self.width + scores + layers

    options: Options

    def __init__(self, setting: Setting, **options: Any) -> None:
        super().__init__(setting, **options)
        self.network = self._fresh()

    def learn(self, stages: Sequence[Stage], observer: Observer) -> dict[str, Any]:
        from torch import from_numpy
        from torch.nn.functional import nll_loss

        stage = stages[-1]
        inputs, targets = training_rows(stage.training_sequences(), self.window, self.items)
        inputs_tensor, targets_tensor = from_numpy(inputs), from_numpy(targets)

        def loss_of(rows: np.ndarray) -> Tensor:
            expected = targets_tensor[rows].to(self.device)
            states = self.network(inputs_tensor[rows].to(self.device))
            asked = expected != NO_TARGET
            return nll_loss(self.network.log_probabilities(states[asked]), expected[asked])

        return self.fit(stage, loss_of, len(inputs), observer)

    def save(self, directory: Path) -> None:
        from safetensors.torch import save_file

        state = self.network.state_dict()
        save_file({**state, "item.weight": state["item.weight"][:-1].contiguous()}, directory / WEIGHTS)

    def restore(self, directory: Path, stages: Sequence[Stage]) -> None:
        from safetensors.torch import load_file
        from torch import no_grad

        saved = load_file(directory / WEIGHTS, device=str(self.device))
        self.network = self._fresh()
        with no_grad():
            for name, tensor in self.network.state_dict().items():
                tensor[: len(saved[name])] = saved[name]
            self.network.item.weight[self.items] = 0

    def _fresh(self) -> CausalItems:
        from peso.baselines.networks import CausalItems, seeded

        chosen = self.options

        def make() -> CausalItems:
            return CausalItems(
                self.items, self.window, chosen.width, chosen.layers, chosen.heads, chosen.dropout
            )

        return cast(CausalItems, seeded([self.seed, self.items, 3], make)).to(self.device).eval()

    def log_probabilities(self, cases: Cases) -> Tensor:
        import torch

        rows = torch.from_numpy(padded(cases.histories, self.window, self.items)).to(self.device)
        lengths = torch.tensor([min(len(history), self.window) for history in cases.histories])
        last = lengths.clamp(min=1).to(self.device) - 1  # an empty history: the state after padding
        states = self.network(rows)
        return self.network.log_probabilities(states[torch.arange(len(rows), device=self.device), last])


def training_rows(
    sequences: Sequence[TargetSequence], window: int, padding: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cut sequences into rows in which every target, except a first item, occurs once.

    A sequence that fits the window is one row. A longer one is cut so that its later targets see more than
    half a window of items.

    Returns: inputs, padded, and for each input the target that follows, or NO_TARGET; both int64 (rows,
        window).
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
    return np.array(inputs).reshape(-1, window), np.array(targets).reshape(-1, window)
