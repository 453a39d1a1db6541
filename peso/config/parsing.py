"""Read YAML as a plain tree, and the base class of all sections of the configuration.

Duplicate keys are refused. Size, depth and aliases are limited. Sections are typed and immutable, and do not
accept unknown keys.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from copy import deepcopy
from functools import lru_cache, partial
from operator import eq
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from peso.errors import ConfigError

MOST_BYTES = 1_000_000
MOST_VALUES = 50_000  # with aliases expanded
DEEPEST = 40
INT, FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"


class _Refused(yaml.MarkedYAMLError):
    pass


class _Loader(yaml.SafeLoader):
    """A loader of plain values. The octal (010) and base-60 numbers (1:30) of YAML 1.1 are read as text."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._values = 0
        self._sizes: dict[yaml.Node, int] = {}  # the sizes of complete nodes, with aliases expanded

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        alias, before = self.check_event(yaml.AliasEvent), self._values
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        self._depth, self._values = self._depth + 1, self._values + 1
        if self._depth > DEEPEST:
            raise _Refused(problem=f"nested more than {DEEPEST} levels deep", problem_mark=mark)
        node = super().compose_node(parent, index)
        assert node is not None
        self._depth -= 1
        if alias and node not in self._sizes:
            raise _Refused(problem="an alias that refers to a value that contains it", problem_mark=mark)
        if alias:
            self._values += self._sizes[node]
        if self._values > MOST_VALUES:
            raise _Refused(problem=f"more than {MOST_VALUES:,} values", problem_mark=mark)
        self._sizes.setdefault(node, self._values - before)
        return node

    def construct_yaml_timestamp(self, node: yaml.ScalarNode) -> Any:
        try:
            return super().construct_yaml_timestamp(node)
        except ValueError as error:
            problem = f"{shown(node.value)} is not a date ({error})"
            raise _Refused(problem=problem, problem_mark=node.start_mark) from None

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], yaml.Mark] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (seen := first.setdefault((key.tag, key.value), key.start_mark)) is not key.start_mark:
                problem = f"the key {shown(key.value)} occurs twice (first in line {seen.line + 1})"
                raise _Refused(problem=f"{problem}; keep one of them", problem_mark=key.start_mark)
        return node


_Loader.add_constructor("tag:yaml.org,2002:timestamp", _Loader.construct_yaml_timestamp)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (INT, FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    INT, re.compile(r"[-+]?(0|[1-9][\d_]{0,30}|0x[\da-fA-F]{1,16})$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    FLOAT,
    re.compile(
        r"([-+]?\d[\d_]*\.[\d_]*([eE][-+]\d+)?|[-+]?\.\d+([eE][-+]\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def parse(text: str, where: str) -> Any:
    """The value of a YAML text.

    Args:
        where: a description of the text for messages, such as the name of its file.

    Raises:
        ConfigError: if the text is not valid YAML, has a key twice in one section, is too large or too deeply
            nested, or has an alias that refers to a value that contains it. The message names the line.
    """
    try:
        return deepcopy(_value(text))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" (line {mark.line + 1})" if mark is not None else ""
        raise ConfigError(f"{where} is not readable YAML{line}: {error.problem}") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        cause = str(error).strip().splitlines()[0][:200]
        raise ConfigError(f"{where} is not readable YAML: {cause}") from None


@lru_cache(maxsize=8)
def _value(text: str) -> Any:
    """The value of a YAML text. A command reads the configuration of its workspace several times."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def read_tree(path: Path) -> dict[str, Any]:
    """The tree of keys and values in a YAML file, not validated.

    Raises:
        ConfigError: if there is no such file, it cannot be read (see :func:`parse`), it is too large, or it
            has no keys.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ConfigError(
                f"{path} is larger than {MOST_BYTES:,} bytes, so it is not a configuration{_hint(path)}"
            )
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"there is no configuration at {path}; check the path") from None
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}; check the path and its permissions"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8{_hint(path)}"
        ) from None
    try:
        tree = parse(text, str(path))
    except ConfigError as error:
        raise ConfigError(f"{error}{_hint(path)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path} contains no configuration (expected keys such as data, backbone and strategy)"
            f"{_hint(path)}"
        )
    return tree


def _hint(path: Path) -> str:
    """What to do if a log was given in place of its configuration."""
    if path.suffix in (".yaml", ".yml"):
        return ""
    return f"; if it is a log, `peso init {shlex.quote(str(path))}` writes one for it"


def shown(value: Any, most: int = 80) -> str:
    """A value as text for a message. A text of more than ``most`` characters is cut."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"


LARGEST = 2**31 - 1  # the largest count, because arrays are indexed with int32
EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


class Section(BaseModel):
    """A section of the configuration. It is immutable, accepts no unknown keys, and does not convert values
    to other types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _numbers(cls, tree: Any) -> Any:
        """Read numbers such as 2e-4, which are text in YAML 1.1, and refuse counts that are too large."""
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
                raise ValueError(f"{key} is too large: the largest allowed count is {LARGEST:,}")
        return result


def new_key(default: Any, **about: Any) -> Any:
    """A field of a section that is written only if its value is not the default. Earlier versions do not have
    the key, so the files of a run that does not use it stay the same.

    Args:
        default: the default.
        about: further arguments of ``pydantic.Field``.
    """
    return Field(default, exclude_if=partial(eq, default), **about)


def expand_name(value: Any) -> Any:
    """Expand the short form of a section that has a name, the name alone: ``ray`` to ``{"name": "ray"}``."""
    return {"name": value} if isinstance(value, str) else value


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and EXPONENT.fullmatch(value) else value


def plain_types(annotation: Any) -> frozenset[Any]:
    """The plain types that an annotation allows, including those within lists and unions."""
    return frozenset([annotation]).union(*map(plain_types, get_args(annotation)))
