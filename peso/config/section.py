"""What every part of the configuration is: typed, immutable, without unknown keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, model_validator

# items that a user has had, as answers; auto: left out where no training target was a repeat
Repeats = Literal["auto", "keep", "leave-out"]
LARGEST = 2**31 - 1  # of a count: what arrays are indexed with
EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


class Section(BaseModel):
    """A part of the tree: immutable, no unknown keys, values of exactly the type that a key takes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _numbers(cls, tree: Any) -> Any:
        """YAML 1.1 reads 2e-4 as text."""
        if not isinstance(tree, Mapping):
            return tree
        result = dict(tree)
        for key in cls.model_fields.keys() & tree.keys():
            value, kinds = tree[key], plain_types(cls.model_fields[key].annotation)
            if float in kinds and str not in kinds:
                result[key] = [_number(v) for v in value] if isinstance(value, list) else _number(value)
            counts = value if isinstance(value, list) else [value]
            too_large = any(isinstance(count, int) and count > LARGEST for count in counts)
            if too_large and int in kinds and not {float, str} & kinds:
                raise ValueError(f"{key} is too large: a count is at most {LARGEST:,}")
        return result


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and EXPONENT.fullmatch(value) else value


def plain_types(annotation: Any) -> frozenset[Any]:
    """The plain types that an annotation allows, those within lists and unions included."""
    return frozenset([annotation]).union(*map(plain_types, get_args(annotation)))
