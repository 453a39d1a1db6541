"""What some families do to the head's product before they call it logits.

Knows numbers in Transformers configurations; knows nothing of models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitTransform:
    """logits ← cap · tanh(scale · logits / cap): Cohere's ``logit_scale``, Granite's ``logits_scaling``
    (a divisor), Gemma's ``final_logit_softcapping``. The check at loading compares with the model's own."""

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitTransform:
        scale = getattr(config, "logit_scale", None) or 1.0
        divisor = getattr(config, "logits_scaling", None) or 1.0
        return cls(scale / divisor, getattr(config, "final_logit_softcapping", None))

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)
