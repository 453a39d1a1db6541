"""The base class of strategies, and the context that its hooks receive.

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
    """One forward pass of a training step, passed to :meth:`Strategy.output_penalty`."""

    targets: Tensor  # int64 (target tokens,)

    def log_probabilities(self, values: Mapping[str, Tensor] | None = None) -> Tensor:
        """The log-probabilities of the candidate tokens at each target token: float32 (target tokens,
        candidate tokens).

        Args:
            values: parameters to use instead of the model's own, by the names of
                :meth:`StageContext.trainable`. This takes one more forward pass, in evaluation mode, and the
                result has no graph. By default, the result of the step's own pass, which is differentiable.
        """
        ...


class Examples(Protocol):
    """The training examples of all stages up to the current one, and the model's losses on them.

    Attributes:
        tokens: the number of target tokens per target.
        window: the number of items before the first target of a sequence that training reads.
    """

    tokens: int
    window: int

    def of(self, stage: int) -> Sequence[TargetSequence]:
        """The training targets of a stage, one sequence per user, with the items before them."""
        ...

    def losses(self, stage: int, count: int) -> Iterator[Tensor]:
        """The training losses of ``count`` single targets of a stage, drawn with the seed of the run. Each is
        the mean over the target's tokens, 0-d and differentiable, without dropout."""
        ...

    def show(self, stage: int, count: int) -> None:
        """Run the model on ``count`` target sequences of a stage, drawn with the seed of the run, without
        gradients and dropout. This is for hooks that record activations."""
        ...


