"""The one typed, validated configuration tree.

Knows every key, its type, its default and what is allowed; knows nothing of what the keys are used for.
A configuration is read from YAML, changed by ``--set a.b=value`` and written back as resolved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Layout = Literal["stream", "instruct"]
LossVocabulary = Literal["full", "semantic", "level"]
Precision = Literal["auto", "float32", "bfloat16"]


class Section(BaseModel):
    """A part of the tree: immutable, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SimulateConfig(Section):
    """Size of the embedded stream. ``stages`` counts stage 0 too."""

    users: int = Field(600, ge=10)
    items: int = Field(400, ge=20)
    stages: int = Field(5, ge=1)


class DataConfig(Section):
    format: Literal["peso-release", "simulate"]
    path: str | None = None
    simulate: SimulateConfig = SimulateConfig()

    @model_validator(mode="after")
    def _needs_path(self) -> DataConfig:
        if self.format != "simulate" and self.path is None:
            raise ValueError(f"data.path is required for data.format: {self.format}")
        return self


class BackboneConfig(Section):
    """``name``: a hub name, a path, an asset of ``peso pull``, ``scratch`` or ``tiny``."""

    name: str = "smollm2-135m"
    layers: int | None = Field(None, ge=1, description="keep the first n layers; for scratch: its depth")
    width: int | None = Field(None, ge=8, description="scratch and tiny only: hidden width")


class PromptConfig(Section):
    layout: Layout = "stream"
    window: int = Field(20, ge=1)


class AdapterConfig(Section):
    rank: int = Field(8, ge=1)
    alpha: float = Field(16, gt=0)
    dropout: float = Field(0.05, ge=0, lt=1)
    targets: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], min_length=1
    )


class StrategyConfig(Section):
    """How later stages are learnt. Which options apply depends on ``name``."""

    name: Literal["none", "single", "peso"] = "peso"
    weight: float = Field(2.0, ge=0)
    reduction: Literal["sum", "mean"] = "mean"


def _strategy(value: Any) -> Any:
    if value == "paper":
        return {"name": "peso", "weight": 2.0, "reduction": "mean"}
    return {"name": value} if isinstance(value, str) else value


def _data(value: Any) -> Any:
    # design: `simulate` is itself a section (users, items, stages), so naming it alone is enough
    if value == "simulate":
        return {"format": "simulate"}
    if isinstance(value, Mapping) and "simulate" in value and "format" not in value:
        return {"format": "simulate", **value}
    return value


def _backbone(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class TrainingConfig(Section):
    epochs: int = Field(4, ge=1)
    learning_rate: float = Field(2e-4, gt=0)
    later_learning_rate_scale: float = Field(0.1, gt=0)
    batch_size: int = Field(32, ge=1, description="targets in one optimiser step, in every layout")
    max_steps: int | None = Field(None, ge=1)
    loss_vocabulary: LossVocabulary | None = Field(
        None, description="none given: the default of the layout (docs/training.md)"
    )
    temperature: float = Field(0.8, gt=0)
    max_grad_norm: float = Field(1.0, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup: float = Field(0.01, ge=0, lt=1)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    precision: Precision = "auto"
    device: str = "auto"
    validation_cases: int | None = Field(
        None, ge=1, description="validate on a seeded sample of so many cases; none given: on all"
    )


class DecodingConfig(Section):
    beams: int = Field(10, ge=1, le=500)
    batch_size: int = Field(64, ge=1, description="users decoded together")


class EvaluationConfig(Section):
    enabled: bool = True
    k: list[Annotated[int, Field(ge=1)]] = Field([5, 10], min_length=1)


class ReportConfig(Section):
    title: str | None = None


class Config(Section):
    """Everything a run is determined by. Field order is the order of the work."""

    data: Annotated[DataConfig, BeforeValidator(_data)]
    backbone: Annotated[BackboneConfig, BeforeValidator(_backbone)] = BackboneConfig()
    prompt: PromptConfig = PromptConfig()
    adapter: AdapterConfig = AdapterConfig()
    strategy: Annotated[StrategyConfig, BeforeValidator(_strategy)] = StrategyConfig()
    training: TrainingConfig = TrainingConfig()
    decoding: DecodingConfig = DecodingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    report: ReportConfig = ReportConfig()
    seed: int = Field(0, ge=0, lt=2**31)
