"""How later stages are learnt: the section `strategy`, one class a strategy with the options it takes.

Knows names, options and where each strategy lives; a new one is a class here (its registration) and a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from peso.config.section import Section
from peso.errors import ConfigError

Coupling = Literal["loss", "decoupled"]
History = Literal["all", "latest"]


class StrategySection(Section):
    """``home``: the class that does it, made with the options as keyword arguments.

    What it can go on from where the last stage was trained with another strategy, beside adapter and
    vocabulary, as kinds of tensors in the stage's ``state.safetensors`` (the first part of their names;
    ``backbone``: a trained backbone): ``reads`` says which of them it understands, ``needs`` which have to
    be there, ``anew`` that it begins without any.
    """

    home: ClassVar[str]
    reads: ClassVar[frozenset[str]] = frozenset()
    needs: ClassVar[frozenset[str]] = frozenset()
    anew: ClassVar[bool] = False

    def options(self) -> dict[str, Any]:
        return self.model_dump(exclude={"name"})


class NoneConfig(StrategySection):
    """Only stage 0 is learnt; later stages inherit it unchanged."""

    home = "peso.training.strategies.none.NoUpdates"
    reads = frozenset({"past"})
    name: Literal["none"]


class SingleConfig(StrategySection):
    """One adapter, fine-tuned on every stage from where the last one left it."""

    home = "peso.training.strategies.single.SingleAdapter"
    name: Literal["single"]


class PesoConfig(StrategySection):
    """``single``, kept near its last state by a proximal term."""

    home = "peso.training.strategies.peso.Peso"
    name: Literal["peso"]
    proximal: str = Field(
        "softmax_kl",
        description="softmax_kl, per_rank_kl, l2, fisher, orthogonal or output_kl; or a term of your own, "
        "as a class that Python can import: my_package.my_term.MyTerm",
    )
    strength: float | None = Field(None, ge=0, description="dimensionless; 1 unless a weight is given")
    weight: float | None = Field(None, ge=0, description="raw: what it does depends on sizes and rates")
    coupling: Coupling | None = Field(
        None, description="unless given: decoupled for a strength, loss for a weight"
    )
    reduction: Literal["sum", "mean"] = "mean"
    temperature: float | Literal["auto"] = Field(1.0, description="of softmax_kl and per_rank_kl")
    groups: Literal["factor", "module", "rank", "all"] = "factor"
    vocabulary: bool = Field(False, description="anchor the rows of the semantic vocabulary too")
    examples: int = Field(64, ge=2, description="single targets that ρ̄ and fisher are estimated from")

    @model_validator(mode="before")
    @classmethod
    def _strength_is_default(cls, tree: Any) -> Any:
        """``peso`` alone means strength 1; a strength is decoupled, a weight in the loss."""
        if not isinstance(tree, Mapping):
            return tree
        result = dict(tree)
        if result.get("strength") is None and result.get("weight") is None:
            result["strength"] = 1.0
        if result.get("coupling") is None:
            term = _term(result.get("proximal"))
            in_loss = result.get("weight") is not None or (term and not term.has_decoupled_form)
            result["coupling"] = "loss" if in_loss else "decoupled"
        return result

    @model_validator(mode="after")
    def _possible(self) -> PesoConfig:
        if self.strength is not None and self.weight is not None:
            raise ValueError("strength and weight are two ways to say the same: give one of them")
        term = _term(self.proximal)
        if term and not term.has_decoupled_form and self.coupling == "decoupled":
            raise ValueError(f"coupling: {self.proximal} has no decoupled form; use coupling: loss")
        if self.temperature != "auto" and not self.temperature > 0:
            raise ValueError(f"temperature {self.temperature} must be above 0")
        return self

    @property
    def watches_outputs(self) -> bool:
        term = _term(self.proximal)
        return bool(term and term.watches_outputs)


def _term(name: Any) -> Any:
    """The class of a proximal term. None for the default, so that commands that only read a configuration do
    not load PyTorch, and for a class from elsewhere: reading a configuration must not run its code."""
    if not isinstance(name, str) or name == PesoConfig.model_fields["proximal"].default or "." in name:
        return None
    try:
        return import_module("peso.adapters.proximal").find_term(name)
    except ConfigError as error:
        raise ValueError(f"strategy.proximal: {error}") from None


class SumLoraConfig(StrategySection):
    """A new adapter beside the frozen ones of earlier stages, each factor of these divided by its norm."""

    home = "peso.training.strategies.sum_lora.SumLora"
    reads = frozenset({"past"})
    name: Literal["sum_lora"]
    history: History = "all"
    inherit: bool = Field(False, description="begin at the last adapter instead of a fresh one")


class SdLoraConfig(StrategySection):
    """``sum_lora`` with a learnable magnitude for every earlier adapter (SD-LoRA)."""

    home = "peso.training.strategies.sum_lora.SdLora"
    reads = frozenset({"past"})
    name: Literal["sd_lora"]
    history: History = "all"
    inherit: bool = False


class InfLoraConfig(StrategySection):
    """A new adapter whose A spans directions free of earlier inputs, B alone trained (InfLoRA)."""

    home = "peso.training.strategies.inf_lora.InfLora"
    reads = frozenset({"past", "inputs"})
    needs = frozenset({"inputs"})
    name: Literal["inf_lora"]
    threshold: float = Field(0.95, gt=0, le=1, description="share of the inputs' energy that is protected")
    examples: int = Field(512, ge=1, description="target sequences whose inputs are looked at")


class OLoraConfig(StrategySection):
    """A new adapter, penalised for overlapping with the A of earlier ones (O-LoRA)."""

    home = "peso.training.strategies.o_lora.OLora"
    reads = frozenset({"past"})
    name: Literal["o_lora"]
    weight: float = Field(0.5, ge=0)


class LsatConfig(StrategySection):
    """A long-term adapter on all data so far and a short-term one on the new stage, fused (LSAT)."""

    home = "peso.training.strategies.lsat.Lsat"
    anew = True
    name: Literal["lsat"]
    fusion: Literal["outputs", "arithmetic"] = "outputs"
    long_share: float = Field(0.5, ge=0, le=1, description="weight of the long-term adapter")


class ReplayConfig(StrategySection):
    """``single`` on the new stage and a sample of earlier ones of fixed size (reservoir)."""

    home = "peso.training.strategies.replay.Replay"
    reads = needs = frozenset({"replay"})
    name: Literal["replay"]
    budget: int = Field(1000, ge=1, description="target sequences of earlier stages that are kept")


class DistillConfig(StrategySection):
    """``single`` with the model of the previous stage as teacher on the new data."""

    home = "peso.training.strategies.distill.Distill"
    name: Literal["distill"]
    weight: float = Field(1.0, ge=0)
    temperature: float = Field(1.0, gt=0)


class AverageConfig(StrategySection):
    """``single``, each stage's result averaged with what came before it."""

    home = "peso.training.strategies.average.Average"
    name: Literal["average"]
    share: float = Field(0.5, gt=0, le=1, description="weight of the newest stage in the running average")


