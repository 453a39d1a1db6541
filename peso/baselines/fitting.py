"""The training loop of the small networks: epochs of shuffled batches; the best epoch by validation is kept.

All random numbers follow from the seed, so training a stage again gives the same weights.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from peso.baselines.baseline import Baseline, Setting
from peso.config.model import MOST_EPOCHS
from peso.events.histories import Stage
from peso.runtime.device import reproducible
from peso.runtime.machine import TRAINED
from peso.runtime.progress import Observer
from peso.runtime.threads import threads

MAX_GRADIENT_NORM = 1.0


class Network(Baseline):
    """A baseline with a network. Epochs are the most; the best by validation loss is kept."""

    random = True
    probabilistic = True

    class Options(Baseline.Options):
        width: int = Field(64, ge=1, description="of every embedding")
        epochs: int = Field(20, ge=1, le=MOST_EPOCHS)
        patience: int = Field(2, ge=1, description="epochs without a better validation loss that end a stage")
        batch_size: int = Field(
            256, ge=1, description="targets (two-tower) or sequences (sasrec) in one step"
        )
        learning_rate: float = Field(1e-3, gt=0)
        later_learning_rate_scale: float = Field(1.0, gt=0)
        weight_decay: float = Field(0.01, ge=0)
        dropout: float = Field(0.2, ge=0, lt=1)

        def memory(self, items: int, users: int, window: int) -> int:
            return TRAINED * items * self.width + 4 * min(self.batch_size, users) * items

    def __init__(self, setting: Setting, **options: Any) -> None:
        super().__init__(setting, **options)
        self.seed, self.device = setting.seed, torch.device(setting.device)

    @classmethod
    def timed(
        cls, options: Network.Options, setting: Setting, stages: Sequence[Stage], sample: Stage
    ) -> tuple[Self, float]:
        """One epoch on the sample; the time grows with epochs and targets."""
        made, seconds = super().timed(options.model_copy(update={"epochs": 1}), setting, [sample], sample)
        return made, seconds * options.epochs * sum(map(_targets, stages)) / max(1, _targets(sample))


def _targets(stage: Stage) -> int:
    return int((stage.current.lengths[stage.eligible()] - 2).sum())


@dataclass(frozen=True)
class Fit:
    """``validation_loss``: of each epoch, in nats per target. ``best_epoch`` counts from 1."""

    best_epoch: int
    validation_loss: list[float]
    examples: int
    seconds: float


def fit(
    module: nn.Module,
    loss_of: Callable[[np.ndarray], Tensor],
    examples: int,
    validate: Callable[[], float],
    options: Network.Options,
    stage: int,
    seed: int,
    observer: Observer,
) -> Fit:
    """AdamW on minibatches; stops early, and leaves the module in its best state, in evaluation mode.

    Args:
        loss_of: the mean loss over the examples with these numbers.
        examples: how many there are.
        validate: the loss over the validation cases.
    """
    rate = options.learning_rate * (options.later_learning_rate_scale if stage else 1.0)
    optimiser = torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=options.weight_decay)
    generator = np.random.default_rng([seed, stage])
    steps = -(-examples // options.batch_size)
    observer.begin(f"learn stage {stage}", steps * options.epochs, "steps")
    began, losses = time.perf_counter(), list[float]()
    best = copy.deepcopy(module.state_dict())
    device = next(module.parameters()).device
    with torch.random.fork_rng(devices=_devices(device)), reproducible(device), threads(module):
        torch.manual_seed(int(generator.integers(2**31)))  # dropout
        for epoch in range(options.epochs):
            module.train()
            order = generator.permutation(examples)
            for step, begin in enumerate(range(0, examples, options.batch_size), 1):
                optimiser.zero_grad()
                loss = loss_of(order[begin : begin + options.batch_size])
                loss.backward()
                nn.utils.clip_grad_norm_(module.parameters(), MAX_GRADIENT_NORM)
                optimiser.step()
                observer.advance(epoch * steps + step, epoch=epoch + 1, loss=float(loss.detach()))
            module.eval()
            losses.append(validate())
            if losses[-1] == min(losses):
                best = copy.deepcopy(module.state_dict())
            if epoch - int(np.argmin(losses)) >= options.patience:
                break
    observer.end()
    module.load_state_dict(best)
    module.eval()
    return Fit(int(np.argmin(losses)) + 1, losses, examples, time.perf_counter() - began)


@torch.no_grad()
def mean_target_loss(
    log_probabilities: Callable[[np.ndarray], Tensor], targets: np.ndarray, batch_size: int = 256
) -> float:
    """Minus the mean log-probability of the targets.

    Args:
        log_probabilities: (n, items) of the cases with these numbers.
        targets: int (cases,).
    """
    total = 0.0
    for begin in range(0, len(targets), batch_size):
        rows = np.arange(begin, min(begin + batch_size, len(targets)))
        scores = log_probabilities(rows)
        own = torch.from_numpy(targets[rows].astype(np.int64)).to(scores.device)
        total -= float(scores.gather(1, own[:, None]).double().sum())
    return total / len(targets)


def seeded(seed: Sequence[int], make: Callable[[], nn.Module]) -> nn.Module:
    """A module whose initial weights follow from the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(np.random.default_rng(list(seed)).integers(2**31)))
        return make()


def _devices(device: torch.device) -> list[int]:
    return [device.index or 0] if device.type == "cuda" else []
