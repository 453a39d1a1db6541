"""The section `compare`: the runs that `peso compare` makes from an ordinary configuration."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from peso.config.baselines import Baselines
from peso.config.data import expand_data
from peso.config.executors import ExecutorConfig, ProcessesConfig, explain_executor
from peso.config.parsing import Section, expand_name, read_tree, shown
from peso.config.reading import explained, leaves, merged, override, place, unknown_key
from peso.config.registry import UNKNOWN_NAME
from peso.config.strategy import expand_strategy
from peso.config.tree import Config, Seed
from peso.errors import ConfigError

Axis = Literal["data", "backbone", "strategy"]
EXPAND = {"data": expand_data, "backbone": expand_name, "strategy": expand_strategy}
MOST_VARIANTS = 10_000  # in one grid
NAME = re.compile(r"[\w+-][\w.+-]*")  # names are parts of paths, so only characters that are safe there


def _listed(value: Any) -> Any:
    """``[none, single]`` is short for ``{none: none, single: single}``."""
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        if len(set(value)) < len(value):
            raise ValueError(f"two variants have the same name in {value}; rename or remove one")
        return {name: name for name in value}
    if isinstance(value, list):
        options = next(each for each in value if not isinstance(each, str))
        raise ValueError(
            f"a list can only have names, not {shown(options)}; write a mapping with a name for each, such "
            "as {a: single, b: {name: peso, strength: 2}}"
        )
    return value


Variants = Annotated[dict[str, Any], BeforeValidator(_listed)]


class CompareConfig(Section):
    """Data sets × backbones × strategies × seeds. A variant is either the section of its axis, such as
    ``{name: peso, …}``, or several sections, with further keys under ``set``, such as
    ``{strategy: single, set: {adapter.rank: 4}}``."""

    data: Variants = Field({}, description="the data sets; none given: only the common `data`")
    backbones: Variants = Field({}, description="the backbones; none given: only the common `backbone`")
    strategies: Variants = Field(
        {}, description="the strategies by name; `[none, single]` is short for `{none: none, single: single}`"
    )
    grid: dict[str, Any] = Field(
        {}, description="strategies with lists of values; each combination becomes a run"
    )
    tune: dict[str, Any] = Field(
        {}, description="strategies with lists of values, from which the validation loss chooses"
    )
    baselines: Baselines | None = Field(None, description="none given: those of the common `baselines`")
    hybrid_with: list[str] = Field(
        [], description="strategies whose models the baseline hybrid is fused with; none given: the first"
    )
    transfer: bool | list[str] = Field(
        True,
        description="test the models of all stages of the first seed on the cases of all other stages; true: "
        "for every strategy not in grid; a list: for these strategies",
    )
    seeds: list[Seed] = Field([0], min_length=1, description="each strategy runs once per seed")
    share_base: bool = Field(True, description="one stage 0 for all seeds; false: trained again for each")
    workers: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="runs at once; auto: one per core, or per GPU; on a cluster as many as it has room for",
    )
    executor: ExecutorConfig = Field(
        ProcessesConfig(), description="where runs are executed: `processes`, `ray`, `dask` or `slurm`"
    )
    retries: int = Field(
        2, ge=0, description="how often a run is continued elsewhere after its machine was lost"
    )


@dataclass(frozen=True)
class Variant:
    """One value of an axis.

    Attributes:
        name: the name of the variant.
        sections: the sections that it sets in the common tree.
        changes: the values of dotted keys that it sets in the common tree.
        options: for a variant of a grid, all values that it sets, by dotted key.
    """

    name: str
    sections: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def apply(self, tree: dict[str, Any]) -> dict[str, Any]:
        """A copy of the tree with the changes of this variant. ``data``, ``backbone`` and ``strategy`` are
        replaced as a whole, because the options of one strategy have no meaning for another. Other sections
        are changed key by key."""
        result = dict(tree)
        for name, section in self.sections.items():
            below = result.get(name)
            both = name not in EXPAND and isinstance(section, Mapping) and isinstance(below, Mapping)
            result[name] = merged(below, section) if both else section
        for key, value in self.changes.items():
            place(result, key, value)
        return result


def load_comparison(source: Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], CompareConfig]:
    """The common tree of a comparison's file, not validated, and its validated section ``compare``.

    Raises:
        ConfigError: if the section is missing or not valid. The message names the key, the value and the
            nearest valid key.
    """
    tree = read_tree(source)
    for text in overrides:
        override(tree, text)
    if "compare" not in tree:
        raise ConfigError(f"{source} has no section compare; use `peso run` for a single run")
    section = tree.pop("compare")
    try:
        compare = CompareConfig.model_validate(section)
    except ValidationError as error:
        raise ConfigError(explained(error, _explain)) from None
    if not (compare.strategies or compare.grid or compare.tune):
        raise ConfigError("nothing to compare: give compare.strategies, compare.grid or compare.tune")
    if len(set(compare.seeds)) < len(compare.seeds):
        raise ConfigError(f"compare.seeds: {compare.seeds} contains a seed twice; remove it")
    return tree, compare


def variants(named: Mapping[str, Any], axis: Axis, key: str) -> list[Variant]:
    """The variants of an axis, in the order of the file.

    Args:
        named: the values of the variants by their names.
        axis: the axis that the variants belong to.
        key: the key that contains the variants, for messages.

    Raises:
        ConfigError: if a name cannot be part of a path, or a value is not a variant.
    """
    return [_variant(name, value, axis, f"{key}.{name}") for name, value in named.items()]


def grid(variant: Variant, key: str) -> list[Variant]:
    """One variant for every combination of the values in the lists. The last list varies fastest.

    Args:
        variant: a variant with lists of values.
        key: the key that contains it, for messages.

    Raises:
        ConfigError: if there is no list, a list is empty, or there are too many combinations.
    """
    options = dict([*leaves(variant.sections), *variant.changes.items()])
    lists = {name: values for name, values in options.items() if isinstance(values, list)}
    if not lists:
        raise ConfigError(
            f"{key}: no option is a list, so there is nothing to vary; move a single strategy to "
            "compare.strategies"
        )
    if empty := [name for name, values in lists.items() if not values]:
        raise ConfigError(f"{key}: {empty[0]} is an empty list; give at least one value")
    if (count := math.prod(map(len, lists.values()))) > MOST_VARIANTS:
        raise ConfigError(
            f"{key} has {count:,} combinations; at most {MOST_VARIANTS:,} can be compared at once, so remove "
            "values"
        )
    last = [name.rpartition(".")[2] for name in lists]
    names = last if len(set(last)) == len(last) else list(lists)
    result = []
    for values in itertools.product(*lists.values()):
        chosen = dict(zip(lists, values, strict=True))
        text = ",".join(f"{name}={_text(value)}" for name, value in zip(names, values, strict=True))
        result.append(
            Variant(
                f"{variant.name}[{text}]",
                variant.sections,
                {**variant.changes, **chosen},
                {**options, **chosen},
            )
        )
    return result


def _variant(name: str, value: Any, axis: Axis, key: str) -> Variant:
    if not NAME.fullmatch(name):
        raise ConfigError(f"{key}: a name must consist of letters, digits and . _ + -; got {shown(name)}")
    sections: dict[str, Any] = {axis: value}
    changes: Mapping[str, Any] = {}
    if isinstance(value, Mapping) and (axis in value or {*value} <= {*Config.model_fields, "set"}):
        sections = {section: below for section, below in value.items() if section != "set"}
        changes = value.get("set") or {}
    if value is None or not isinstance(changes, Mapping):
        raise ConfigError(
            f"{key}: expected {axis} options, sections or set: {{key: value}}; got {shown(value)}"
        )
    if dotted := [section for section in sections if "." in section]:
        raise ConfigError(
            f"{key}: a dotted key belongs in `set`: {{set: {{{dotted[0]}: {_text(sections[dotted[0]])}}}}}"
        )
    for section in EXPAND.keys() & sections.keys():  # expand short forms, so that options can be set in them
        sections[section] = EXPAND[section](sections[section])
    return Variant(name, sections, dict(changes))


def _text(value: Any) -> str:
    """A value as part of a name."""
    text = (
        value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else json.dumps(value)
    )
    return re.sub(r"[^\w.+-]+", "-", text).strip("-")


def _explain(problem: Any) -> str:
    parts = ["compare", *(str(part) for part in problem["loc"])]
    if parts[1:2] == ["executor"]:
        return explain_executor(problem, "compare.executor", problem["loc"][1:])
    key, value = ".".join(parts), shown(problem.get("input"))
    if problem["type"] == "extra_forbidden":
        return unknown_key(key, value, [f"compare.{name}" for name in CompareConfig.model_fields])
    if problem["type"] == UNKNOWN_NAME:
        name, known = shown(problem["ctx"]["name"]), problem["ctx"]["known"]
        return f"{key}: {name} is unknown; known are {known}"
    return f"{key[:80]}: {problem['msg'].removeprefix('Value error, ')}; got {value}"
