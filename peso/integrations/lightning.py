"""A proximal term in Lightning's ``Trainer``."""

from __future__ import annotations

import math
from typing import Any

try:
    from pytorch_lightning import Callback, LightningModule, Trainer
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        "peso.integrations.lightning needs Lightning; install it with pip install 'peso[lightning]'"
    ) from None

from peso.adapters.proximal import Term
from peso.errors import ConfigError
from peso.integrations.anchored import Anchored, gradient_norm, log, require_usable


class ProximalCallback(Callback):
    """Adds a proximal term to a training with automatic optimization, and logs whether the anchor restrains.

    With ``coupling="loss"``, the gradient of the term is added once per optimizer step, before gradients are
    clipped. With ``coupling="decoupled"``, the adapter is pulled after each optimizer step. ::

        trainer = Trainer(max_steps=1000, callbacks=[ProximalCallback(peso.SoftmaxKL(weight=2.0))])
        trainer.fit(module, batches)

    Args:
        term: the term. Without an anchor, the adapter at the start of the training becomes the anchor.
        stage: the number of the stage, for messages.
        total_learning_rate: the sum of the learning rates of all steps, for the strength of a decoupled term.

    Raises:
        ConfigError: the term is not an object such as ``peso.L2(…)``, or cannot be used in a callback.

    Attributes:
        effect: after the training, what :func:`peso.adapters.anchor_report.anchor_effect` says; else None.
    """

    def __init__(self, term: Term, *, stage: int = 1, total_learning_rate: float | None = None) -> None:
        require_usable(term, total_learning_rate)
        self.term, self.stage, self._total = term, stage, total_learning_rate
        self.effect: dict[str, Any] | None = None
        self._anchored: Anchored | None = None
        self._rate: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the training, and anchor the term unless it has an anchor.

        Raises:
            ConfigError: gradients are scaled or sharded, optimization is manual, or the number of steps or
                the total of the learning rates is missing.
            TrainingError: the module has no LoRA adapter, a frozen one, or another one than the anchor.
        """
        kind = type(trainer.strategy).__name__
        if str(trainer.precision).startswith("16") or any(name in kind for name in ("DeepSpeed", "FSDP")):
            raise ConfigError(
                f"ProximalCallback does not support precision {trainer.precision} with {kind}, which scales "
                "or shards gradients; train in bf16 or 32-bit with replicated parameters"
            )
        if not pl_module.automatic_optimization:
            raise ConfigError(
                "ProximalCallback needs automatic optimization, because it acts once per batch; add the "
                "term in your own training_step"
            )
        decoupled = self.term.coupling == "decoupled"
        if decoupled and self.term.strength is not None and self._total is None:
            raise ConfigError(
                "the strength of a decoupled term is spread over the stage; give the sum of its learning "
                "rates: ProximalCallback(term, total_learning_rate=…)"
            )
        if not math.isfinite(steps := trainer.estimated_stepping_batches):
            raise ConfigError(
                "ProximalCallback needs the number of steps: give Trainer max_epochs or max_steps, also "
                "beside max_time"
            )
        self._anchored = Anchored(self.term, pl_module, int(steps), trainer.global_step, self.stage)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Add the gradient of the term; gradients are not clipped yet."""
        assert self._anchored is not None
        anchored = self._anchored
        if anchored.is_measured and not anchored.is_decoupled:
            anchored.saw_loss(gradient_norm(anchored.parameters))
        for parameter, gradient in zip(anchored.parameters, anchored.gradients(), strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        anchored.before_step()
        self._rate = float(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        assert self._anchored is not None
        if self._rate is None:  # a micro-batch without a step
            return
        warning = self._anchored.after_step(self._rate, self._total)
        self._rate = None
        pl_module.log_dict(self._anchored.figures())
        if warning:
            log.warning(warning)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log whether the anchor has restrained the adapter."""
        assert self._anchored is not None
        self.effect = self._anchored.effect()
        if says := self.effect["says"]:
            log.info(says)
