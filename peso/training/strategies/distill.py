"""``distill``: knowledge distillation from the previous stage's model (learning without forgetting)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from peso.training.strategies.strategy import ForwardPass, StageContext, Strategy

if TYPE_CHECKING:
    from torch import Tensor


class Distill(Strategy):
    """``single``, with knowledge distillation from the previous stage's model on the new data.

    The penalty is weight · T² · KL(teacher ‖ student), averaged over the target tokens, where T is the
    temperature of both distributions (Hinton et al. 2015; Li and Hoiem 2016). Each step takes one more
    forward pass. The teacher is a copy of the trained parameters; it shares the frozen backbone.
    """

    name = "distill"
    moves_one_adapter = True
    relative_step_time = 1.4  # measured by benchmarks/strategies.py

    class Options(Strategy.Options):
        weight: float = Field(1.0, ge=0, description="factor of the distillation loss")
        temperature: float = Field(1.0, gt=0, description="divides the logits of teacher and student")

    options: Options
    _teacher: dict[str, Tensor]

    def begin(self, context: StageContext) -> None:
        self._teacher = {name: p.detach().clone() for name, p in context.trainable().items()}

    def output_penalty(self, context: StageContext, outputs: ForwardPass) -> Tensor | None:
        from torch.nn.functional import kl_div

        weight, temperature = self.options.weight, self.options.temperature
        if not weight:
            return None
        teacher = (outputs.log_probabilities(self._teacher) / temperature).log_softmax(-1)
        student = (outputs.log_probabilities() / temperature).log_softmax(-1)
        divergence = kl_div(student, teacher, reduction="sum", log_target=True)
        return weight * temperature**2 * divergence / len(outputs.targets)
