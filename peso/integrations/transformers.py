"""A proximal term in Transformers' ``Trainer`` and in trainers built on it, such as TRL's ``SFTTrainer``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peso.adapters.proximal import Term
from peso.errors import ConfigError
from peso.integrations.anchored import Anchored, gradient_norm, log, require_usable


class ProximalCallback(TrainerCallback):
    """Adds a proximal term to a training with ``Trainer``, and logs whether the anchor restrains the adapter.

    With ``coupling="loss"``, the gradient of the term is added once per optimizer step, before gradients are
    clipped. This does not depend on gradient accumulation or on the function that computes the loss. The
    logged loss does not include the term. With ``coupling="decoupled"``, the adapter is pulled after each
    optimizer step. The log has ``proximal/value``, ``proximal/gradient_ratio`` (or ``pull_ratio``) and
    ``proximal/distance``. ::

        trainer = Trainer(..., callbacks=[ProximalCallback(peso.L2(strength=1.0, coupling="decoupled"))])
        trainer.train()

    Args:
        term: the term. Without an anchor, the adapter at the start of the training becomes the anchor.
        stage: the number of the stage, for messages.
        total_learning_rate: the sum of the learning rates of all steps, for the strength of a decoupled
            term. None: computed from a scheduler that is a ``LambdaLR``, as Transformers' own are.

    Raises:
        ConfigError: the term is not an object such as ``peso.L2(…)``, or cannot be used in a callback.

    Attributes:
        effect: after the training, what :func:`peso.adapters.anchor_report.anchor_effect` says; else None.
    """

    def __init__(self, term: Term, *, stage: int = 1, total_learning_rate: float | None = None) -> None:
        require_usable(term, total_learning_rate)
        self.term, self.stage = term, stage
        self.effect: dict[str, Any] | None = None
        self._given_total = self._total = total_learning_rate
        self._anchored: Anchored | None = None
        self._added: list[Tensor | None] = []
        self._norms: list[float] = []
        self._hooks: list[Any] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the training, and anchor the term unless it has an anchor.

        Raises:
            ConfigError: the training is in fp16 or sharded, or the learning rates of the scheduler are not
                known in advance.
            TrainingError: the model has no LoRA adapter, a frozen one, or another one than the anchor.
        """
        kinds = {"fp16": args.fp16, "DeepSpeed": args.deepspeed, "FSDP": args.fsdp}
        for kind in (kind for kind, used in kinds.items() if used):
            raise ConfigError(
                f"ProximalCallback does not support {kind}, which scales or shards gradients; train in bf16 "
                "or float32 with replicated parameters"
            )
        self._remove_hooks()
        model = kwargs["model"]
        self._anchored = Anchored(self.term, model, state.max_steps, state.global_step, self.stage)
        self._total = self._given_total
        if self._anchored.is_decoupled and self._total is None and self.term.strength is not None:
            self._total = _sum_of_rates(kwargs["lr_scheduler"], state.max_steps)
        if not self._anchored.is_decoupled:
            self._hooks = [
                parameter.register_post_accumulate_grad_hook(self._measure(place))
                for place, parameter in enumerate(self._anchored.parameters)
            ]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the gradient of the term as the parameters' gradient, to which the backward passes add
        theirs."""
        assert self._anchored is not None
        self._norms = [0.0] * len(self._anchored.parameters)
        self._added = self._anchored.gradients()
        for parameter, gradient in zip(self._anchored.parameters, self._added, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        if self._anchored.is_measured:
            self._added = [None if gradient is None else gradient.clone() for gradient in self._added]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self._anchored is not None
        if self._hooks and self._anchored.is_measured:
            self._anchored.saw_loss(sum(norm**2 for norm in self._norms) ** 0.5)
        self._anchored.before_step()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self._anchored is not None
        rate = float(kwargs["optimizer"].param_groups[0]["lr"])
        if warning := self._anchored.after_step(rate, self._total):
            log.warning(warning)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the figures of the term to the training's entries in the log."""
        logs = kwargs.get("logs") or {}
        if self._anchored is not None and self._anchored.records and "loss" in logs:
            logs.update(self._anchored.figures())
            state.log_history[-1].update(self._anchored.figures())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log whether the anchor has restrained the adapter."""
        assert self._anchored is not None
        self._remove_hooks()
        self.effect = self._anchored.effect()
        if says := self.effect["says"]:
            log.info(says)

    def _measure(self, place: int) -> Callable[[Tensor], None]:
        def measure(parameter: Tensor) -> None:  # before gradients are clipped; the last micro-batch counts
            if self._anchored is not None and self._anchored.is_measured:
                self._norms[place] = gradient_norm([parameter], [self._added[place]])

        return measure

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _sum_of_rates(scheduler: Any, steps: int) -> float:
    """The sum of the learning rates of all steps. Raises ConfigError if they are not known in advance."""
    if not isinstance(scheduler, LambdaLR):
        raise ConfigError(
            f"the learning rates of {type(scheduler).__name__} are not known in advance; give their sum: "
            "ProximalCallback(term, total_learning_rate=…)"
        )
    base, factor = scheduler.base_lrs[0], scheduler.lr_lambdas[0]
    return float(base * sum(factor(step) for step in range(steps)))
