"""What a strategy is asked in the course of a stage, and what it is told about the stage.

Commands that only read a configuration import this module, so PyTorch is not imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from peso.config.strategy import STRATEGIES, StrategyOptions

if TYPE_CHECKING:
    from torch import Tensor, nn

    from peso.adapters.groups import Source
    from peso.adapters.proximal.term import Term
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
    """The stage that is being learned.

    ``number``: 0 is the base stage; ``backbone``: the backbone with the adapter that is trained (a PEFT
    model; a plain one where all of its weights are trained); ``vocabulary``: the semantic vocabulary;
    ``total_steps``: optimiser steps; ``total_rate``: Σ of the learning rates over them; ``seed``: of the run;
    ``phase``: which of :meth:`Strategy.phases`; ``examples``: of this stage and those before; ``memory``:
    tensors that the strategy kept at the end of the last stage, by name, stored with the stage: what is in it
    at the end of this one is kept in turn; ``reset``: puts adapter and vocabulary to what they were before
    anything was learned (where stage 0 trained the backbone itself: vocabulary as stage 0 left it, adapter
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
        """What is learned, of backbone and vocabulary, by name."""
        parts = {"backbone": self.backbone, "vocabulary": self.vocabulary}
        return {
            f"{part}.{name}": parameter
            for part, module in parts.items()
            if module is not None
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    def everything(self) -> list[TargetSequence]:
        """The training targets of all stages up to this one."""
        assert self.examples is not None
        return [each for stage in range(self.number + 1) for each in self.examples.of(stage)]


class Strategy:
    """How a stage is learned. The defaults: every stage is learned, from the adapter of the last, freely.

    A strategy overrides what it does differently; one object serves one stage. The order in a stage is
    ``learns``, for each of its ``phases``: ``choose``, ``begin``, for every step ``output_penalty`` (once a
    forward pass), ``penalty`` and ``after_step``, then ``end``; and whenever the stage answers, ``answer``.
    Stage 0 is the same for all strategies: it is learned by the defaults, and no strategy is asked there.

    The options of a strategy are the fields of its nested class ``Options``: their types, bounds and defaults
    hold for a configuration and for the constructor alike. ::

        class Average(Strategy):
            name = "average"

            class Options(Strategy.Options):
                share: float = Field(0.5, gt=0, le=1)

            options: Options

    Then ``strategy: {name: average, share: 0.3}`` in a configuration is ``Average(share=0.3)`` in Python.

    Args:
        options: of this strategy, as keywords.

    Raises:
        ConfigError: an unknown or impossible option.
    """

    name: ClassVar[str] = ""
    """In a configuration; empty: only ``custom`` can name it."""
    reference: ClassVar[Literal["", "no updates", "fine-tuning", "retraining"]] = ""
    """What reports measure other strategies against it for: what updates bring, what an anchor changes and a
    strategy costs, what is lost by not retraining."""
    moves_one_adapter: ClassVar[bool] = False
    """Whether each stage moves the same adapter on, so that its way can be followed from stage to stage."""
    chooses_by_data: ClassVar[bool] = False
    """Whether :meth:`choose` looks at the examples alone, so that an estimate can ask it without a model."""
    relative_step_time: ClassVar[float] = 1.0
    """Seconds of a step, relative to plain fine-tuning of one adapter."""
    reads: ClassVar[frozenset[str]] = frozenset()
    """What it understands of what another strategy kept in the stage before: the first parts of names in
    :attr:`StageContext.memory`, and ``backbone`` for a trained backbone."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """What of that it cannot do without."""

    class Options(StrategyOptions):
        pass

    options: Any
    term: Term | None = None
    """The proximal term that holds the adapter to an anchor; None: there is no anchor."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if name := cls.__dict__.get("name"):
            STRATEGIES.add(name, cls)

    def __init__(self, **options: Any) -> None:
        self.options = type(self).Options.checked(self.name or type(self).__name__, options)

    @classmethod
    def of(cls, options: Any) -> Strategy:
        """The strategy with these options."""
        return cls(**options.given())

    @property
    def passes_per_answer(self) -> int:
        """Passes of a model that an answer takes."""
        return 1

    def anchored(self, context: StageContext) -> Source:
        """What the anchor holds."""
        return context.backbone

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
        hook returns is what is learned."""

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
        """What there is to tell of the stage that was learned, as JSON: for its metrics.json."""
        return {}

    def answer(self, model: Any, memory: Mapping[str, Tensor]) -> Any:
        """The model that answers for a stage: the stored one, or one made of it and of what was kept."""
        return model


def make_strategy(options: StrategyOptions) -> Strategy:
    """A fresh strategy for one stage.

    Raises:
        ConfigError: a strategy of your own that cannot be imported or made.
    """
    strategy: Strategy = STRATEGIES.find(options.name).of(options)
    return strategy


def strategies() -> dict[str, type[Strategy]]:
    """Every strategy by its name."""
    return STRATEGIES.everything()
