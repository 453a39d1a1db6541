"""The training loop of the small networks: epochs of shuffled batches; the best epoch by validation is kept.

All random numbers follow from the seed, so training a stage again gives the same weights.
"""

from __future__ import annotations

import copy
import time
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from peso.baselines.baseline import Baseline, Setting
from peso.config.model import MOST_EPOCHS, WIDEST
from peso.events.histories import Cases, Stage
from peso.runtime.machine import TRAINED, threads
from peso.runtime.progress import Observer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_GRADIENT_NORM = 1.0
VALIDATED_AT_ONCE = 256  # cases


class Network(Baseline):
    """A baseline with a network. Epochs are the most; the best by validation loss is kept."""

    random = True
    probabilistic = True

    class Options(Baseline.Options):
        width: int = Field(64, ge=1, le=WIDEST, description="of every embedding")
        epochs: int = Field(
            20, ge=1, le=MOST_EPOCHS, description="at most; the one with the lowest validation loss is kept"
        )
        patience: int = Field(2, ge=1, description="epochs without a better validation loss that end a stage")
        batch_size: int = Field(
            256, ge=1, description="targets (two-tower) or sequences (sasrec) in one step"
        )
        learning_rate: float = Field(1e-3, gt=0, description="of AdamW, in stage 0")
        later_learning_rate_scale: float = Field(
            1.0, gt=0, description="of later stages, relative to stage 0"
        )
        weight_decay: float = Field(0.01, ge=0, description="of AdamW")
        dropout: float = Field(0.2, ge=0, lt=1, description="in training")

        def memory(self, items: int, users: int, window: int) -> int:
            return TRAINED * items * self.width + 4 * min(self.batch_size, users) * items

    network: Any  # an nn.Module, on the device

    def __init__(self, setting: Setting, **options: Any) -> None:
        import torch

        super().__init__(setting, **options)
        self.seed, self.device = setting.seed, torch.device(setting.device)

    @abstractmethod
    def log_probabilities(self, cases: Cases) -> Tensor:
        """(n, items): of every item as the next one of each case."""

    def scores(self, cases: Cases) -> np.ndarray:
        from torch import no_grad

        with no_grad(), threads(self.network):
            return self.log_probabilities(cases).cpu().numpy()

    def fit(
        self, stage: Stage, loss_of: Callable[[np.ndarray], Tensor], examples: int, observer: Observer
    ) -> dict[str, Any]:
        """AdamW on minibatches; stops early, and leaves the network in its best state, in evaluation mode.

        Args:
            loss_of: the mean loss over the examples with these numbers.
            examples: how many there are.

        Returns: the figures of :class:`Fit`.
        """
        import torch

        from peso.runtime.device import reproducible

        network, options, later = self.network, self.options, stage.number > 0
        rate = options.learning_rate * (options.later_learning_rate_scale if later else 1.0)
        optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=options.weight_decay)
        generator = np.random.default_rng([self.seed, stage.number])
        steps, cases = -(-examples // options.batch_size), stage.validation_cases(self.window)
        observer.begin(f"learn stage {stage.number}", steps * options.epochs, "steps")
        began, losses = time.perf_counter(), list[float]()
        best = copy.deepcopy(network.state_dict())
        with (
            torch.random.fork_rng(devices=_devices(self.device)),
            reproducible(self.device),
            threads(network),
        ):
            torch.manual_seed(int(generator.integers(2**31)))  # dropout
            for epoch in range(options.epochs):
                network.train()
                order = generator.permutation(examples)
                for step, begin in enumerate(range(0, examples, options.batch_size), 1):
                    optimizer.zero_grad()
                    loss = loss_of(order[begin : begin + options.batch_size])
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(network.parameters(), MAX_GRADIENT_NORM)
                    optimizer.step()
                    observer.advance(epoch * steps + step, epoch=epoch + 1, loss=float(loss.detach()))
                network.eval()
                losses.append(self._target_loss(cases))
                if losses[-1] == min(losses):
                    best = copy.deepcopy(network.state_dict())
                if epoch - int(np.argmin(losses)) >= options.patience:
                    break
        observer.end()
        network.load_state_dict(best)
        network.eval()
        return asdict(Fit(int(np.argmin(losses)) + 1, losses, examples, time.perf_counter() - began))

    def _target_loss(self, cases: Cases) -> float:
        """Minus the mean log-probability of the targets."""
        from torch import from_numpy, no_grad

        total = 0.0
        for begin in range(0, len(cases), VALIDATED_AT_ONCE):
            some = cases.take(np.arange(begin, min(begin + VALIDATED_AT_ONCE, len(cases))))
            with no_grad():
                scores = self.log_probabilities(some)
            own = from_numpy(some.targets.astype(np.int64)).to(scores.device)
            total -= float(scores.gather(1, own[:, None]).double().sum())
        return total / len(cases)


@dataclass(frozen=True)
class Fit:
    """``validation_loss``: of each epoch, in nats per target. ``best_epoch`` counts from 1."""

    best_epoch: int
    validation_loss: list[float]
    examples: int
    seconds: float


def _devices(device: torch.device) -> list[int]:
    return [device.index or 0] if device.type == "cuda" else []