class RetrainConfig(StrategySection):
    """One adapter, learnt anew at every stage on all data so far."""

    home = "peso.training.strategies.retrain.Retrain"
    anew = True
    name: Literal["retrain"]


class FullConfig(StrategySection):
    """All weights of the backbone, fine-tuned on every stage."""

    home = "peso.training.strategies.full.FullFineTuning"
    reads = frozenset({"backbone"})
    name: Literal["full"]


class CustomConfig(StrategySection):
    """A strategy of one's own: ``module`` is a class that Python can import, made with ``options``."""

    home = "peso.training.strategies.strategy.Strategy"
    name: Literal["custom"]
    module: str = Field(description="e.g. my_package.my_strategy.MyStrategy")
    arguments: dict[str, Any] = Field(default={}, description="given to it as keyword arguments")


StrategyConfig = (
    NoneConfig
    | SingleConfig
    | PesoConfig
    | SumLoraConfig
    | SdLoraConfig
    | InfLoraConfig
    | OLoraConfig
    | LsatConfig
    | ReplayConfig
    | DistillConfig
    | AverageConfig
    | RetrainConfig
    | FullConfig
    | CustomConfig
)


def expand_strategy(value: Any) -> Any:
    """The short forms of the section written out: a name, or `paper`."""
    if value == "paper":
        return {"name": "peso", "weight": 2.0, "reduction": "mean"}
    if isinstance(value, str):
        return {"name": value}
    return {"name": "peso", **value} if isinstance(value, Mapping) else value
