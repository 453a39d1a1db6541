"""AdamW, its parameter groups, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from peso.config import TrainingConfig

# The first parts of the names of parameters with their own learning rate: the vocabulary rows and the item
# head, and the item head alone.
ROWS, HEAD = "vocabulary.", "vocabulary.item_head."


def make_optimizer(
    trained: Mapping[str, nn.Parameter],
    settings: TrainingConfig,
    learning_rate: float,
    head_scale: float = 1.0,
) -> torch.optim.AdamW:
    """AdamW over named parameters.

    Weight decay applies only to matrices, not to biases and the scales of norms.

    Args:
        trained: the parameters by name.
        settings: the section ``training`` of the configuration. The learning rate of the vocabulary rows and
            of the item head is multiplied by its ``rows_learning_rate_scale``.
        learning_rate: the learning rate of the other parameters.
        head_scale: a further factor for the learning rate of the item head.
    """
    scales = {ROWS: settings.rows_learning_rate_scale, HEAD: head_scale}
    rates = {
        name: learning_rate * math.prod(scale for part, scale in scales.items() if name.startswith(part))
        for name in trained
    }
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for decays in (True, False):
        for name, p in trained.items():
            if (p.ndim > 1) == decays:
                groups.setdefault((decays, rates[name]), []).append(p)
    # the fused form visits each parameter once; otherwise the update takes a fifth of a small model's step
    return torch.optim.AdamW(
        [
            {"params": group, "weight_decay": settings.weight_decay if decays else 0.0, "lr": rate}
            for (decays, rate), group in groups.items()
        ],
        lr=learning_rate,
        fused=True,
    )


class Schedule:
    """The learning-rate schedule of a training.

    Args:
        optimizer: the optimizer, whose parameter groups all follow the same curve.
        settings: the section ``training`` of the configuration.
        learning_rate: the peak rate of the parameters without a scale.
        steps: the number of steps of the training.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, settings: TrainingConfig, learning_rate: float, steps: int
    ) -> None:
        self._learning_rate = learning_rate
        self._scheduler = _scheduler(settings, optimizer, steps)

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return float(self._learning_rate * self._scheduler.lr_lambdas[0](self._scheduler.last_epoch))

    def step(self) -> None:
        """Set the learning rates of the next step."""
        self._scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        return dict(self._scheduler.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scheduler.load_state_dict(state)


def total_rate(settings: TrainingConfig, steps: int, learning_rate: float) -> float:
    """The sum of the learning rates of a stage's steps, for the peak rate ``learning_rate``."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=learning_rate)
    (factor,) = _scheduler(settings, optimizer, steps).lr_lambdas
    return float(learning_rate * sum(factor(step) for step in range(steps)))


def _scheduler(settings: TrainingConfig, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    return get_scheduler(
        "constant_with_warmup" if settings.schedule == "constant" else settings.schedule,
        optimizer,
        num_warmup_steps=warmup_steps(settings, steps),
        num_training_steps=steps,
    )


def warmup_steps(settings: TrainingConfig, steps: int) -> int:
    """The number of warm-up steps, of which the first has the learning rate 0."""
    return math.ceil(settings.warmup * steps)
