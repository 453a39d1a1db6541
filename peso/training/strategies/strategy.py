"""What a strategy is asked in the course of a stage, and what it is told about the stage.

Knows the model of a stage and which examples there are; knows nothing of files, batches or the loop that
calls the hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol

from torch import Tensor, nn

from peso.config import CustomConfig, StrategyConfig
from peso.config.parsing import shown
from peso.errors import ConfigError
from peso.events.histories import TargetSequence


class ForwardPass(Protocol):
    """One forward pass of a step, as :meth:`Strategy.output_penalty` sees it."""

    targets: Tensor  # int64 (target tokens,)

    def log_probabilities(self, values: Mapping[str, Tensor] | None = None) -> Tensor:
        """float32 (target tokens, tokens that compete): log-probabilities at each target token.

        Args:
            values: parameters to compute with instead of the model's own, by the names of
                :func:`trainable`: one more pass, in evaluation mode, without a graph. None: what the step
                itself computed, differentiable.
        """
        ...


class Examples(Protocol):
    """Training examples of the stages up to the one being trained, and what the model makes of them.

    ``tokens``: target tokens of one target; ``window``: how many items before the first target of a
    sequence are looked at.
    """

    tokens: int
    window: int

    def of(self, stage: int) -> Sequence[TargetSequence]:
        """The training targets of a stage, each user's with what came before them."""
        ...

    def losses(self, stage: int, count: int) -> Iterator[Tensor]:
        """The training loss of ``count`` single targets of a stage, chosen by the seed: 0-d each, with its
        graph, dropout off; mean over the target's tokens."""
        ...

    def show(self, stage: int, count: int) -> None:
        """Run the model over ``count`` target sequences of a stage, chosen by the seed, without a graph and
        without dropout: for hooks that look at what goes through it."""
        ...


@dataclass(frozen=True)
class StageContext:
    """The stage that is being learnt.

    ``number``: 0 is the base stage; ``backbone``: the backbone with the adapter that is trained (a PEFT
    model; a plain one where all of its weights are trained); ``vocabulary``: the semantic vocabulary;
    ``total_steps``: optimiser steps; ``total_rate``: Σ of the learning rates over them; ``seed``: of the run;
    ``phase``: which of :meth:`Strategy.phases`; ``examples``: of this stage and those before; ``memory``:
    tensors that the strategy kept at the end of the last stage, by name, stored with the stage: what is in it
    at the end of this one is kept in turn; ``reset``: puts adapter and vocabulary to what they were before
    anything was learnt (where stage 0 trained the backbone itself: vocabulary as stage 0 left it, adapter
    fresh).
    """

    number: int
    backbone: nn.Module
    total_steps: int
    total_rate: float = 0.0
    seed: int = 0
    phase: str = ""
    vocabulary: nn.Module | None = None
    examples: Examples | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)
    reset: Callable[[], None] | None = None

    def trainable(self) -> dict[str, nn.Parameter]:
        """What is learnt, of backbone and vocabulary, by name."""
        parts = {"backbone": self.backbone, "vocabulary": self.vocabulary}
        return {
            f"{part}.{name}": parameter
            for part, module in parts.items()
            if module is not None
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }


class Strategy:
    """How a stage is learnt. The defaults: every stage is learnt, from the adapter of the last, freely.

    A strategy overrides what it does differently; one object serves one stage. The order in a stage is
    ``learns``, for each of its ``phases``: ``choose``, ``begin``, for every step ``output_penalty`` (once a
    forward pass), ``penalty`` and ``after_step``, then ``end``; and whenever the stage answers, ``answer``.
    Stage 0 is the same for all strategies: it is learnt by the defaults, and no strategy is asked there.
    """

    def learns(self, stage: int) -> bool:
        """Whether the stage is trained on at all; where not, the last state answers for it too."""
        return True

    def trains_backbone(self, stage: int) -> bool:
        """Whether the stage trains all weights of the backbone instead of an adapter."""
        return False

    def phases(self, stage: int) -> Sequence[str]:
        """Names of the trainings that the stage takes, one after another on the same model."""
        return ("",)

    def starts_anew(self, phase: str) -> bool:
        """Whether a phase begins from nothing (:attr:`StageContext.reset`), so that it learns at the rate of
        the base stage and not at that of an update."""
        return False

    def choose(self, context: StageContext) -> Sequence[TargetSequence] | None:
        """The examples to learn from; None: those of the stage. ``total_steps`` is not known yet."""
        return None

    def begin(self, context: StageContext) -> None:
        """Before the first step. The backbone holds the adapter that the stage inherits: of a stage that
        was interrupted too, whose own progress is restored afterwards. What requires a gradient when this
        hook returns is what is learnt."""

    def penalty(self, context: StageContext) -> Tensor | None:
        """Called once in every step: what is added to the loss, weighted: 0-d, differentiable with respect
        to trained parameters. None: nothing."""
        return None

    def output_penalty(self, context: StageContext, outputs: ForwardPass) -> Tensor | None:
        """Called in every forward pass of a step, before its gradients: as :meth:`penalty`, of what the
        model makes of the pass. A step's passes are weighted by their target tokens."""
        return None

    def after_step(self, context: StageContext, learning_rate: float) -> None:
        """After the optimiser moved the parameters at this learning rate."""

    def end(self, context: StageContext) -> None:
        """After the last step. The backbone holds the state that the stage keeps, which may be changed."""

    def figures(self) -> dict[str, Any]:
        """What there is to tell of the stage that was learnt, as JSON: for its metrics.json."""
        return {}

    def answer(self, model: Any, memory: Mapping[str, Tensor]) -> Any:
        """The model that answers for a stage: the stored one, or one made of it and of what was kept."""
        return model


__all__ = ["ForwardPass", "StageContext", "Strategy", "make_strategy"]


def make_strategy(config: StrategyConfig) -> Strategy:
    """A fresh strategy for one stage. Unknown names and options are refused by the configuration.

    Raises:
        ConfigError: a strategy of one's own that cannot be imported, is none, or takes other arguments.
    """
    if isinstance(config, CustomConfig):
        return _custom(config)
    module, _, name = config.home.rpartition(".")
    strategy: Strategy = getattr(import_module(module), name)(**config.options())
    return strategy


def _custom(config: CustomConfig) -> Strategy:
    module, _, name = config.module.rpartition(".")
    try:
        found = getattr(import_module(module or name), name)
    except Exception as error:  # whatever a module does when it is imported
        raise _refused(config, f"cannot be imported ({_cause(error)})") from error
    if not (isinstance(found, type) and issubclass(found, Strategy)):
        raise _refused(config, "is not a subclass of peso.training.strategies.strategy.Strategy")
    try:
        return found(**config.arguments)
    except Exception as error:
        raise _refused(config, f"cannot be made with {shown(config.arguments)} ({_cause(error)})") from error


def _refused(config: CustomConfig, why: str) -> ConfigError:
    return ConfigError(
        f"strategy.module: {config.module} {why}; name a strategy class that Python can import from here "
        "(PYTHONPATH), and in strategy.arguments the keyword arguments that it takes"
    )


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
