"""What every part of the configuration is: typed, immutable, without unknown keys."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the tree: immutable, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)