@dataclass(frozen=True)
class StageContext:
    """The stage that is being trained.

    Attributes:
        number: the number of the stage; 0 is the base stage.
        backbone: the backbone with the trained adapter (a PEFT model), or a plain model if all of its weights
            are trained.
        total_steps: the number of optimizer steps.
        total_rate: the sum of the learning rates of these steps.
        seed: the seed of the run.
        phase: the current one of :meth:`Strategy.phases`.
        vocabulary: the semantic vocabulary.
        examples: the training examples of this stage and of earlier ones.
        memory: tensors by name that are stored with each stage. At the start, it has the tensors of the
            previous stage. Its contents at the end of this stage are passed to the next one.
        reset: a function that resets the adapter and the vocabulary to their values before any training. If
            stage 0 trained the backbone itself, the adapter is newly initialized, and the vocabulary gets its
            values after stage 0.
        validate: a function that returns the validation loss of the current weights. It is available in
            :meth:`Strategy.end`.
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
    validate: Callable[[], float] | None = None

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters of backbone and vocabulary that require a gradient, by name."""
        parts = {"backbone": self.backbone, "vocabulary": self.vocabulary}
        return {
            f"{part}.{name}": parameter
            for part, module in parts.items()
            if module is not None
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    def everything(self) -> list[TargetSequence]:
        """The training targets of all stages up to and including this one."""
        assert self.examples is not None
        return [each for stage in range(self.number + 1) for each in self.examples.of(stage)]


class Strategy:
    """How a stage is trained. By default, every stage trains the adapter of the previous one, unrestrained.

    A subclass overrides the hooks in which it differs. Each stage has its own object. The hooks are called in
    this order: ``learns``; then, for each of the ``phases``, ``choose``, ``begin``, in every step
    ``output_penalty`` (once per forward pass), ``penalty`` and ``after_step``, and finally ``end``. The hook
    ``answer`` is called whenever the stage is loaded for predictions. Stage 0 is trained with the default
    hooks, whatever the strategy.

    The options of a strategy are the fields of its nested class ``Options``, whose types, bounds and defaults
    apply to both the configuration and the constructor. ::

        class Average(Strategy):
            name = "average"

            class Options(Strategy.Options):
                share: float = Field(0.5, gt=0, le=1)

            options: Options

    Then ``strategy: {name: average, share: 0.3}`` in a configuration is ``Average(share=0.3)`` in Python.

    Args:
        options: the fields of ``Options``, as keywords.

    Raises:
        ConfigError: an unknown option or an invalid value.
    """

    name: ClassVar[str] = ""
    """The name in a configuration. If it is empty, the strategy is only available through ``custom``."""
    reference: ClassVar[Literal["", "no updates", "fine-tuning", "retraining"]] = ""
    """The role of the strategy as a reference in a report. Compared with ``no updates``, other strategies
    show the benefit of updates; with ``fine-tuning``, the effect of an anchor and the cost; with
    ``retraining``, the loss from not retraining."""
    moves_one_adapter: ClassVar[bool] = False
    """Whether every stage trains the same adapter further, so that distances between stages are defined."""
    chooses_by_data: ClassVar[bool] = False
    """Whether :meth:`choose` uses only the examples, so that an estimate can call it without a model."""
    relative_step_time: ClassVar[float] = 1.0
    """The time of a training step, relative to ``single``."""
    reads: ClassVar[frozenset[str]] = frozenset()
    """What this strategy can continue from if another strategy trained the previous stage: the first parts of
    names in :attr:`StageContext.memory`, and ``backbone`` for a trained backbone."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """The part of ``reads`` that must be present."""
    uses_frozen_weights: ClassVar[bool] = False
    """Whether a hook reads weights of the frozen backbone or their gradients directly, not only by running
    the model. These weights then cannot be sharded (``training.sharding``)."""

    class Options(StrategyOptions):
        pass

    options: Any
    term: Term | None = None
    """The proximal term; None if the strategy has no anchor."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if name := cls.__dict__.get("name"):
            STRATEGIES.add(name, cls)

    def __init__(self, **options: Any) -> None:
        self.options = type(self).Options.checked(self.name or type(self).__name__, options)

    @classmethod
    def of(cls, options: Any) -> Strategy:
        """Create the strategy with these options."""
        return cls(**options.given())

    @property
    def passes_per_answer(self) -> int:
        """The number of forward passes per prediction."""
        return 1

    def anchored(self, context: StageContext) -> Source:
        """The parameters that the proximal term penalizes."""
        return context.backbone

    def learns(self, stage: int) -> bool:
        """Whether the stage is trained. If not, it has the model of the previous stage."""
        return True

    def trains_backbone(self, stage: int) -> bool:
        """Whether the stage trains all weights of the backbone instead of an adapter."""
        return False

    def phases(self, stage: int) -> Sequence[str]:
        """The names of the trainings of a stage, which run one after another on the same model."""
        return ("",)

    def starts_anew(self, phase: str) -> bool:
        """Whether a phase trains from the beginning (:attr:`StageContext.reset`), so that it uses the
        learning rate of the base stage."""
        return False

    def choose(self, context: StageContext) -> Sequence[TargetSequence] | None:
        """The training examples; None for those of the stage. ``context.total_steps`` is not set yet."""
        return None

    def begin(self, context: StageContext) -> None:
        """Called before the first step. The parameters that require a gradient when this hook returns are
        trained. The backbone has the adapter of the previous stage, even if an interrupted stage continues;
        the state of its checkpoint is restored afterwards."""

    def penalty(self, context: StageContext) -> Tensor | None:
        """Called once per step. Returns a weighted penalty to add to the loss, 0-d and differentiable with
        respect to trained parameters, or None."""
        return None

    def output_penalty(self, context: StageContext, outputs: ForwardPass) -> Tensor | None:
        """Called once per forward pass of a step, before its backward pass. Returns a penalty on the outputs
        of this pass, as :meth:`penalty` does. Passes are weighted by their numbers of target tokens."""
        return None

    def after_step(self, context: StageContext, learning_rate: float) -> None:
        """Called after each optimizer step, with the learning rate of that step."""

    def running(self) -> Mapping[str, Tensor]:
        """Called after ``begin``. Returns tensors that are validated and kept instead of the trained
        parameters, one for each name of :meth:`StageContext.trainable`. ``after_step`` must update them in
        place; checkpoints include them. If there are none, the trained parameters are kept."""
        return {}

    def end(self, context: StageContext) -> None:
        """Called after the last step, when the model has the weights of the best epoch. The hook may change
        them before they are stored."""

    def figures(self) -> dict[str, Any]:
        """Additional values for the stage's ``metrics.json``, as JSON."""
        return {}

    def answer(self, model: Any, memory: Mapping[str, Tensor]) -> Any:
        """The model that predicts for a stage: the stored model, or one built from it and ``memory``."""
        return model


def make_strategy(options: StrategyOptions) -> Strategy:
    """Create the strategy object of one stage.

    Raises:
        ConfigError: the class of a custom strategy cannot be imported or created.
    """
    strategy: Strategy = STRATEGIES.find(options.name).of(options)
    return strategy


def strategies() -> dict[str, type[Strategy]]:
    """Every strategy by its name."""
    return STRATEGIES.everything()
