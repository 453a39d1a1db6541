"""The whole configuration: its sections, in the order in which they are used, and checks across sections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from peso.config.baselines import Baselines, default_baselines
from peso.config.data import DataConfig, expand_data
from peso.config.gate import GateConfig
from peso.config.items import ItemsConfig
from peso.config.model import (
    AdapterConfig,
    BackboneConfig,
    DecodingConfig,
    EvaluationConfig,
    HeadConfig,
    PromptConfig,
    ReportConfig,
    TrainingConfig,
)
from peso.config.parsing import Section, expand_name, new_key
from peso.config.strategy import DEFAULT, StrategyConfig, strategy_options

# what `strategy: paper` sets in other sections, beside training.loss_vocabulary (_default_loss_vocabulary)
PAPER = (("prompt", "layout", "instruct"), ("training", "rows", "all"), ("decoding", "repeats", "keep"))
Seed = Annotated[int, Field(ge=0, lt=2**31)]


class Config(Section):
    """Everything that determines a run. The fields are in the order in which they are used."""

    data: Annotated[DataConfig, BeforeValidator(expand_data)]
    items: ItemsConfig = ItemsConfig()
    backbone: Annotated[BackboneConfig, BeforeValidator(expand_name)] = BackboneConfig()
    prompt: PromptConfig = PromptConfig()
    adapter: AdapterConfig = AdapterConfig()
    head: Annotated[HeadConfig, BeforeValidator(expand_name)] = new_key(HeadConfig())
    strategy: StrategyConfig = Field(default_factory=lambda: strategy_options(DEFAULT))
    training: TrainingConfig = TrainingConfig()
    decoding: DecodingConfig = DecodingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    baselines: Baselines = Field(default_factory=default_baselines, description="none: no baseline")
    report: ReportConfig = ReportConfig()
    tracking: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = new_key(
        [], description="experiment trackers, such as [tensorboard]; one run a stage (docs/how-to/track.md)"
    )
    gate: GateConfig = new_key(GateConfig())
    seed: Seed = Field(0, description="fixes all random numbers; on the same machine, all results")
    data_seed: Seed | None = Field(
        None, description="seed of simulated data and semantic IDs; none given: seed"
    )
    base_seed: Seed | None = Field(None, description="seed of stage 0; none given: seed")

    @property
    def seed_of_data(self) -> int:
        """The seed of what is made before any stage is trained: simulated data and semantic IDs."""
        return self.seed if self.data_seed is None else self.data_seed

    def seed_of_stage(self, stage: int) -> int:
        """The seed of a stage. Runs that share stage 0 differ only in the seed of the later stages."""
        return self.seed if stage or self.base_seed is None else self.base_seed

    @model_validator(mode="before")
    @classmethod
    def _default_quantizer(cls, tree: Any) -> Any:
        """Use the category path of simulated items as their semantic ID, unless a quantizer is given."""
        if not isinstance(tree, Mapping) or not isinstance(tree.get("items") or {}, Mapping):
            return tree
        data = expand_data(tree.get("data"))
        items = tree.get("items") or {}
        if not isinstance(data, Mapping) or data.get("format") != "simulate" or "quantizer" in items:
            return tree
        return {**tree, "items": {**items, "quantizer": "category-path"}}

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        if self.items.behavior is not None and self.data.format == "peso-release":
            raise ValueError(
                "items.behavior has no meaning for data.format: peso-release, whose data contain the "
                "semantic IDs; remove it"
            )
        if self.training.gradient_checkpointing and self.strategy.observing:
            raise ValueError(
                f"training.gradient_checkpointing runs every module twice, but {self.strategy.observing} "
                "observes every forward pass; turn one of them off"
            )
        if self.training.sharding != "none" and self.backbone.trained_at_base:
            raise ValueError(
                f"training.sharding: {self.training.sharding} is for a pretrained backbone, which stays "
                f"frozen; stage 0 trains all weights of {self.backbone.name}, which fits one device. Set "
                "training.sharding: none"
            )
        if max(self.evaluation.k) > self.decoding.beams:
            raise ValueError(
                f"evaluation.k asks for {max(self.evaluation.k)} items, but decoding.beams is "
                f"{self.decoding.beams}; give at least as many beams"
            )
        if self.gate.enabled and not self.evaluation.enabled:
            raise ValueError(
                "gate.enabled needs tests, but evaluation.enabled is false; set evaluation.enabled: true, or "
                "gate.enabled: false"
            )
        if self.gate.enabled and (self.gate.k or 0) > self.decoding.beams:
            raise ValueError(
                f"gate.metric {self.gate.metric} needs {self.gate.k} items, but decoding.beams is "
                f"{self.decoding.beams}; give at least as many beams"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _default_protocol(cls, tree: Any) -> Any:
        """With ``strategy: paper``, use the protocol of the paper's released code where no other values are
        given: instructions as prompts, embedding and head trained whole, items of the history recommended."""
        if not isinstance(tree, Mapping) or tree.get("strategy") != "paper":
            return tree
        result = dict(tree)
        for name, key, value in PAPER:
            section = result.get(name) or {}
            if isinstance(section, Mapping) and section.get(key) is None:  # wrong types are refused later
                result[name] = {**section, key: value}
        return result

    @model_validator(mode="before")
    @classmethod
    def _default_loss_vocabulary(cls, tree: Any) -> Any:
        """Use ``full`` for ``prompt.layout: instruct`` and for ``strategy: paper``. The default for
        ``stream`` was chosen by experiments on real data (docs/reference/training.md)."""
        if not isinstance(tree, Mapping):
            return tree
        training = tree.get("training") or {}
        prompt = tree.get("prompt") or {}
        if not isinstance(training, Mapping) or not isinstance(prompt, Mapping):
            return tree  # wrong types are refused by pydantic
        paper = tree.get("strategy") == "paper" or prompt.get("layout") == "instruct"
        if training.get("loss_vocabulary") is not None or not paper:
            return tree
        return {**tree, "training": {**training, "loss_vocabulary": "full"}}
