"""The recommenders that a run is set beside: the section `baselines`, one class a baseline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, model_validator

from peso.config.model import MOST_BEAMS, MOST_EPOCHS
from peso.config.section import Repeats, Section


class BaselineOptions(Section):
    """What every baseline takes (docs/reference/baselines.md)."""

    repeats: Repeats = Field(
        "auto",
        description="items that a user has had, as answers; auto: left out where no training target was one",
    )


class NetworkOptions(BaselineOptions):
    """What the baselines with a network take. Epochs are the most; the best by validation loss is kept."""

    width: int = Field(64, ge=1, description="of every embedding")
    epochs: int = Field(20, ge=1, le=MOST_EPOCHS)
    patience: int = Field(2, ge=1, description="epochs without a better validation loss that end a stage")
    batch_size: int = Field(256, ge=1, description="targets (two-tower) or sequences (sasrec) in one step")
    learning_rate: float = Field(1e-3, gt=0)
    later_learning_rate_scale: float = Field(1.0, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    dropout: float = Field(0.2, ge=0, lt=1)


class PopularityConfig(BaselineOptions):
    """The items that most events were about."""

    name: Literal["popularity"] = "popularity"
    last: int | None = Field(
        None, ge=1, description="count the newest so many stages only; none given: everything so far"
    )


class ItemKnnConfig(BaselineOptions):
    """Cosine similarity of items by the users that they share."""

    name: Literal["item-knn"] = "item-knn"
    neighbours: int = Field(100, ge=1, description="of an item that are kept")
    shrinkage: float = Field(10.0, ge=0, description="added to the denominator: doubts what few users tell")


class EaseConfig(BaselineOptions):
    """A linear model of items on items in closed form."""

    name: Literal["ease"] = "ease"
    items: int = Field(5000, ge=1, description="that take part: those with most users; memory grows squared")
    regularisation: float = Field(50.0, gt=0)


class TwoTowerConfig(NetworkOptions):
    """An explicit vector for each user and item."""

    name: Literal["two-tower"] = "two-tower"
    user_dropout: float = Field(
        0.5, ge=0, lt=1, description="share of training cases answered from the history alone"
    )


class SasRecConfig(NetworkOptions):
    """A small causal Transformer over items."""

    name: Literal["sasrec"] = "sasrec"
    layers: int = Field(2, ge=1)
    heads: int = Field(2, ge=1)
    batch_size: int = Field(64, ge=1, description="sequences in one step")

    @model_validator(mode="after")
    def _shares_its_width(self) -> SasRecConfig:
        if self.width % self.heads:
            raise ValueError(
                f"sasrec: width {self.width} cannot be shared by {self.heads} heads; choose a multiple"
            )
        return self


class HybridConfig(Section):
    """The two-tower model and the run's own language model, fused."""

    name: Literal["hybrid"] = "hybrid"
    candidates: int = Field(50, ge=1, le=MOST_BEAMS, description="semantic IDs that each of the two proposes")
    weight: float | None = Field(
        None, ge=0, le=1, description="of the two-tower's log-probability; none given: tuned on validation"
    )
    two_tower: TwoTowerConfig = TwoTowerConfig()


PlainBaselineConfig = PopularityConfig | ItemKnnConfig | EaseConfig | TwoTowerConfig | SasRecConfig
BaselineConfig = PlainBaselineConfig | HybridConfig
# each takes seconds
DEFAULT_BASELINES: list[BaselineConfig] = [PopularityConfig(last=1), ItemKnnConfig(), EaseConfig()]


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _listed(value: Any) -> Any:
    if value is None or value == "none":
        return []
    return [value] if isinstance(value, str | Mapping) else value


Baselines = Annotated[
    list[Annotated[BaselineConfig, Field(discriminator="name"), BeforeValidator(_named)]],
    BeforeValidator(_listed),
]


def read_baseline(options: Mapping[str, Any]) -> BaselineConfig:
    """A baseline from its options as they were dumped, the name among them."""
    read = TypeAdapter[BaselineConfig](Annotated[BaselineConfig, Field(discriminator="name")])
    return read.validate_python(options)


def is_random(config: BaselineConfig) -> bool:
    """Whether what it learns depends on a seed: the networks do, what is counted or solved does not."""
    return isinstance(config, NetworkOptions | HybridConfig)


def baseline_label(config: BaselineConfig) -> str:
    """``popularity``, or with options that are not the defaults ``popularity last=1``; tells them apart."""
    own = config.model_dump(mode="json", exclude={"name"}, exclude_defaults=True)

    def words(options: Mapping[str, Any], prefix: str = "") -> list[str]:
        return [
            text
            for key, value in options.items()
            for text in (
                words(value, f"{prefix}{key}.")
                if isinstance(value, Mapping)
                else [f"{prefix}{key}={value:g}" if isinstance(value, float) else f"{prefix}{key}={value}"]
            )
        ]

    return " ".join([config.name, *words(own)])
