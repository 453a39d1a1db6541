"""``distill``: the previous stage's model as teacher on the new data (learning without forgetting)."""

from __future__ import annotations

import torch
from torch import Tensor

from peso.training.strategies.strategy import ForwardPass, StageContext, Strategy


class Distill(Strategy):
    """Adds weight · T² · KL(teacher ‖ student) at every target token of the new data, both softened by T
    (Hinton et al. 2015; Li & Hoiem 2016). One more pass forward a step; the teacher is a copy of what is
    trained, the backbone is shared."""

    def __init__(self, weight: float = 1.0, temperature: float = 1.0) -> None:
        self.weight = weight
        self.temperature = temperature
        self._teacher: dict[str, Tensor] = {}

    def begin(self, context: StageContext) -> None:
        self._teacher = {name: p.detach().clone() for name, p in context.trainable().items()}

    def output_penalty(self, context: StageContext, outputs: ForwardPass) -> Tensor | None:
        if not self.weight:
            return None
        teacher = (outputs.log_probabilities(self._teacher) / self.temperature).log_softmax(-1)
        student = (outputs.log_probabilities() / self.temperature).log_softmax(-1)
        divergence = torch.nn.functional.kl_div(student, teacher, reduction="sum", log_target=True)
        return self.weight * self.temperature**2 * divergence / len(outputs.targets)
