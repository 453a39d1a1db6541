"""How items get their semantic IDs: the section `items`."""

from __future__ import annotations

from string import Formatter
from typing import Annotated, Literal

from pydantic import Field, model_validator

from peso.config.parsing import Section

HASHING, FILES = "hashing", "vectors"  # encoders that are not models


class RqVaeConfig(Section):
    """The network of ``items.quantizer: rq-vae`` and how it is trained; unused by the other quantisers."""

    hidden: list[Annotated[int, Field(ge=1)]] = Field(
        [256],
        min_length=1,
        description="widths between the vectors and the latent, mirrored in the decoder",
    )
    latent: int = Field(64, ge=2, description="width of the space that the codebooks quantise")
    steps: int = Field(1000, ge=1, le=100_000, description="optimiser steps")
    batch_size: int = Field(1024, ge=1, description="items in one optimiser step")
    learning_rate: float = Field(1e-3, gt=0, description="of AdamW")
    commitment: float = Field(0.25, ge=0, description="weight that holds the encoder to its codes")


class ItemsConfig(Section):
    """How items get their semantic IDs (docs/reference/items.md); unused where the data bring an index.

    ``encoder``: ``hashing``, ``vectors`` (those of the files in ``vectors`` alone), or a text encoder:
    ``all-minilm-l6-v2``, any sentence-transformers or Transformers name or path, causal LMs included.
    """

    encoder: str = Field(
        HASHING,
        min_length=1,
        description="text to vectors: hashing, all-minilm-l6-v2, another model, or vectors (the files alone)",
    )
    dimensions: int = Field(128, ge=2, description="hashing only: width of the vectors")
    template: str = Field(
        "{title}\n{category}\n{text}", description="a line whose fields are all empty is dropped"
    )
    max_tokens: int = Field(256, ge=1, description="text encoders only: tokens of an item that are read")
    vectors: list[str] = Field([], description="files of vectors, fused with those of the encoder")
    index: str | None = Field(
        None, description="an index.json made elsewhere: its IDs are taken, nothing is fitted"
    )
    quantizer: Literal["rq-vae", "rq-kmeans", "balanced-rq-kmeans", "category-path"] = Field(
        "rq-vae",
        description="vectors to codes; simulated items take their category-path unless told otherwise",
    )
    levels: int = Field(4, ge=1, le=25, description="codes of a semantic ID")
    codes: int = Field(256, ge=2, le=65_536, description="codes a level; fewer where the catalogue is small")
    collisions: Literal["reassign", "extra-level", "allow"] = Field(
        "reassign", description="what happens to items that want the same ID"
    )
    fit: Literal["base", "all"] = Field(
        "base", description="fit to the items of stage 0, those of later stages get frozen codes; or to all"
    )
    rq_vae: RqVaeConfig = RqVaeConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> ItemsConfig:
        fields = {"title", "text", "category"}
        try:
            named = {name for _, name, _, _ in Formatter().parse(self.template) if name is not None}
        except ValueError as error:
            raise ValueError(f"items.template {self.template!r} is not a template ({error})") from None
        if not named or not named <= fields:
            raise ValueError(
                f"items.template takes the fields {{title}}, {{text}} and {{category}}; got {self.template!r}"
            )
        if self.encoder == FILES and not self.vectors:
            raise ValueError("items.encoder: vectors needs files in items.vectors")
        return self
