"""The section `items`: how items get their semantic IDs."""

from __future__ import annotations

from string import Formatter
from typing import Annotated, Literal

from pydantic import Field, model_validator

from peso.config.model import WIDEST
from peso.config.parsing import Section, new_key

HASHING, FILES = "hashing", "vectors"  # the encoders that are not models


class RqVaeConfig(Section):
    """The network of ``items.quantizer: rq-vae`` and its training. Other quantizers do not use it."""

    hidden: list[Annotated[int, Field(ge=1, le=WIDEST)]] = Field(
        [256],
        min_length=1,
        description="widths of the encoder's hidden layers; the decoder has them in reverse order",
    )
    latent: int = Field(64, ge=2, le=WIDEST, description="width of the latent vectors that are quantized")
    steps: int = Field(1000, ge=1, le=100_000, description="optimizer steps")
    batch_size: int = Field(1024, ge=1, description="items in one optimizer step")
    learning_rate: float = Field(1e-3, gt=0, description="learning rate of AdamW")
    commitment: float = Field(
        0.25, ge=0, description="weight of the loss that keeps the encoder's output close to its codes"
    )


class BehaviorConfig(Section):
    """Vectors of the items' co-occurrence, in addition to those of their contents (docs/reference/items.md).

    It is used if the section is given; ``items.behavior: {}`` takes the defaults.
    """

    weight: float = Field(
        0.5, gt=0, lt=1, description="share of behavior in the squared distance between two items"
    )
    dimensions: int = Field(128, ge=2, le=WIDEST, description="width of the vectors")
    window: int = Field(
        5, ge=1, le=100, description="largest distance of two items that count as occurring together"
    )
    shift: float = Field(
        1.0, ge=1, description="the logarithm of this is subtracted from PMI (negative samples of word2vec)"
    )


class RefreshConfig(Section):
    """Items whose behavior has drifted get new codes at later stages (docs/reference/items.md).

    It is used if the section is given; ``items.refresh: {}`` takes the defaults.
    """

    every: Literal["stage"] | Annotated[int, Field(ge=1)] = Field(
        "stage", description="stage: at every later stage; n: at stages n, 2n, …"
    )
    drift: float = Field(
        0.25,
        gt=0,
        description="least squared distance of an item's behavior now from that at its last coding; 1 is the "
        "mean squared distance of items from their center",
    )
    support: int = Field(10, ge=1, description="least training events of an item since its last coding")
    depth: int = Field(
        1, ge=1, description="the nearest codes must differ in one of the first `depth` levels"
    )
    share: float = Field(
        0.1, gt=0, le=1, description="largest share of the items that change codes at a stage, by drift"
    )

    def is_due(self, stage: int) -> bool:
        """Whether codes are refreshed at a stage."""
        return stage > 0 and (self.every == "stage" or stage % self.every == 0)


class ItemsConfig(Section):
    """How items get their semantic IDs (docs/reference/items.md). Unused if the data contain semantic IDs.

    ``encoder`` is ``hashing``, ``vectors`` (only the vectors of the files in ``vectors``), or a text encoder:
    ``all-minilm-l6-v2``, or the name or path of a sentence-transformers or Transformers model, which can be a
    causal language model.
    """

    encoder: str = Field(
        HASHING,
        min_length=1,
        description="how text becomes vectors: hashing, all-minilm-l6-v2, another model, or vectors (only "
        "the files)",
    )
    dimensions: int = Field(128, ge=2, description="hashing only: width of the vectors")
    template: str = Field(
        "{title}\n{category}\n{text}",
        description="the text of an item; a line whose fields are all empty is left out",
    )
    max_tokens: int = Field(256, ge=1, description="text encoders only: most tokens of an item that are read")
    vectors: list[str] = Field([], description="files of vectors, which are fused with those of the encoder")
    # written only if it is given, because earlier versions do not have this key
    behavior: BehaviorConfig | None = new_key(
        None, description="none: codes are made from the items' contents alone"
    )
    # as above
    refresh: RefreshConfig | None = new_key(
        None, description="none: the code of an existing item never changes"
    )
    index: str | None = Field(
        None, description="an existing index.json, whose semantic IDs are used; nothing is fitted"
    )
    quantizer: Literal["rq-vae", "rq-kmeans", "balanced-rq-kmeans", "category-path"] = Field(
        "rq-vae", description="how vectors become codes; the default for simulated items is category-path"
    )
    levels: int = Field(4, ge=1, le=25, description="number of codes in a semantic ID")
    codes: int = Field(256, ge=2, le=65_536, description="codes per level; fewer if the catalog is small")
    collisions: Literal["reassign", "extra-level", "allow"] = Field(
        "reassign", description="what happens if several items have the same codes"
    )
    fit: Literal["base", "all"] = Field(
        "base", description="base: fit to the items of stage 0; all: fit to the items of all stages"
    )
    rq_vae: RqVaeConfig = RqVaeConfig()

    @property
    def needs_texts(self) -> bool:
        """Whether semantic IDs can be made only from titles, texts or categories."""
        return self.index is None and not self.vectors and self.behavior is None

    @model_validator(mode="after")
    def _fits_together(self) -> ItemsConfig:
        fields = {"title", "text", "category"}
        try:
            named = {name for _, name, _, _ in Formatter().parse(self.template) if name is not None}
        except ValueError as error:
            raise ValueError(
                f"items.template {self.template!r} is not a template ({error}); write fields as {{title}}, "
                "and double the braces that are text"
            ) from None
        if not named or not named <= fields:
            raise ValueError(
                "items.template can contain only the fields {title}, {text} and {category}, and needs at "
                f"least one; got {self.template!r}"
            )
        if self.encoder == FILES and not self.vectors:
            raise ValueError("items.encoder: vectors needs files in items.vectors")
        if self.behavior is not None and self.index is not None:
            raise ValueError(
                "items.behavior has no meaning with items.index, whose codes are used unchanged; remove one "
                "of them"
            )
        if self.behavior is not None and self.quantizer == "category-path":
            raise ValueError(
                "items.behavior has no meaning with items.quantizer: category-path, which uses no vectors; "
                "set another quantizer, such as rq-kmeans, or remove items.behavior"
            )
        if self.refresh is not None:
            self._can_refresh(self.refresh)
        return self

    def _can_refresh(self, refresh: RefreshConfig) -> None:
        if self.behavior is None:
            raise ValueError(
                "items.refresh gives new codes to items whose behavior has drifted, so it needs "
                "items.behavior (`items.behavior: {}` takes its defaults)"
            )
        if self.fit == "all":
            raise ValueError(
                "items.refresh has no meaning with items.fit: all, whose codes are made from the behavior of "
                "every stage; remove one of them"
            )
        if refresh.depth > self.levels:
            raise ValueError(
                f"items.refresh.depth {refresh.depth} is more than items.levels {self.levels}; give at most "
                "the number of levels"
            )
